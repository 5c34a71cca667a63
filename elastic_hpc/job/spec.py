"""A complete batch job, and the steps that make it from a request. Looks at the script and its folder."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_hpc.errors import UsageError
from elastic_hpc.job import outputs, programs
from elastic_hpc.job.commands import Container
from elastic_hpc.job.config import Configuration, Setting
from elastic_hpc.job.quoting import Shell, first_line
from elastic_hpc.job.request import Place, Request, configured, effective, layers_of, located
from elastic_hpc.job.snapshot import WorkTree
from elastic_hpc.options import durations, from_python
from elastic_hpc.options.from_python import PYTHON
from elastic_hpc.options.of_joiners import are_elsewhere, is_for_joiners, of_joiners
from elastic_hpc.options.sbatch import LONGEST_LEAD, SBATCH, Given, WarningSignal, last
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.table import ELASTIC, LAUNCH_OPTIONS, NOT_FOR_TORCHRUN
from elastic_hpc.options.torchrun import translate

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from elastic_hpc.job.typed import JobOptions

NAME_OF_SCRIPT = "the script's name"
"""The source of the job name if the user has not given a name."""
AFTER_GRACE = timedelta(seconds=30)
"""Time to requeue, between the end of --grace and the end of the allocation."""


@dataclass(frozen=True)
class JobSpec:
    """A complete batch job, as ``JobSpec.of`` makes it. ``render`` returns its batch script, ``submit`` submits it."""

    launch: LaunchSpec
    log_dir: str  # absolute
    folder: str = ""  # from which the batch script must be submitted; empty with --chdir
    sbatch: tuple[Given, ...] = ()  # passed through
    joiners: tuple[Given, ...] = ()  # options of sbatch for the joiners
    signal: WarningSignal = WarningSignal()
    setup: tuple[Setting, ...] = ()
    env: Mapping[str, Setting] = field(default_factory=dict)
    template: str = "elastic"  # built in, or the path of a file
    python: str = sys.executable  # absolute; the link in a virtual environment, not its target
    agent_python: tuple[str, ...] | None = None  # for agents and workers; None: ``python``, in a container python3
    container: Container | None = None
    code: WorkTree | None = None  # the work tree, whose state is recorded
    snapshot: bool = False  # whether a copy of the code runs
    notify: str | None = None  # a command or a web address
    notify_after: timedelta = timedelta(minutes=30)  # time without progress
    keeps_code: bool = False  # whether to run the copy that the run directory has from an earlier submission
    repeatable: bool = True  # whether the batch script records how it was submitted, for --resume
    token: str = "TOKEN"  # noqa: S105 - in the name of the folder that a submission puts aside for this job
    torchrun: tuple[str, ...] = ()  # options of torchrun that only the template torchrun needs
    sources: Mapping[str, str] = field(default_factory=dict)  # long option -> where its value came from
    notes: tuple[str, ...] = ()  # requested settings that have no effect, a line each

    @classmethod
    def of(
        cls,
        script: str | os.PathLike[str],
        *script_args: object,
        module: bool = False,
        no_python: bool = False,
        setup: str | Iterable[str] = (),
        env: Mapping[str, object] | None = None,
        sbatch: Mapping[str, object] | None = None,
        **options: Unpack[JobOptions],
    ) -> JobSpec:
        """The job that ``elastic-sbatch [options] SCRIPT [ARGS]`` would submit, configuration files included::

            JobSpec.of("train.py", "--lr", 1e-3, nodes=(4, 8), grow=True, partition="gpu", time=timedelta(hours=8))

        ``options``: long options of elastic-sbatch and of sbatch, with ``_`` for ``-``; ``sbatch``: options that only a
        newer sbatch knows. None means that an option is not given; True sets a switch, False unsets it. A time is a
        timedelta, a number of seconds for options of elastic-sbatch, or a string in sbatch's notation. A list stands
        for values that sbatch separates by commas. ``module``, ``no_python``: as the switches of elastic-sbatch.
        ``setup``: lines that the batch script runs first. ``env``: variables of the workers by name; None leaves a
        variable out. Raises UsageError, which is a ValueError, where the command would refuse.
        """
        for name, value in (("module", module), ("no_python", no_python)):
            if not isinstance(value, bool):
                raise UsageError(f"{name}={value!r}: expected True or False")
        named, unset = from_python.options(options, sbatch)
        given, torchrun = translate(named)
        ours = [("setup", line) for line in from_python.lines(setup)]
        ours += [("env", variable) for variable in from_python.environment(env)]
        ours += [(option.name, option.value or "") for option in given if option.name in ELASTIC]
        path, passed = from_python.word(script, "script"), [option for option in given if option.name not in ELASTIC]
        request = Request(
            path,
            [from_python.word(arg, "argument of the script") for arg in script_args],
            ours,
            passed,
            PYTHON,
            module=module,
            no_python=no_python,
            torchrun=torchrun,
            of_script=[] if module or no_python else layers_of(path, last(passed, "chdir")),
            unset=unset,
        )
        return build(request)

    @property
    def staged(self) -> str:
        """The folder in which the code waits until the job starts."""
        return f"{self.log_dir}/.submission.{self.token}"

    @property
    def grows_elsewhere(self) -> bool:
        """Whether all nodes above MIN come from another partition, account or QOS."""
        return are_elsewhere(self.joiners)

    @property
    def slurm_nodes(self) -> str:
        """The number of nodes that the job requests at the start, in sbatch's notation."""
        return self.launch.asks_slurm(grows_elsewhere=self.grows_elsewhere).slurm

    @property
    def asks_for_gpus(self) -> bool:
        return any(g.name.startswith("gpus") or (g.name == "gres" and "gpu" in str(g.value)) for g in self.sbatch)

    def has(self, name: str) -> bool:
        """Whether the sbatch option ``name`` is passed through."""
        return any(given.name == name for given in self.sbatch)

    def source(self, flag: str) -> str:
        """Where the value of the option ``flag`` came from."""
        return self.sources.get(flag.removeprefix("--"), "default")

    def settings(self, *, of_agents: bool = True) -> list[tuple[str, str, str]]:
        """Each of our settings as (name, value, source). ``of_agents``: also the options of the agents."""
        box = self.container
        job = {
            "log-dir": self.log_dir,
            "template": self.template,
            "python": shlex.join(self.agent_python) if self.agent_python else None,
            "container-image": box.image if box else None,
            "container-runtime": box.runtime if box else None,
            "container-mounts": box.mounts if box else None,
            "snapshot": "on" if self.snapshot else None,
            "notify": self.notify,
            "notify-after": durations.as_text(self.notify_after) if self.notify else None,
        }
        rows = [(f"--{name}", text) for name, text in job.items() if text]
        if of_agents:
            rows = [*self.launch.options(), *rows]
        if self.template == "torchrun":
            unknown = [f"--{name}" for name in NOT_FOR_TORCHRUN] + ["--log-dir"] * ("log-dir" not in self.sources)
            rows = [row for row in rows if row[0] not in unknown]
        shown = [(flag, text, self.source(flag)) for flag, text in rows]
        shown += [("--setup", line.value, line.source) for line in self.setup]
        shown += [("--env", f"{name}={value.value}", value.source) for name, value in self.env.items()]
        return shown


