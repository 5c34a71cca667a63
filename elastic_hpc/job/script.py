"""The batch script: the one ``srun`` line, quoting for bash and for sbatch, the Jinja2 templates. Reads templates."""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_hpc import __version__
from elastic_hpc.errors import UsageError
from elastic_hpc.job.config import Setting
from elastic_hpc.job.snapshot import WorkTree
from elastic_hpc.options.sbatch import Given, WarningSignal
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.table import NOT_FOR_TORCHRUN
from elastic_hpc.options.values import RdzvConf
from elastic_hpc.start import module_command

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from elastic_hpc.job.typed import JobOptions

COMMAND_LINE = "command line"
_LINE_LENGTH = 110


class Shell(str):
    """Text that is shell syntax already, such as ``"$run_dir"`` with its quotes: never quoted again."""

    __slots__ = ()


@dataclass(frozen=True)
class Container:
    """What the agents and their workers run in. The batch script stays outside, where Slurm's commands are."""

    image: str
    runtime: str = "pyxis"  # a plugin of srun; or apptainer, a command in front of the agent's
    mounts: str | None = None  # SRC:DST[:FLAGS],... besides the working directory and the run directory

    def srun_options(self, folders: str, env: Collection[str]) -> list[str]:
        """``folders``: "SRC:DST,..." for bash. ``env``: variables that count more than those of the image."""
        if self.runtime != "pyxis":
            return []
        options = [f"--container-image={self.image}", _join("--container-mounts=", self._mounts(folders))]
        options.append(Shell('--container-workdir="$PWD"'))
        return [*options, *([f"--container-env={','.join(env)}"] if env else [])]

    def around(self, command: Sequence[str], folders: str, *, gpus: bool) -> list[str]:
        """``command``, which runs in it. For apptainer ``env`` is exported under other names (prepare.j2)."""
        if self.runtime == "pyxis":
            return list(command)
        words = ["apptainer", "exec", "--bind", self._mounts(folders), "--pwd", Shell('"$PWD"')]
        return [*words, *(["--nv"] if gpus else []), self.image, *command]

    def _mounts(self, folders: str) -> Shell:
        return Shell(f'"{folders}"' + (f",{quote(self.mounts)}" if self.mounts else ""))


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


def _join(prefix: str, value: str, suffix: str = "") -> str:
    """``prefix + value + suffix`` as one word; still shell syntax if ``value`` is. Prefix and suffix need no quotes."""
    text = f"{prefix}{value}{suffix}"
    return Shell(text) if isinstance(value, Shell) else text


def srun_options(nodes: str, cpus_per_task: str | None = None) -> list[str]:
    """Options of srun for one agent per node that outlives other nodes, for elastic-srun and the script alike.

    ``cpus_per_task`` where the job asked for it: srun does not take it over from sbatch since Slurm 22.05.
    """
    options = [
        _join("--nodes=", nodes),
        _join("--ntasks=", nodes),
        "--ntasks-per-node=1",
        "--no-kill",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--cpu-bind=none",
    ]
    if cpus_per_task is not None:
        options.append(_join("--cpus-per-task=", cpus_per_task))
    return options


def agent_command(
    launch: LaunchSpec,
    *,
    head: str,
    run_dir: str,
    python: Sequence[str],
    can_requeue: bool = True,
    contained: bool = False,
) -> list[str]:
    """The command each agent runs. ``head`` hosts the rendezvous unless the user named a host. ``contained``: in a
    container, where Slurm's commands are not.
    """
    words = module_command(python, "elastic_hpc.agent", unbuffered=True)
    for flag, value in launch.options():
        if flag == "--rdzv-endpoint" and launch.rdzv_endpoint.head is None:
            words += [flag, _join("", head, f":{launch.rdzv_endpoint.port}")]
        else:
            words += [flag, value]
    if not can_requeue:
        words.append("--no-requeue")
    if contained:
        words.append("--contained")
    return [*words, "--run-dir", run_dir, *launch.command()]


def torchrun_command(job: JobSpec, *, head: str, job_id: str, python: Sequence[str]) -> list[str]:
    """The quickstart's own command for the same job."""
    launch, endpoint = job.launch, job.launch.rdzv_endpoint
    words = module_command(python, "torch.distributed.run", f"--nnodes={launch.nodes}", unbuffered=True)
    words += [f"--nproc-per-node={launch.nproc_per_node}"] if launch.nproc_per_node else []
    words += [
        f"--max-restarts={launch.max_restarts}",
        _join("--rdzv-id=", launch.rdzv_id or job_id),
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}" if endpoint.head else _join("--rdzv-endpoint=", head, f":{endpoint.port}"),
    ]
    same = {
        "rdzv-conf": str(launch.rdzv_conf) if launch.rdzv_conf != RdzvConf() else None,
        "role": launch.role,
        "local-ranks-filter": launch.local_ranks_filter,
        "numa-binding": launch.numa_binding,
        "log-dir": job.log_dir if "log-dir" in job.sources else None,
    }
    words += [f"--{name}={value}" for name, value in same.items() if value is not None]
    return [*words, *job.torchrun, *launch.command()]


def quote(word: str) -> str:
    """``word`` as bash reads it back byte for byte, on one line and in valid UTF-8 whatever its bytes."""
    if isinstance(word, Shell):
        return word
    if not re.search(r"[\x00-\x1f\x7f\udc80-\udcff]", word):
        return shlex.quote(word)
    named = {"\n": r"\n", "\t": r"\t", "\r": r"\r", "'": r"\'", "\\": r"\\"}

    def escaped(char: str) -> str:
        if re.match(r"[\x00-\x1f\x7f\udc80-\udcff]", char):  # the last: a byte that is not UTF-8
            return rf"\x{ord(char) & 0xFF:02x}"
        return char

    return "$'" + "".join(named.get(char) or escaped(char) for char in word) + "'"


def quote_all(words: Sequence[str], indent: int = 2) -> str:
    """``words`` quoted for bash, folded with backslashes into lines of readable length."""
    lines, line = [], ""
    for word in map(quote, words):
        if line and len(line) + 1 + len(word) > _LINE_LENGTH - indent:
            lines.append(line)
            line = ""
        line += f" {word}" if line else word
    return f" \\\n{' ' * indent}".join([*lines, line])


def directive(option: str, value: object = None, reason: str = "") -> str:
    """An ``#SBATCH`` line. sbatch has its own quoting there: double quotes, backslashes, and ``#`` begins a comment."""
    text = option
    if value is not None:
        given = str(value)
        if re.search(r"[\x00-\x1f\x7f]", given):
            raise UsageError(f"{option}={given!r}: expected one line without control characters")
        if not re.fullmatch(r"[\w@%+=:,./^*-]+", given, re.ASCII):
            given = '"' + re.sub(r'(["\\])', r"\\\1", given) + '"'
        text += f"={given}"
    return f"#SBATCH {text:<32} # {comment(reason)}" if reason else f"#SBATCH {text}"


def comment(text: str) -> str:
    """``text`` on one line, fit for a comment."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


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
    torchrun = torchrun_command(job, head=head, job_id=Shell('"$SLURM_JOB_ID"'), python=python)
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
