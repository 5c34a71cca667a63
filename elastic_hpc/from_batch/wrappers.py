"""What precedes the program in a launch: variables, srun, a container, a runner such as uv. Pure."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from elastic_hpc.errors import UsageError
from elastic_hpc.from_batch.variables import ASSIGNS, Variables
from elastic_hpc.options.sbatch import SBATCH, Given, Option, scan

_SRUN = (
    *(Option(name, value="") for name in ("unbuffered", "overlap", "exact", "multi-prog", "interactive")),
    *(Option(name) for name in ("mpi", "cpu-bind", "jobid", "task-prolog", "task-epilog", "prolog", "epilog")),
    *(Option(name) for name in ("accel-bind", "het-group", "bcast-exclude", "slurmd-debug", "treewidth")),
    *(Option(name, letter, value) for name, letter, value in (
        ("label", "l", ""), ("unbuffered", "u", ""), ("wait", "W", "="), ("threads", "T", "="), ("relative", "r", "="),
        ("disable-status", "X", ""), ("preserve-env", "E", ""), ("pty", "", "[=]"), ("bcast", "", "[=]"),
        ("quit-on-interrupt", "", ""), ("immediate", "I", "[=]"),
        ("compress", "", "[=]"), ("send-libs", "", "[=]"), ("no-allocate", "Z", ""),
    )),
    *(Option(f"container-{name}") for name in ("image", "mounts", "workdir", "name", "env", "save")),
    *(Option(f"{no}container-{name}", value="") for no in ("", "no-") for name in (
        "writable", "readonly", "mount-home", "remap-root", "entrypoint",
    )),
)  # fmt: skip
"""srun's options that sbatch does not have, and pyxis's options."""

_APPTAINER = (
    *(Option(name, letter) for name, letter in (("bind", "B"), ("home", "H"), ("workdir", "W"), ("scratch", "S"))),
    *(Option(name) for name in ("env", "env-file", "pwd", "cwd", "mount", "network", "overlay", "fusemount", "app")),
    *(Option(name, letter, "") for name, letter in (
        ("nv", ""), ("nvccli", ""), ("rocm", ""), ("cleanenv", "e"), ("contain", "c"), ("containall", "C"),
        ("fakeroot", "f"), ("writable", "w"), ("writable-tmpfs", ""), ("no-home", ""), ("pid", "p"), ("ipc", "i"),
    )),
)  # fmt: skip
_RUNNERS = {
    "uv": {"with", "project", "python", "extra", "group", "directory", "env-file", "with-requirements"},
    "conda": {"n", "name", "p", "prefix", "cwd"},
    "mamba": {"n", "name", "p", "prefix", "cwd"},
    "micromamba": {"n", "name", "p", "prefix", "cwd"},
    "poetry": set(),
    "pixi": {"e", "environment", "manifest-path"},
}
OF_RENDEZVOUS = re.compile(
    r"((MASTER|RDZV|RENDEZVOUS|HEAD_NODE)_\w+|HEAD_NODE|WORLD_SIZE|((NODE|LOCAL|MACHINE)_)?RANK|NODES_ARRAY)",
    re.IGNORECASE,
)
"""Variables by which the nodes or the workers of a job find each other."""
_WHICH = re.compile(r"""["']?(?:\$\(|`)\s*(?:which|command -v|type -[pP])\s+(\S+?)\s*[)`]["']?""")
SET_BY_AGENTS = "the agents set it for each worker"


@dataclass(frozen=True)
class Launch:
    """A launch, and what precedes it."""

    kind: str = ""
    """``torchrun``, ``accelerate`` or ``python``."""
    script: str = ""
    script_args: tuple[str, ...] = ()
    """Script and arguments as written for a shell."""
    module: bool = False
    no_python: bool = False
    options: tuple[tuple[str, str], ...] = ()
    """Our options by name, and their values."""
    by_srun: bool = False
    srun: tuple[Given, ...] = ()
    setup: tuple[str, ...] = ()
    """Set-up lines from the line of the launch: variables set for it, commands before it in the same shell."""
    notes: tuple[str, ...] = ()

    def with_note(self, text: str) -> Launch:
        return replace(self, notes=(*self.notes, text))

    def with_setup(self, line: str) -> Launch:
        return replace(self, setup=(*self.setup, line))

    def with_option(self, name: str, value: str) -> Launch:
        return replace(self, options=(*self.options, (name, value)))


def unwrapped(words: Sequence[str], variables: Variables) -> tuple[Launch, list[str]]:
    """What precedes the program in ``words``, and the rest: the program and its arguments."""
    rest, launch = variables.expand(words), Launch()
    while rest:
        name = posixpath.basename(program_of(rest[0], variables))
        if match := ASSIGNS.fullmatch(rest[0]):
            if OF_RENDEZVOUS.fullmatch(match[1]):
                launch = launch.with_note(f"dropped {match[1]}: {SET_BY_AGENTS}")
            else:
                launch = launch.with_setup(f"export {rest[0]}")
            rest = rest[1:]
        elif name not in _UNWRAP or (step := _UNWRAP[name](launch, rest, variables)) is None:
            break
        else:
            launch, rest = step
    return launch, rest


def program_of(word: str, variables: Variables) -> str:
    """The program that ``word`` runs: torchrun for ``$(which torchrun)``."""
    if match := _WHICH.fullmatch(word):
        return match[1]
    return variables.resolve(word) or word


_Unwrapped = tuple[Launch, list[str]] | None


def _plain(launch: Launch, words: list[str], _: Variables) -> _Unwrapped:
    return launch, words[2 if words[:2] == ["time", "-p"] else 1 :]


def _env(launch: Launch, words: list[str], _: Variables) -> _Unwrapped:
    if len(words) > 1 and words[1].startswith("-"):
        raise UsageError(f"env {words[1]}: not supported; set variables with export above the launch")
    return launch, words[1:]


def _srun(launch: Launch, words: list[str], variables: Variables) -> _Unwrapped:
    given, rest = scan(variables.known(words[1:]), _SRUN, tuple(o for o in SBATCH.values() if o.name != "wait"))
    if any(option.name in {"multi-prog", "het-group"} for option in given) or ":" in rest:
        raise UsageError("srun with several commands: expected one, which all nodes run")
    for option in given:
        if option.name == "export":
            for pair in (option.value or "").split(","):
                variable, equals, value = pair.partition("=")
                if equals:
                    launch = launch.with_setup(f"export {variable}={_assignable(value, option.value or '', variables)}")
        elif option.name in {"container-image", "container-mounts"}:
            launch = launch.with_option(option.name, option.value or "")
        elif option.name == "container":
            launch = launch.with_option("container-image", option.value or "")
        elif "container" in option.name:
            launch = launch.with_note(f"dropped {option.flag} of srun: --container-image is all that is needed")
    for name, runtime in ("container-image", "pyxis"), ("container", "oci"):
        if any(option.name == name for option in given):
            launch = launch.with_note(_IN_IMAGE).with_option("container-runtime", runtime)
    launch = replace(launch, by_srun=True, srun=(*launch.srun, *given))
    return launch, list(words[len(words) - len(rest) :])


def _assignable(value: str, whole: str, variables: Variables) -> str:
    """``value``, a part of the option's value ``whole``, as the right side of an assignment."""
    if not re.search(r"[$`]", whole):
        return shlex.quote(value)
    known = variables.resolve(value)
    return shlex.quote(known) if known is not None else value if re.search("[\"']", value) else f'"{value}"'


_IN_IMAGE = "agents and workers run in the container, in which elastic_hpc must be installed"


def _apptainer(launch: Launch, words: list[str], variables: Variables) -> _Unwrapped:
    if words[1:2] not in (["exec"], ["run"]):
        return None
    given, rest = scan(variables.known(words[2:]), _APPTAINER, ())
    if not rest:
        return None
    mounts = [option.value or "" for option in given if option.name == "bind"]
    for option in given:
        if option.name == "env":
            launch = launch.with_setup(f"export {option.value}")
        elif option.name not in {"bind", "nv", "rocm", "pwd", "cwd"}:
            launch = launch.with_note(f"dropped {option.flag} of {words[0]}: the agents do not need it")
    launch = launch.with_option("container-image", rest[0]).with_option("container-runtime", "apptainer")
    if mounts:
        pairs = [mount if ":" in mount else f"{mount}:{mount}" for bind in mounts for mount in bind.split(",")]
        launch = launch.with_option("container-mounts", ",".join(pairs))
    return launch.with_note(_IN_IMAGE), list(words[len(words) - len(rest) + 1 :])


def _runner(launch: Launch, words: list[str], variables: Variables) -> _Unwrapped:
    name, rest = posixpath.basename(variables.resolve(words[0]) or words[0]), words[1:]
    while rest and rest[0] != "run":
        rest = rest[1:]
    rest = rest[1:]
    while rest and rest[0].startswith("-"):
        has_value = rest[0].lstrip("-") in _RUNNERS[name]
        rest = rest[2 if has_value else 1 :]
    note = f"dropped {name} run: agents and workers run with elastic-sbatch's Python; --python PATH chooses another"
    return launch.with_note(note), rest


_UNWRAP: dict[str, Callable[[Launch, list[str], Variables], _Unwrapped]] = {
    **dict.fromkeys(("exec", "nohup", "time", "command"), _plain),
    **dict.fromkeys(_RUNNERS, _runner),
    "env": _env,
    "srun": _srun,
    "apptainer": _apptainer,
    "singularity": _apptainer,
}
