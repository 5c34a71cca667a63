"""``elastic-sbatch``: argv -> JobSpec -> batch script -> sbatch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_hpc import __version__, slurm
from elastic_hpc.cli import entry
from elastic_hpc.errors import UsageError, of_option
from elastic_hpc.job.request import Request, layers_of
from elastic_hpc.job.spec import JobSpec, build
from elastic_hpc.job.submission import checked, prepared, short_times
from elastic_hpc.job.toml_file import JobFile, read_job
from elastic_hpc.options.of_joiners import JOINERS
from elastic_hpc.options.sbatch import COMMAND_LINE, COMMAND_LINE_ONLY, Given, Option, check, last, scan
from elastic_hpc.options.sbatch_environment import for_sbatch_itself
from elastic_hpc.options.table import (
    ABOUT_SWITCHES,
    ELASTIC,
    JOB_OPTIONS,
    LAUNCH_OPTIONS,
    SCRIPT_SWITCHES,
    ElasticOption,
    refuse_switch_apart,
)
from elastic_hpc.options.torchrun import OPTIONS as TORCHRUN
from elastic_hpc.options.torchrun import translate, unneeded
from elastic_hpc.record.registry import remember

if TYPE_CHECKING:
    import argparse

_FROM_BATCH = ElasticOption("from-batch", "FILE", str,
                            help="make the job from the #SBATCH lines, set-up lines and torchrun line of this batch "
                                 "script, instead of from SCRIPT")  # fmt: skip
_RESUME = ElasticOption("resume", "JOB|DIR", str,
                        help="continue a job that failed, timed out or was cancelled, in its run directory: with the "
                             "record, counters and checkpoints there; options and SCRIPT are those of its submission, "
                             "unless you give new ones")  # fmt: skip
_FILE = ElasticOption("file", "FILE", str, letter="f",
                      help="read the job from this TOML file: script, args, and options as in a configuration file; "
                           "SCRIPT and options on the command line override the file")  # fmt: skip
_ACTIONS = (
    *SCRIPT_SWITCHES,
    ElasticOption("dry-run", "", bool, "print the batch script, with the source of each option, and submit nothing"),
    ElasticOption("parsable", "", bool, "print only the job ID"),
    ElasticOption("wait", "", bool, "wait for the job and return its exit code", letter="W"),
    ElasticOption("test-only", "", bool, "let Slurm check the job and estimate its start time; submit nothing"),
    ElasticOption("quiet", "", bool, "print nothing on success", letter="Q"),
    ElasticOption("verbose", "", bool, "pass --verbose to sbatch", letter="v"),
    *ABOUT_SWITCHES,
)
_GROUPS = {
    "launch options": LAUNCH_OPTIONS,
    "job options": (_FILE, _FROM_BATCH, _RESUME, *JOB_OPTIONS),
    "what to do": _ACTIONS,
}
OWN = (*(option.scanned() for group in _GROUPS.values() for option in group), Option("usage", value=""))
"""Options that are not passed to sbatch."""
_OWN_NAMES = {option.name for option in OWN}
SUBMITS = frozenset(option.name for option in _ACTIONS if option not in SCRIPT_SWITCHES)
"""Options about what to do with the job."""
_TORCHRUNS = tuple(replace(o, letter=o.letter.strip("t")) for o in TORCHRUN if o.name not in _OWN_NAMES)  # -t is --time

_USAGE = "elastic-sbatch [options] SCRIPT [ARGS...]"
_DESCRIPTION = """\
Submit a PyTorch training script to Slurm as an elastic job. The job starts when MIN nodes are free, uses up to MAX,
continues when nodes are lost, and requeues itself at the time limit, after a preemption, and below MIN nodes.

examples:
  elastic-sbatch --nodes 4:8 train.py --lr 1e-3
  elastic-sbatch -N 2:4 -p gpu -t 8:00:00 --gpus-per-node=8 train.py
  elastic-sbatch -N 2:4 --setup 'module load cuda' -m my_package.train --lr 1e-3
  elastic-sbatch --dry-run -N 2:4 train.py     read the batch script first
  elastic-sbatch --file job.toml               options and script from a file
  elastic-sbatch --from-batch job.sh -N 2:4    convert a torchrun batch script

Everything after SCRIPT belongs to the script. elastic-sbatch passes all other options of sbatch through, in any form:
-p gpu, --partition gpu, --partition=gpu. It refuses options that would break an elastic job, and says why.
It accepts the options of torchrun that are useful here, with dashes or underscores: --nnodes means --nodes,
--master_addr and --master_port mean --rdzv-endpoint. It ignores those whose effect every elastic job has, refuses the
rest, and names the replacement.