def build(request: Request) -> JobSpec:
    """The job of ``request``, which overrides the environment, the script itself and the configuration files. Raises
    UsageError if they do not make a job.
    """
    configuration = configured(request)
    place = located(request, configuration)
    return _assembled(request, configuration, place, effective(request, configuration))


def _assembled(request: Request, configuration: Configuration, place: Place, options: Mapping[str, Setting]) -> JobSpec:
    def value(name: str, default: Any = None) -> Any:
        return options[name].value if name in options else default

    log_dir = os.path.abspath(value("log-dir", "elastic-logs"))
    container = _container(options, place.work_dir, log_dir)
    code = WorkTree.around(place.work_dir)
    keeps_code = bool(request.resumed and value("snapshot") and options["snapshot"].source == request.resumed.source)
    launch = LaunchSpec(
        script=_in_snapshot(request, place, code) if value("snapshot") and not keeps_code else place.script,
        script_args=tuple(request.script_args),
        module=request.module,
        no_python=request.no_python,
        **{option.dest: value(option.name) for option in LAUNCH_OPTIONS if option.name in options},
    )
    launch.check_sizes()
    passed = [given for given in configuration.sbatch if not is_for_joiners(given.name)]
    sbatch = [*_job_name(configuration, launch), *(given for given in passed if given.name != "signal")]
    python = value("python")
    if python and not container:
        python = programs.find_interpreter(python, place.work_dir, place.submitted_from)
    lasts = programs.environment_that_lasts(sys.prefix, place.work_dir, other=bool(python and not container))
    template = value("template", JobSpec.template)
    # its rendezvous numbers the nodes
    of_torchrun = [option for option in request.torchrun if option.name != "node-rank" and option.value != "static"]
    return JobSpec(
        launch=launch,
        log_dir=log_dir,
        folder="" if last(configuration.sbatch, "chdir") else str(place.submitted_from),
        sbatch=tuple(sbatch),
        joiners=_of_joiners(request, configuration, launch),
        signal=_warning(last(configuration.sbatch, "signal"), launch.grace),
        setup=configuration.setup,
        env=configuration.env,
        template=template,
        python=python[0] if python and programs.is_temporary(sys.prefix) else sys.executable,
        agent_python=python,
        container=container,
        code=code,
        snapshot=value("snapshot", default=False),
        notify=value("notify"),
        notify_after=value("notify-after", JobSpec.notify_after),
        keeps_code=keeps_code,
        torchrun=tuple(map(str, of_torchrun)) if template == "torchrun" else (),
        sources={name: setting.source for name, setting in options.items()},
        notes=(
            *request.notes,
            *configuration.notes,
            *filter(None, [place.note, lasts]),
            *(() if template == "torchrun" else _with_job_id(configuration.setup)),
            *outputs.notes(sbatch, place.work_dir),
        ),
    )


