"""A job from options by name, whether the command line gave them, a Python call or submitit. Reads the configuration
files and looks at the script.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from elastic_hpc.errors import NO_FOLDER, UsageError
from elastic_hpc.job import outputs, programs, snapshot
from elastic_hpc.job.commands import Container
from elastic_hpc.job.config import Layer, Setting, Settings, load
from elastic_hpc.job.quoting import Shell
from elastic_hpc.job.script import COMMAND_LINE, JobSpec, render
from elastic_hpc.job.script_file import not_python
from elastic_hpc.job.snapshot import WorkTree
from elastic_hpc.options import durations, from_python
from elastic_hpc.options.from_python import SOURCE as PYTHON
from elastic_hpc.options.sbatch import LONGEST_LEAD, SBATCH, Given, WarningSignal, is_for_containers, last
from elastic_hpc.options.sbatch_lines import directives_of_python
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.table import ELASTIC, NOT_FOR_TORCHRUN
from elastic_hpc.options.torchrun import translate, unneeded

_CONTAINER = (
    "it would put the batch script itself into a container, where srun and scontrol are not; use --container-image "
    "IMAGE and --container-mounts SRC:DST of elastic-sbatch, in a configuration file above [sbatch]; the working "
    "directory is that of --chdir; whatever else pyxis can do belongs on the srun line of a template of your own"
)
_NAME_OF_SCRIPT = "the script's name"
_AFTER_GRACE = timedelta(seconds=30)  # to requeue, between the end of --grace and that of the allocation


def build(
    script: str,
    script_args: Sequence[str],
    options: Iterable[tuple[str, str]],
    sbatch: Sequence[Given],
    *,
    module: bool,
    source: str,
    no_python: bool = False,
    torchrun: Sequence[Given] = (),
    of_script: Sequence[Layer] = (),
    notes: Sequence[str] = (),
    folder: str | None = "",
    unset: Collection[str] = (),
) -> JobSpec:
    """The job: ``options`` of ours and of ``sbatch``, from ``source``, over what the environment, the script itself and
    the configuration files say. ``torchrun``: options of torchrun that have no counterpart here. ``notes`` are for the
    user; the set-up lines change to ``folder``, None if that is not known. ``unset``: options of sbatch that are not to
    be, whatever a file says. Raises UsageError for what cannot be a job.
    """
    if module and no_python:
        raise UsageError("--no-python with --module: a module needs Python; leave out one of the two options")
    if script == ":":
        raise UsageError("':': heterogeneous jobs are not elastic; submit one job with --nodes MIN:MAX")
    try:
        directory = Path.cwd()
    except FileNotFoundError:
        raise UsageError(NO_FOLDER) from None
    settings = load(os.environ, directory, of_script).with_layer(source, options, sbatch, unset)
    work_dir = os.path.normpath(os.path.join(directory, last(settings.sbatch, "chdir") or "."))
    note, runs_in = "", os.path.normpath(os.path.join(work_dir, folder or ""))
    looked_in = Path(runs_in) if folder else directory
    if module:
        programs.check_module(script)
    elif folder is None or isinstance(script, Shell):
        pass  # only running the set-up lines tells
    elif no_python:
        script = programs.find_program(script, runs_in, looked_in)
    else:
        script, note = programs.find_script(script, runs_in, looked_in)
    chosen = dict(settings.options)
    if "nodes" not in chosen:
        if source == PYTHON:
            raise UsageError("nodes: missing, for example nodes='2:4'")
        raise UsageError("--nodes: missing before the script, for example: elastic-sbatch --nodes 2:4 train.py")
    plain = "template" in chosen and chosen["template"].value == "torchrun"
    if plain:
        _refuse_for_torchrun(settings, source)
        # what is left of these is what the files say for elastic jobs
        chosen = {name: setting for name, setting in chosen.items() if name not in NOT_FOR_TORCHRUN}
    else:
        for given in torchrun:
            unneeded(given)
    sources = {name: setting.source for name, setting in chosen.items()}
    template, python, given_log_dir = (chosen.pop(name, None) for name in ("template", "python", "log-dir"))
    log_dir = os.path.abspath(given_log_dir.value if given_log_dir else "elastic-logs")
    for given in settings.sbatch:
        if is_for_containers(given.name):
            shown = given.option.flag if given.value is None else f"{given.option.flag}={given.value}"
            raise UsageError(f"{shown} ({given.source}): {_CONTAINER}")
    container = _container(chosen, source, work_dir, log_dir)
    code, with_snapshot = WorkTree.around(work_dir), chosen.pop("snapshot", None)
    if with_snapshot and with_snapshot.value:
        if folder != "" or isinstance(script, Shell):
            raise UsageError("--snapshot: where the batch script changes to, there is no copy; leave it out")
        if not code:
            raise UsageError(f"--snapshot: {work_dir} is in no work tree of git, or git cannot be asked; leave it out")
        if not module and (os.sep in script or not no_python):
            script = f"./{code.script(script)}" if no_python else code.script(script)
    launch = LaunchSpec(
        script=script,
        script_args=tuple(script_args),
        module=module,
        no_python=no_python,
        **{name.replace("-", "_"): setting.value for name, setting in chosen.items()},
    )
    launch.check_sizes()
    passed = [g for g in settings.sbatch if g.name != "signal"]
    if not any(g.name == "job-name" for g in passed) and not isinstance(script, Shell):
        name = script if module else Path(script).name if no_python else Path(script).stem
        name = re.sub(r"[\x00-\x1f\x7f]", "_", name)
        passed.insert(0, Given(SBATCH["job-name"], name, _NAME_OF_SCRIPT))
    if python and not container:
        python = replace(python, value=programs.find_interpreter(python.value, work_dir, directory))
    submitting = sys.executable
    lasts = programs.environment_that_lasts(sys.prefix, work_dir, other=bool(python and not container))
    if programs.is_temporary(sys.prefix) and python:
        submitting = python.value[0]
    return JobSpec(
        launch=launch,
        log_dir=log_dir,
        sbatch=tuple(passed),
        signal=_warning(last(settings.sbatch, "signal"), launch.grace),
        setup=settings.setup,
        env=settings.env,
        template=template.value if template else "elastic",
        python=submitting,
        agent_python=python.value if python else None,
        container=container,
        code=code,
        snapshot=bool(with_snapshot and with_snapshot.value),
        torchrun=tuple(_words_for_torchrun(torchrun)) if plain else (),
        sources=sources,
        notes=(*notes, *settings.notes, *filter(None, [note, lasts]), *outputs.notes(passed, work_dir)),
    )


def from_names(
    script: str | os.PathLike[str],
    script_args: Iterable[object],
    *,
    module: bool = False,
    no_python: bool = False,
    setup: str | Iterable[object] = (),
    env: Mapping[str, object] | None = None,
    options: Mapping[str, object],
    sbatch: Mapping[str, object] | None = None,
) -> JobSpec:
    """The job of a Python call: ``options`` as ``from_python.options`` takes them."""
    for name, value in (("module", module), ("no_python", no_python)):
        if not isinstance(value, bool):
            raise UsageError(f"{name}={value!r}: expected True or False")
    named, unset = from_python.options(options, sbatch)
    given, torchrun = translate(named)
    ours = [("setup", line) for line in from_python.lines(setup)]
    ours += [("env", variable) for variable in from_python.environment(env)]
    ours += [(each.name, each.value or "") for each in given if each.name in ELASTIC]
    script, passed = from_python.word(script, "script"), [each for each in given if each.name not in ELASTIC]
    return build(
        script,
        [from_python.word(arg, "argument of the script") for arg in script_args],
        ours,
        passed,
        module=module,
        source=PYTHON,
        no_python=no_python,
        torchrun=torchrun,
        of_script=[] if module or no_python else layers_of(script, last(passed, "chdir")),
        unset=unset,
    )


def layers_of(script: str, chdir: str | None) -> list[Layer]:
    """What the #SBATCH lines of a Python script say; nothing if it cannot be read, which ``build`` refuses."""
    found = [path for path in (os.path.join(chdir or "", script), script) if os.path.isfile(path)]
    try:
        content = Path(found[0]).read_bytes() if found else b""
    except OSError:
        return []
    if not_python(content, script):
        return []
    return [
        Layer(g.source, [("nodes", g.value or "")], []) if g.name == "nodes" else Layer(g.source, [], [g])
        for g in directives_of_python(content, script)
    ]