--grow-NAME sets sbatch's --NAME for the one-node jobs that --grow submits: --grow-partition, --grow-qos,
--grow-account, --grow-constraint, --grow-time and others. If one of them names another partition, QOS or account, the
job itself requests MIN nodes and reaches MAX through the one-node jobs.

TIME is a number of seconds, or 90s, 5m, 1h30m, 2d, or Slurm's [D-]HH:MM:SS or MM:SS. sbatch's own options, such as
--time, accept only Slurm's notation, where a plain number means minutes.
"""
_NOTES = """
Defaults come from the TOML files $ELASTIC_HPC_CONFIG, ~/.config/elastic_hpc/config.toml and ./elastic_hpc.toml, then
from #SBATCH lines of the script, then from sbatch's variables, such as SBATCH_ACCOUNT. Later sources override earlier
ones, and the command line overrides all; the --setup lines of all sources apply. A --file may also have script and
args, and overrides all but the command line:

  script = "train.py"
  args = ["--lr", "1e-3"]
  nodes = "2:4"
  setup = ["module load cuda"]
  [sbatch]
  partition = "gpu"

elastic-hpc config shows the settings in effect, and the source of each value.

"""


def manual() -> argparse.ArgumentParser:
    """A parser that has the help."""
    from elastic_hpc.cli.manual import EXIT_CODES, manual  # a submission does not need this

    return manual(_USAGE, _DESCRIPTION, _GROUPS, f"{_NOTES}{EXIT_CODES} With --wait, the exit code is that of the job.")


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    return entry.run("elastic-sbatch", lambda: _run(given))


def _run(argv: list[str]) -> int:
    given, rest = read(argv)
    switches = {g.name for g in given if not g.option.value}
    if switches & {"help", "usage"}:
        print(manual().format_help(), end="")
        return 0
    if "version" in switches:
        print(f"elastic-sbatch {__version__}")
        return 0
    if any(g.name == _RESUME.name for g in given):
        return _resume(given, rest, switches)
    job = job_of(given, rest)
    by_letter = any(re.match("-t(?![a-z])", word) for word in argv[: len(argv) - len(rest)])
    if by_letter and re.fullmatch("[0-3]|.*,.*", minutes := last(given, "time") or ""):
        note = f"-t {minutes} is sbatch's --time, in minutes; torchrun's -t is written --tee here"
        job = replace(job, notes=(*job.notes, note))
    if "quiet" in switches:
        job = replace(job, notes=())
    if "dry-run" in switches:
        text = checked(job)
        if not (sys.stdout.isatty() and sys.stderr.isatty()):  # the script has the notes too
            _tell(job)
        sys.stdout.buffer.write(os.fsencode(text))
        sys.stdout.buffer.flush()
        return 0
    with prepared(job, will_run="test-only" not in switches) as script:
        return _submit(job, script, given)


def read(
    argv: Sequence[str], others: Sequence[Option] = (), command: str = "elastic-sbatch"
) -> tuple[list[Given], list[str]]:
    """The options in ``argv``, and the script with its arguments. ``others``: options of another ``command``."""
    return scan(argv, (*OWN, *JOINERS.values(), *others, *_TORCHRUNS), command=command)


def job_of(given: Sequence[Given], rest: Sequence[str], usage: str = _USAGE) -> JobSpec:
    """The job of a command line, as returned by ``read``. Raises UsageError."""
    if (resumed := last(given, _RESUME.name)) is not None:
        raise UsageError(f"--resume {resumed}: only elastic-sbatch itself resumes a job; leave it out")
    refuse_switch_apart(given, rest)
    module, no_python = (any(g.name == name for g in given) for name in ("module", "no-python"))
    ours, torchruns = translate(given)
    options = [(g.name, "on" if g.value is None else g.value) for g in ours if g.name in ELASTIC]
    sbatch = [g for g in ours if g.name not in _OWN_NAMES | COMMAND_LINE_ONLY]
    batch, path = last(given, _FROM_BATCH.name), last(given, _FILE.name)
    if batch is not None:
        if path is not None:
            raise UsageError(f"--file {path} with --from-batch {batch}: expected one of them")
        if module or no_python:
            raise UsageError(f"-m or --no-python with --from-batch {batch}: the batch script says that; leave it out")
        from elastic_hpc.from_batch.job import job_of_batch_script

        return job_of_batch_script(batch, rest, options, sbatch, torchruns)
    file = job_file(path) if path is not None else None
    if file and file.script and not rest:
        rest, module, no_python = [file.script, *file.args], module or file.module, no_python or file.no_python
    if not rest or rest[0] in {"", "-"}:
        for option in given:
            check(option)  # --wrap needs no script
        raise UsageError(f"expected SCRIPT; usage: {usage}")
    layers = [] if module or no_python else layers_of(rest[0], last(sbatch, "chdir"))
    return build(
        Request(
            rest[0],
            rest[1:],
            options,
            sbatch,
            COMMAND_LINE,
            module=module,
            no_python=no_python,
            torchrun=torchruns,
            of_script=layers,
            job_file=file.layer if file else None,
        )
    )


def job_file(path: str) -> JobFile:
    """The job in the TOML file at ``path``. Raises UsageError."""
    try:
        return read_job(Path(path), path)
    except UsageError as error:
        raise UsageError(f"--file {path}: {error}") from None


def _resume(given: Sequence[Given], rest: Sequence[str], switches: Collection[str]) -> int:
    """Submit the job that continues the job of --resume."""
    from elastic_hpc.job.lookup import find
    from elastic_hpc.job.resume import Anew, Resumption

    refuse_switch_apart(given, rest)
    if (batch := last(given, _FROM_BATCH.name)) is not None:
        raise UsageError(f"--from-batch {batch} with --resume: the job keeps the batch script it has; leave it out")
    if (path := last(given, _FILE.name)) is not None:
        raise UsageError(f"--file {path} with --resume: the job keeps its options; give those that are to change")
    ours, torchruns = translate(given)
    for option in torchruns:
        unneeded(option)
    module, no_python = ("module" in switches), ("no-python" in switches)
    if (module or no_python) and not rest:
        raise UsageError("-m or --no-python with --resume: expected SCRIPT too, or leave it out")
    anew = Anew(
        COMMAND_LINE,
        [(g.name, "on" if g.value is None else g.value) for g in ours if g.name in ELASTIC],
        [g for g in ours if g.name not in _OWN_NAMES | COMMAND_LINE_ONLY],
        rest,
        module,
        no_python,
    )
    resumption = Resumption(of_option("--resume", find)(last(given, _RESUME.name) or ""), anew)
    notes = () if "quiet" in switches else (*resumption.notes(), *(resumption.job.notes if resumption.job else ()))
    if "dry-run" in switches:
        for note in notes:
            _warn(note)
        sys.stdout.buffer.write(resumption.script)
        sys.stdout.buffer.flush()
        return 0

    def on_submitted(answer: str) -> None:
        resumption.submitted(answer.partition(";")[0])
        _report(answer, switches, str(resumption.run_dir))
        for note in notes:
            _warn(note)

    with resumption.submission(will_run="test-only" not in switches) as script:
        return slurm.sbatch(
            script,
            [*_for_sbatch_itself(given), *resumption.options],
            os.environ,
            on_submitted,
            lambda text: print(text, end="", file=sys.stderr),
            resumption.exports,
            resumption.folder,
        )


def _for_sbatch_itself(given: Sequence[Given]) -> list[str]:
    """The options for sbatch that do not describe the job. With --quiet, sbatch would not print the job id."""
    passed = [g.flag for g in given if g.name in {"test-only", "wait", "verbose"}]
    return passed + [flag for flag in for_sbatch_itself(os.environ) if flag not in passed]


def _submit(job: JobSpec, script: bytes, given: Sequence[Given]) -> int:
    passed = _for_sbatch_itself(given)
    switches = {g.name for g in given}

    def on_submitted(answer: str) -> None:
        run_dir = os.path.join(job.log_dir, answer.partition(";")[0]) if job.template != "torchrun" else ""
        if run_dir:
            remember(run_dir)
        _report(answer, switches, run_dir and run_dir + "_TASK" * job.has("array"))
        _tell(job)

    code = slurm.sbatch(script, passed, os.environ, on_submitted, lambda text: print(text, end="", file=sys.stderr))
    if "--test-only" in passed:
        _tell(job)
        if "quiet" not in switches and job.launch.nodes.min < job.launch.nodes.max:
            _warn(f"elastic-hpc plan with the same options says when each size of {job.launch.nodes} would start")
    if not (switches & {"parsable", "quiet"} or job.template == "torchrun"):
        for warning in short_times(job):
            _warn(warning)
    return code


def _report(answer: str, switches: Collection[str], run_dir: str) -> None:
    """Print sbatch's answer, the run directory, if there will be one, and the next command to type."""
    number, _, cluster = answer.partition(";")
    if "parsable" in switches:
        print(answer, flush=True)
    elif "quiet" not in switches:
        print(f"Submitted batch job {number}" + (f" on cluster {cluster}" if cluster else ""), flush=True)
        if run_dir:
            print(f"run directory: {run_dir}; to see the job: elastic-hpc status {number}", file=sys.stderr)


def _tell(job: JobSpec) -> None:
    """Print the notes on a job. Not called for a refused job: its user sees only the error."""
    for note in job.notes:
        _warn(note)


def _warn(text: str) -> None:
    print(f"elastic-sbatch: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
