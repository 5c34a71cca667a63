"""A job that has ended continues: another Slurm job uses its run directory, with the checkpoints, the record and the
counters. Looks at the job, writes to its run directory, asks Slurm whether it has ended.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_hpc import slurm
from elastic_hpc.environment import CONTINUE, FIRST_JOB, FIRST_RUN, SPENT
from elastic_hpc.errors import ElasticError, SlurmError, UsageError
from elastic_hpc.job import recorded
from elastic_hpc.job.look import Jobs
from elastic_hpc.job.look import recorded as observed
from elastic_hpc.job.lookup import expand
from elastic_hpc.job.request import Request
from elastic_hpc.job.spec import NEW_ID, JobSpec, build
from elastic_hpc.job.submission import checked, prepared
from elastic_hpc.options import from_python as python_options
from elastic_hpc.options.sbatch import Given, check
from elastic_hpc.options.table import ELASTIC
from elastic_hpc.options.torchrun import translate, unneeded
from elastic_hpc.options.values import NodeRange
from elastic_hpc.record.registry import remember
from elastic_hpc.record.rundir import RESUMING, RunDir

_FRESH = 60.0
"""Seconds after a leader's last sign of life during which its job counts as running, even if Slurm does not know it."""


@dataclass(frozen=True)
class Anew:
    """What the user gives at the resumption, which replaces what the earlier submission had: our options by name,
    sbatch's options, and the script with its arguments.
    """

    source: str
    options: Sequence[tuple[str, str]] = ()
    sbatch: Sequence[Given] = ()
    script: Sequence[str] = ()
    module: bool = False
    no_python: bool = False
    unset: Collection[str] = ()