@contextlib.contextmanager
def prepared(job: JobSpec, *, will_run: bool = True) -> Iterator[bytes]:
    """The batch script of ``job``, when all is in place for its submission, in the body. Raises UsageError. What is put
    aside for the job is taken back if the body raises that, or with ``will_run`` False.
    """
    job = replace(job, token=secrets.token_hex(8))
    script, staged = checked(job), Path(job.staged)
    try:
        os.makedirs(job.log_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=job.log_dir).close()
    except OSError as error:
        raise UsageError(
            f"--log-dir {job.log_dir!r}: {error.strerror}; "
            "expected a folder that can be written and that all nodes share"
        ) from None
    if will_run:
        outputs.make_folders(job.sbatch, os.path.join(os.getcwd(), last(job.sbatch, "chdir") or ""))
    if job.code and will_run and job.token in script:
        snapshot.put_aside(job.code, staged, snapshot=job.snapshot)
    try:
        yield os.fsencode(script)
    except UsageError as error:  # Slurm refused the job; after other errors it may be there
        snapshot.discard(staged)
        raise UsageError(f"{error}{_from_elsewhere(job, str(error))}") from None


def _from_elsewhere(job: JobSpec, refusal: str) -> str:
    """The options that ``refusal`` speaks of and that nobody has typed for this job, each with its place."""
    words = {word.strip("-") for word in re.findall(r"[a-z-]+", refusal.lower())}
    typed = (COMMAND_LINE, PYTHON, _NAME_OF_SCRIPT)
    told = [f"{g.option.flag}={g.value}, {g.source}" for g in job.sbatch if g.name in words and g.source not in typed]
    return f" ({'; '.join(told)})" if told else ""