NEW_ID = "which is new after --resume"
_JOB_ID = re.compile(r"\$\{?(SLURM_(?:ARRAY_)?JOB_?ID)\b")
_NAMES_NO_FOLDER = re.compile(r"\s*(echo|printf|scontrol|squeue|sacct|sstat)\b|.*ELASTIC_HPC_RUN_DIR", re.DOTALL)


def _with_job_id(setup: Iterable[Setting]) -> Iterator[str]:
    """A note on each set-up line that may name a folder after the Slurm job. Lines that print or ask Slurm do not."""
    for line in setup:
        used = _JOB_ID.search(line.value)
        if used and not re.match(_NAMES_NO_FOLDER, line.value):
            yield (
                f"{line.source}: {first_line(line.value)!r} contains ${used[1]}, {NEW_ID}; for checkpoints use "
                "$ELASTIC_HPC_RUN_DIR or a fixed folder"
            )


def _of_joiners(request: Request, configuration: Configuration, launch: LaunchSpec) -> tuple[Given, ...]:
    """The options for joiners. Without --grow, ignores options of configuration files, and refuses others."""
    if launch.grow:
        return of_joiners(configuration.sbatch)
    typed = next((g for g in configuration.sbatch if is_for_joiners(g.name) and g.source == request.source), None)
    if typed:
        raise UsageError(f"{typed}: is for the jobs that --grow submits; add --grow, or leave it out")
    return ()


def _container(options: Mapping[str, Setting], work_dir: str, log_dir: str) -> Container | None:
    image, mounts, runtime = (options.get(f"container-{name}") for name in ("image", "mounts", "runtime"))
    if not image:
        return None
    for folder in (work_dir, log_dir):
        if set(folder) & set(',:"'):
            raise UsageError(
                f"{folder!r} with --container-image: a folder with a comma, a colon or a quote in its name cannot be "
                "mounted; use another one, see --chdir and --log-dir"
            )
    decided = "apptainer" if image.value.endswith(".sif") else "pyxis"
    box = Container(image.value, runtime.value if runtime else decided, mounts.value if mounts else None)
    if box.runtime != "oci":
        return box
    if box.mounts:
        raise UsageError(
            f"--container-mounts {box.mounts} with --container-runtime oci: an OCI bundle says in its own config.json "
            "which folders are mounted; add them there"
        )
    return replace(box, image=os.path.abspath(box.image))


def _in_snapshot(request: Request, place: Place, code: WorkTree | None) -> str:
    """The script as the job finds it in the copy of the code."""
    if request.folder != "" or isinstance(place.script, Shell):
        raise UsageError("--snapshot: where the batch script changes to, there is no copy; leave it out")
    if not code:
        raise UsageError(
            f"--snapshot: {place.work_dir} is in no work tree of git, or git cannot be asked; leave it out"
        )
    if request.module or (request.no_python and os.sep not in place.script):
        return place.script
    return f"./{code.script(place.script)}" if request.no_python else code.script(place.script)


def _job_name(configuration: Configuration, launch: LaunchSpec) -> list[Given]:
    """The option that names the job after its script, if no other name is given."""
    if any(given.name == "job-name" for given in configuration.sbatch) or isinstance(launch.script, Shell):
        return []
    path = Path(launch.script)
    name = launch.script if launch.module else path.name if launch.no_python else path.stem
    return [Given(SBATCH["job-name"], re.sub(r"[\x00-\x1f\x7f]", "_", name), NAME_OF_SCRIPT)]


def _warning(given: str | None, grace: timedelta) -> WarningSignal:
    """The signal before the end of the job: by --signal, else early enough to give the workers --grace."""
    lead, longest = grace + AFTER_GRACE, timedelta(seconds=LONGEST_LEAD)
    if lead > longest and "@" not in (given or ""):
        raise UsageError(
            f"--grace {durations.as_text(grace)}: the workers get the warning {durations.as_text(lead)} s before the "
            f"end of the job, and Slurm's --signal takes at most {LONGEST_LEAD} s; expected at most "
            f"{durations.as_text(longest - AFTER_GRACE)} s"
        )
    return WarningSignal.parse(given, lead) if given else WarningSignal(lead=lead)