class Resumption:
    """A job to continue."""

    def __init__(self, run_dir: Path, anew: Anew) -> None:
        """Raises UsageError for a job that cannot be resumed, or not with ``anew``, and SlurmError if Slurm cannot say
        whether it has ended.
        """
        self.run_dir, self.id = run_dir, run_dir.name
        self._rundir, self._anew = RunDir(run_dir), anew
        self._check_owner()
        self._check_state()
        spec = self._rundir.read("spec.json") or {}
        self.folder = str(spec.get("folder") or os.getcwd())
        """The folder from which the job was submitted."""
        if not os.path.isdir(self.folder):
            raise UsageError(f"job {self.id} was submitted from {self.folder}, which no longer exists")
        self.script = (run_dir / "script.sbatch").read_bytes()
        """The batch script."""
        self.job = self._job()
        """The job to submit; None to submit the earlier batch script unchanged."""
        if self.job:
            self.script = os.fsencode(checked(self.job))
        self._spares = self.job.launch.spares if self.job else int(spec.get("--spares", 0))

    @property
    def exports(self) -> dict[str, str]:
        """The variables that name, for the batch script and the agents, the job that they continue."""
        return {
            CONTINUE: str(self._rundir.path),
            FIRST_RUN: str(self._last_run + 1),
            FIRST_JOB: self.id,
            SPENT: ",".join(map(str, self._spent)),
        }

    @property
    def options(self) -> list[str]:
        """Options for sbatch's command line, which override the options in the script."""
        _, _, task = self.id.partition("_")
        nodes = {name for name, _ in self._anew.options} & {"nodes"}
        options = [f"--array={task}"] if task else []
        if self._bounds and not nodes and not (self.job and self.job.grows_elsewhere):
            bounds = NodeRange(self._bounds.min_nodes, self._bounds.max_nodes + self._spares)
            options.append(f"--nodes={bounds.slurm}")
        return options + ([] if self.job else [str(given) for given in self._anew.sbatch])

    def notes(self) -> Iterator[str]:
        """What the user should know: what continues, and which options are in effect."""
        yield (
            f"job {self.id} continues in its run directory, with its record and its counters: this is run "
            f"{self._last_run + 2}, and its next restart is restart {self._spent[0] + 1}; --max-restarts and "
            "--max-requeues count from here"
        )
        yield (
            "the script finds its checkpoints if it saves them in the run directory or in a fixed folder, not in a "
            "folder named after $SLURM_JOB_ID, which is new"
        )
        given = [f"--{name}" for name, _ in self._anew.options] + [g.flag for g in self._anew.sbatch]
        given += ["the script and its arguments"] if self._anew.script else []
        what = f"{', '.join(dict.fromkeys(given))} as given now; all other options" if given else "the options"
        yield f"{what} are those of job {self.id}'s submission, configuration files and SBATCH_ variables included"
        if self.job is None:
            noted = [line.lstrip("# ") for line in os.fsdecode(self.script).split("\n") if line.startswith("#")]
            yield from (line for line in noted if NEW_ID in line)
            yield f"{self._rundir.path / 'script.sbatch'} is submitted as it is"
        elif self.job.keeps_code:
            yield "it runs its copy of the code; for a new copy: --snapshot"

    @contextlib.contextmanager
    def submission(self, *, will_run: bool = True) -> Iterator[bytes]:
        """Put in place what the job needs, and yield its batch script, for the body to submit. ``will_run``: False if
        Slurm only checks the job. Raises UsageError.
        """
        with contextlib.ExitStack() as stack:
            script = self.script
            if self.job:
                script = stack.enter_context(prepared(self.job, will_run=will_run, folder=self.folder))
            if will_run:
                stack.enter_context(self._claim())
                nodes = any(name == "nodes" for name, _ in self._anew.options)
                try:
                    self._rundir.begin_again(forget_bounds=nodes)
                except OSError as error:
                    raise ElasticError(f"{self._rundir.path}: {error.strerror}") from None
            yield script

    def submitted(self, number: str) -> str:
        """``number`` is the id of the Slurm job that continues. Returns what Slurm calls this job now."""
        new = number + (f"_{self.id.partition('_')[2]}" if "_" in self.id else "")
        self._rundir.mark_acted(self._last_run, new)
        self._rundir.call_also(new)
        remember(self._rundir.path.with_name(new))
        (self._rundir.path / RESUMING).unlink(missing_ok=True)  # sbatch --wait returns when the job has ended
        return new

    def _check_owner(self) -> None:
        path = self._rundir.path
        if expand(path) != [path]:
            raise UsageError(f"job {self.id} is an array; expected one of its tasks, for example --resume {self.id}_0")
        try:
            owner = path.stat().st_uid
        except OSError as error:
            raise UsageError(
                f"job {self.id} has no run directory ({path}: {error.strerror}): it has not started, so there is "
                "nothing to continue; submit it again, without --resume"
            ) from None
        if owner != os.geteuid():
            raise UsageError(
                f"job {self.id} belongs to {_name(owner)}, who alone can resume it; to continue from its "
                "checkpoints, submit a job of your own that loads them"
            )
        if not (path / "script.sbatch").exists():
            raise UsageError(
                f"job {self.id} has no batch script in {path}: only a job of elastic-sbatch whose script has started "
                "can be resumed; start it again as before"
            )

    def _check_state(self) -> None:
        """Refuse a job that has not ended, or has nothing left to do."""
        jobs = Jobs([self._rundir])
        (look,) = jobs.look(ends=True)
        if jobs.problem:
            raise SlurmError(jobs.problem)
        view, seen = look.view, observed(self._rundir)
        of_verdict = seen.verdict["run"] if seen.verdict else 0
        self._last_run = max(seen.leader_run, of_verdict, *(run.number for run in look.story.runs))
        counters = self._rundir.read("state.json") or {}
        self._spent = int(counters.get("restarts", 0)), int(counters.get("requeues", 0))
        self._bounds = self._rundir.bounds()
        unknown = view.state == "UNKNOWN" and view.silent is not None and view.silent < _FRESH
        queued = slurm.queue(seen.slurm_id).get(seen.slurm_id)
        state = queued.state if queued and queued.state in slurm.LIVES else view.state
        if state == "COMPLETING":
            raise UsageError(f"job {self.id} is COMPLETING in Slurm; run the same command again when it has ended")
        if unknown or not view.over or state in slurm.LIVES:
            why = "its leader was active a moment ago" if unknown else "it has not ended, and continues by itself"
            raise UsageError(
                f"job {self.id} is {state}: {why}; to stop it first: elastic-hpc stop {self.id}; to change "
                f"its bounds while it runs: elastic-hpc resize {self.id} MIN:MAX"
            )
        if view.state == "COMPLETED" and not self._anew.script:
            raise UsageError(
                f"job {self.id} has finished; to continue the training, give the script other arguments: "
                f"elastic-sbatch --resume {self.id} {view.script or 'train.py'} ARGS"
            )

    def _job(self) -> JobSpec | None:
        anew, source = self._anew, f"job {self.id}"
        known = recorded.read(self.script, source)
        for name in [n for n, _ in anew.options if n == "log-dir"] + [g.name for g in anew.sbatch if g.name == "array"]:
            raise UsageError(f"--{name} with --resume: the job continues in {self._rundir.path}; leave it out")
        if known is None:
            if anew.options or anew.script:
                raise UsageError(
                    f"the batch script of job {self.id} does not say how it was submitted: it was edited by hand, made "
                    "of a batch script, or is of an earlier version; so only options of sbatch can be changed; edit "
                    f"{self._rundir.path / 'script.sbatch'}, then type: elastic-sbatch --resume {self.id}"
                )
            for given in anew.sbatch:
                check(given)
            return None
        script, args = (anew.script[0], anew.script[1:]) if anew.script else (known.script, known.script_args)
        of = anew if anew.script else known
        job = build(
            Request(
                script,
                list(args),
                [*anew.options, ("log-dir", str(self._rundir.path.parent))],
                anew.sbatch,
                anew.source,
                module=of.module,
                no_python=of.no_python,
                unset=anew.unset,
                resumed=known.layer,
                directory=Path(self.folder),
            )
        )
        if job.template == "torchrun":
            raise UsageError("--template torchrun with --resume: a plain torchrun has no run directory to continue in")
        return job

    @contextlib.contextmanager
    def _claim(self) -> Iterator[None]:
        path = self._rundir.path / RESUMING
        if not self._rundir.claim(RESUMING, f"process {os.getpid()} on {os.uname().nodename}\n"):
            raise UsageError(
                f"job {self.id} is being resumed or removed by another command ({path}); if that has died, remove "
                "this file"
            )
        try:
            self._check_state()  # another command may have resumed the job since
            yield
        finally:
            path.unlink(missing_ok=True)


def from_python(run_dir: Path, script: Sequence[object], options: Mapping[str, object]) -> str:
    """Resume the job in ``run_dir``, as ``Job.resume`` describes. Returns the id of the Slurm job that continues."""
    named, unset = python_options.options(options)
    given, torchruns = translate(named)
    for option in torchruns:
        unneeded(option)
    anew = Anew(
        python_options.PYTHON,
        [(option.name, option.value or "") for option in given if option.name in ELASTIC],
        [option for option in given if option.name not in ELASTIC],
        [python_options.word(word, "the script or an argument") for word in script],
        unset=unset,
    )
    resumption = Resumption(run_dir, anew)
    with resumption.submission() as text:
        number = slurm.submit_script(
            text, resumption.options, os.environ, exports=resumption.exports, folder=resumption.folder
        )
        return resumption.submitted(number)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
