"""The batch script: the one ``srun`` line, quoting for bash and for sbatch, the Jinja2 templates. Reads templates."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_hpc import __version__
from elastic_hpc.errors import UsageError
from elastic_hpc.job.commands import Container, agent_command, srun_options, torchrun_command
from elastic_hpc.job.config import Setting
from elastic_hpc.job.quoting import Shell, comment, directive, quote, quote_all
from elastic_hpc.job.snapshot import WorkTree
from elastic_hpc.options.sbatch import Given, WarningSignal
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.table import NOT_FOR_TORCHRUN
from elastic_hpc.start import module_command

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from elastic_hpc.job.typed import JobOptions

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class JobSpec:
    """A batch job, complete: ``render`` needs nothing else."""

    launch: LaunchSpec
    log_dir: str  # absolute
    sbatch: tuple[Given, ...] = ()  # passed through
    signal: WarningSignal = WarningSignal()
    setup: tuple[Setting, ...] = ()
    env: Mapping[str, Setting] = field(default_factory=dict)
    template: str = "elastic"  # built in, or the path of a file
    python: str = sys.executable  # absolute; a virtual environment's own link, not what it points to
    agent_python: tuple[str, ...] | None = None  # of agents and workers, words; None: the same, in a container python3
    container: Container | None = None
    code: WorkTree | None = None  # what git says of it is recorded
    snapshot: bool = False  # a copy of it runs
    token: str = "TOKEN"  # noqa: S105 - names what is put aside for this job, when it is submitted
    torchrun: tuple[str, ...] = ()  # options of torchrun's that only the template of that name needs
    sources: Mapping[str, str] = field(default_factory=dict)  # long option -> where its value came from
    notes: tuple[str, ...] = ()  # what was asked for and is not taken, a line each

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

        ``options`` are long options of elastic-sbatch and of sbatch, with ``_`` for ``-``; ``sbatch`` has those that
        only a newer sbatch knows. None is not given; True and False are a switch that is and is not. Times are a
        timedelta, seconds where elastic-sbatch has seconds, or in sbatch's own notation. A list is what sbatch
        separates by commas. Raises UsageError, a ValueError too, as the command would refuse.
        """
        from elastic_hpc.job.request import from_names

        return from_names(
            script,
            script_args,
            module=module,
            no_python=no_python,
            setup=setup,
            env=env,
            options=options,
            sbatch=sbatch,
        )

    @property
    def staged(self) -> str:
        """Where the code is put aside until the job starts."""
        return f"{self.log_dir}/.submission.{self.token}"

    @property
    def asks_for_gpus(self) -> bool:
        return any(g.name.startswith("gpus") or (g.name == "gres" and "gpu" in str(g.value)) for g in self.sbatch)

    def has(self, name: str) -> bool:
        """Whether the sbatch option ``name`` is passed through."""
        return any(given.name == name for given in self.sbatch)

    def settings(self) -> list[tuple[str, str, str]]:
        """Every setting of ours as (name, value, where it came from)."""
        rows = [*self.launch.options(), ("--log-dir", self.log_dir), ("--template", self.template)]
        if self.template == "torchrun":
            unknown = [f"--{name}" for name in NOT_FOR_TORCHRUN] + ["--log-dir"] * ("log-dir" not in self.sources)
            rows = [row for row in rows if row[0] not in unknown]
        rows += [("--python", shlex.join(self.agent_python))] if self.agent_python else []
        if self.container:
            rows += [("--container-image", self.container.image), ("--container-runtime", self.container.runtime)]
            rows += [("--container-mounts", self.container.mounts)] if self.container.mounts else []
        rows += [("--snapshot", "on")] if self.snapshot else []
        shown = [(flag, text, self.sources.get(flag.removeprefix("--"), "default")) for flag, text in rows]
        shown += [("--setup", line.value, line.source) for line in self.setup]
        shown += [("--env", f"{name}={value.value}", value.source) for name, value in self.env.items()]
        return shown


def template_folder() -> Path:
    """The built-in templates: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent.parent
    packaged = package / "slurm_templates"
    return packaged if packaged.is_dir() else package.parent / "slurm_templates"


def built_in_templates() -> list[str]:
    return sorted(path.name.removesuffix(".sbatch.j2") for path in template_folder().glob("*.sbatch.j2"))


def _words(job: JobSpec) -> dict[str, Any]:
    """What a template has of commands."""
    head, run_dir = Shell('"$head_node"'), Shell('"$run_dir"')
    srun = srun_options(
        Shell('"$SLURM_JOB_NUM_NODES"'), Shell('"$SLURM_CPUS_PER_TASK"') if job.has("cpus-per-task") else None
    )
    box, python = job.container, job.agent_python or ("python3" if job.container else job.python,)
    agent = agent_command(job.launch, head=head, run_dir=run_dir, python=python, contained=box is not None)
    torchrun = torchrun_command(
        job.launch,
        head=head,
        job_id=Shell('"$SLURM_JOB_ID"'),
        python=python,
        log_dir=job.log_dir if "log-dir" in job.sources else None,
        others=job.torchrun,
    )
    if box:
        folders = "$PWD:$PWD" + (",$run_dir:$run_dir" if job.template != "torchrun" else "")
        srun += box.srun_options(folders, job.env)
        agent = box.around(agent, folders, gpus=job.asks_for_gpus)
        torchrun = box.around(torchrun, folders, gpus=job.asks_for_gpus)
    return {"python": job.python, "srun_options": srun, "agent_command": agent, "torchrun_command": torchrun}


@functools.cache
def _templates(folder: Path) -> Any:
    """The environment of the templates in ``folder``, over the built-in ones: a program that submits many jobs compiles
    each once, and again when its file has changed.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, template_folder()]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  (the output is a shell script; `quote` is applied to every value)
    )
    environment.filters.update(quote=quote, quote_all=quote_all, comment=comment)
    environment.globals.update(directive=directive, module_command=module_command)
    return environment


def render(job: JobSpec) -> str:
    """The batch script of ``job``. UsageError if a template is missing or broken, or a value does not fit."""
    import jinja2

    path = Path(job.template)
    if job.template in built_in_templates():
        path = template_folder() / f"{job.template}.sbatch.j2"
    elif not path.is_file():
        known = ", ".join(built_in_templates())
        raise UsageError(f"--template {job.template!r}: expected {known}, or a file that exists")
    try:
        template = _templates(path.parent).get_template(path.name)
        text: str = template.render(version=__version__, job=job, launch=job.launch, **_words(job))
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"--template {job.template}: line {error.lineno}: {error.message}") from None
    except jinja2.TemplateError as error:
        raise UsageError(f"--template {job.template}: {error.message}") from None
    except OSError as error:
        raise UsageError(f"--template {job.template}: {error.strerror}") from None
    return text