def checked(job: JobSpec) -> str:
    """The batch script of ``job``. Raises UsageError also for what could only fail later."""
    text = render(job)
    _check_time(job, text)
    if job.snapshot and os.path.basename(job.staged) not in text:
        raise UsageError(
            f"--template {job.template} with --snapshot: it does not take the copy of the code; include snapshot.j2 "
            "and workdir.j2 as the built-in template elastic.sbatch.j2 does, or leave out --snapshot"
        )
    if not job.launch.grow:
        return text
    if job.container:
        raise UsageError(
            "--grow with --container-image: it is the leader, in the container, that would submit further nodes, and "
            "Slurm's commands are not there; leave out --grow, or write --grow=off"
        )
    for given in job.sbatch:
        if given.name == "gpus":
            raise UsageError(
                f"--gpus={given.value} with --grow: counts the GPUs of the whole job, a joiner is one node; "
                "use --gpus-per-node=N"
            )
    if "ELASTIC_HPC_JOIN" not in text:
        raise UsageError(
            f"--template {job.template} with --grow: it has no ELASTIC_HPC_JOIN, by which one more node finds the job; "
            "take the lines that have it from the built-in template elastic.sbatch.j2, or leave out --grow"
        )
    return text


def _container(chosen: dict[str, Setting], source: str, work_dir: str, log_dir: str) -> Container | None:
    image, mounts, runtime = (chosen.pop(f"container-{name}", None) for name in ("image", "mounts", "runtime"))
    if not image:
        for name, setting in ("mounts", mounts), ("runtime", runtime):
            if setting and setting.source == source:
                raise UsageError(f"--container-{name} {setting.value}: needs a container: --container-image IMAGE")
        return None
    for folder in (work_dir, log_dir):
        if set(folder) & set(',:"'):
            raise UsageError(
                f"{folder!r} with --container-image: a folder with a comma, a colon or a quote in its name cannot be "
                "mounted; use another one, see --chdir and --log-dir"
            )
    decided = "apptainer" if image.value.endswith(".sif") else "pyxis"
    return Container(image.value, runtime.value if runtime else decided, mounts.value if mounts else None)


def _check_time(job: JobSpec, script: str) -> None:
    """A job that is warned as soon as it starts would save, return to the queue, start and be warned again."""
    text = last(job.sbatch, "time")
    limit = durations.time_limit(text) if text else None
    if limit and limit <= job.signal.lead and f"--signal={job.signal}" in script:
        lead = f"{job.signal.lead.total_seconds():.0f} s"
        ours = "--grace" if job.signal.lead == job.launch.grace + _AFTER_GRACE else "--signal"
        raise UsageError(
            f"--time={text}: the workers are told to save {lead} before the end ({ours}), that is as soon as they have "
            f"started; expected more than {lead}, or a shorter {ours}"
        )


def _warning(given: str | None, grace: timedelta) -> WarningSignal:
    """When the workers are told: as --signal says, else so early that they have --grace."""
    lead, longest = grace + _AFTER_GRACE, timedelta(seconds=LONGEST_LEAD)
    if lead > longest and "@" not in (given or ""):
        raise UsageError(
            f"--grace {durations.as_text(grace)}: the workers are told {durations.as_text(lead)} s before the end of "
            f"the job, and Slurm's --signal takes at most {LONGEST_LEAD} s; expected at most "
            f"{durations.as_text(longest - _AFTER_GRACE)} s"
        )
    return WarningSignal.parse(given, lead) if given else WarningSignal(lead=lead)


def _words_for_torchrun(given: Sequence[Given]) -> Iterator[str]:
    """What torchrun itself is told; each node's number is known to its rendezvous alone."""
    for each in given:
        if each.name != "node-rank" and each.value != "static":
            yield each.option.flag if each.value is None else f"{each.option.flag}={each.value}"


def _refuse_for_torchrun(settings: Settings, source: str) -> None:
    given = {name for name, setting in settings.options.items() if setting.source == source}
    given |= {g.name for g in settings.sbatch if g.source == source}
    for name in NOT_FOR_TORCHRUN:
        if name in given:
            raise UsageError(f"--{name}: plain torchrun has no use for it; leave it out, or use --template elastic")
    nodes = settings.options["nodes"].value
    if nodes.sizes:
        raise UsageError(
            f"--nodes {nodes}: plain torchrun expects N or MIN:MAX, for example --nodes {nodes.min}:{nodes.max}; "
            "for exact numbers use --template elastic"
        )
