"""The command of a batch script that starts the training: ``srun torchrun ... train.py``, and what is in front of it.
Pure.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from elastic_hpc.errors import UsageError
from elastic_hpc.sbatch_options import SBATCH, Given, Option, last, scan
from elastic_hpc.shell_text import statements, tokens
from elastic_hpc.torchrun_options import torchrun_options

_SRUN = (
    *(Option(name, value="") for name in ("unbuffered", "overlap", "exact", "multi-prog", "interactive", "het-group")),
    *(Option(name) for name in ("mpi", "cpu-bind", "jobid", "task-prolog", "task-epilog", "prolog", "epilog")),
    *(Option(name, letter, value) for name, letter, value in (
        ("label", "l", ""), ("unbuffered", "u", ""), ("wait", "W", "="), ("threads", "T", "="), ("relative", "r", "="),
        ("disable-status", "X", ""), ("preserve-env", "E", ""), ("pty", "", "[=]"), ("bcast", "", "[=]"),
    )),
    *(Option(f"container-{name}") for name in ("image", "mounts", "workdir", "name", "env", "save")),
    *(Option(f"{no}container-{name}", value="") for no in ("", "no-") for name in (
        "writable", "readonly", "mount-home", "remap-root", "entrypoint",
    )),
)  # fmt: skip
"""Those that sbatch does not have, with pyxis'."""

_APPTAINER = (
    *(Option(name, letter) for name, letter in (("bind", "B"), ("home", "H"), ("workdir", "W"), ("scratch", "S"))),
    *(Option(name) for name in ("env", "env-file", "pwd", "cwd", "mount", "network", "overlay", "fusemount", "app")),
    *(Option(name, letter, "") for name, letter in (
        ("nv", ""), ("nvccli", ""), ("rocm", ""), ("cleanenv", "e"), ("contain", "c"), ("containall", "C"),
        ("fakeroot", "f"), ("writable", "w"), ("writable-tmpfs", ""), ("no-home", ""), ("pid", "p"), ("ipc", "i"),
    )),
)  # fmt: skip
_ACCELERATE = (
    *(Option(name) for name in ("num-processes", "num-machines", "machine-rank", "main-process-ip", "max-restarts")),
    *(Option(name) for name in ("main-process-port", "rdzv-backend", "rdzv-conf", "monitor-interval", "role", "tee")),
    *(Option(name) for name in ("mixed-precision", "dynamo-backend")),
    *(Option(name, value="") for name in ("multi-gpu", "same-network", "quiet", "debug", "cpu")),
    Option("module", "m", ""),
)
_RUNNERS = {
    "uv": {"with", "project", "python", "extra", "group", "directory", "env-file", "with-requirements"},
    "conda": {"n", "name", "p", "prefix", "cwd"},
    "mamba": {"n", "name", "p", "prefix", "cwd"},
    "micromamba": {"n", "name", "p", "prefix", "cwd"},
    "poetry": set(),
    "pixi": {"e", "environment", "manifest-path"},
}
_OTHERS = {
    "mpirun": "MPI starts it",
    "mpiexec": "MPI starts it",
    "deepspeed": "DeepSpeed's launcher starts it over ssh",
    "shifter": "a Shifter container runs it; expected pyxis (srun --container-image) or apptainer exec",
    "podman-hpc": "a podman-hpc container runs it; expected pyxis (srun --container-image) or apptainer exec",
}
_ASSIGNS = re.compile(r"(\w+)(\+?=)(.*)", re.DOTALL)


class Variables:
    """What is known of a shell's variables: the assignments of the script, and the environment that it is given."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = {k: v for k, v in environ.items() if not k.startswith("SLURM_")}
        self._assigned: dict[str, str] = {}

    def assign(self, text: str) -> None:
        """``text``: NAME=VALUE as it is written."""
        if match := _ASSIGNS.fullmatch(text):
            name, how, value = match.groups()
            before = self._assigned.get(name, "") if how == "+=" else ""
            both_lists = before.startswith("(") and value.startswith("(")
            self._assigned[name] = before[:-1] + " " + value[1:] if both_lists else before + value

    def resolve(self, word: str, depth: int = 5) -> str | None:
        """The text of ``word``, which is written as for a shell; None if only running the script would tell."""
        found, at, quoted = "", 0, False
        while at < len(word):
            char = word[at]
            if char == '"':
                quoted, at = not quoted, at + 1
            elif char == "'" and not quoted:
                end = word.index("'", at + 1)
                found, at = found + word[at + 1 : end], end + 1
            elif char == "\\":
                keeps = quoted and word[at + 1 : at + 2] not in {"$", '"', "\\", "`"}
                found, at = found + (char if keeps else "") + word[at + 1 : at + 2].replace("\n", ""), at + 2
            elif match := re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^{}$]*))?\})").match(word, at):
                value = self._value(match[1] or match[2], depth)
                value = match[3] if value is None else value
                if value is None:
                    return None
                found, at = found + value, match.end()
            elif char in "$`" or (char in "*?[{" and not quoted):
                return None
            elif word.startswith("~/") and at == 0 and "HOME" in self._environ:
                found, at = self._environ["HOME"], 1
            else:
                found, at = found + char, at + 1
        return found

    def _value(self, name: str, depth: int) -> str | None:
        if name == "SLURM_SUBMIT_DIR":
            return self._environ.get("PWD")
        if name in self._assigned:
            return self.resolve(self._assigned[name], depth - 1) if depth else None
        return self._environ.get(name)

    def expand(self, words: Sequence[str], depth: int = 5) -> list[str]:
        """``words`` with variables that hold several words, such as ``$LAUNCHER`` or ``"${args[@]}"``, in place."""
        found: list[str] = []
        for word in words:
            match = re.fullmatch(r'"?\$(?:(\w+)|\{(\w+)(?:\[[@*]\])?\})"?', word)
            value = self._assigned.get(match[1] or match[2], "") if match else ""
            if depth and value[:1] in {'"', "'", "("} and re.search(r"\s|^\(", value):
                inner = value[1:-1]
                if value[0] == '"':
                    inner = re.sub(r'\\(["$`\\])', r"\1", inner)
                found += self.expand([token.text for token in tokens(inner) if token.is_word], depth - 1)
            else:
                found.append(word)
        return found

    def known(self, words: Sequence[str]) -> list[str]:
        """Each as far as that is known; else as it is written."""
        return [_bare(word) if (text := self.resolve(word)) is None else text for word in words]


def _bare(word: str) -> str:
    """``"--nnodes=$N"`` without its quotes, so that it can be seen to be an option."""
    return word[1:-1] if word[:1] == word[-1:] == '"' and word.count('"') == 2 else word


@dataclass(frozen=True)
class Launch:
    """A launch, and what has been found in front of it."""

    kind: str = ""
    """``torchrun``, ``accelerate`` or ``python``."""
    script: str = ""
    script_args: tuple[str, ...] = ()
    """Both as they are written for a shell."""
    module: bool = False
    no_python: bool = False
    options: tuple[tuple[str, str], ...] = ()
    """Of ours, by name."""
    by_srun: bool = False
    srun: tuple[Given, ...] = ()
    setup: tuple[str, ...] = ()
    """Lines that were part of it: variables set for it, and what ran before it in the same shell."""
    notes: tuple[str, ...] = ()


def launch_of(words: Sequence[str], variables: Variables) -> Launch | None:
    """What ``words`` launch; None if nothing. UsageError if it is a launch of a kind that is not understood."""
    words, launch = variables.expand(words), Launch()
    while words:
        first = variables.resolve(words[0]) or words[0]
        name = os.path.basename(first)
        if _ASSIGNS.fullmatch(words[0]):
            launch, words = _with(launch, setup=f"export {words[0]}"), words[1:]
        elif name in _UNWRAP:
            step = _UNWRAP[name](launch, words, variables)
            if step is None:
                return None
            launch, words = step
        elif name in _OTHERS:
            raise UsageError(f"{first}: {_OTHERS[name]}, which is not understood here")
        elif name in {"bash", "sh", "zsh"}:
            return _of_shell(launch, words, variables)
        elif name in {"torchrun", "torchrun_jsc"}:
            return _torchrun(_interpreter(launch, first), words[1:], variables)
        elif name == "accelerate" and words[1:2] == ["launch"]:
            return _accelerate(_interpreter(launch, first), words[2:], variables)
        elif re.fullmatch(r"python[\d.]*", name):
            return _python(_interpreter(launch, first), words[1:], variables)
        else:
            return None
    return None


def _with(launch: Launch, *, note: str = "", setup: str = "", option: tuple[str, str] | None = None) -> Launch:
    return replace(
        launch,
        notes=(*launch.notes, *([note] if note else [])),
        setup=(*launch.setup, *([setup] if setup else [])),
        options=(*launch.options, *([option] if option else [])),
    )


def _interpreter(launch: Launch, command: str) -> Launch:
    """One that is named by its path has that folder's interpreter."""
    if "/" not in command or "$" in command:
        return launch
    folder, name = os.path.split(command)
    python = command if name.startswith("python") else os.path.join(folder, "python")
    note = f"{command}: agents and workers run with {python}, where elastic_hpc must be installed"
    return _with(launch, note=note, option=("python", shlex.quote(python)))


_Step = tuple[Launch, list[str]] | None


def _plain(launch: Launch, words: list[str], _: Variables) -> _Step:
    return launch, words[1:]


def _env(launch: Launch, words: list[str], _: Variables) -> _Step:
    if len(words) > 1 and words[1].startswith("-"):
        raise UsageError(f"env {words[1]}: not understood here; set variables with export above the launch")
    return launch, words[1:]


def _srun(launch: Launch, words: list[str], variables: Variables) -> _Step:
    given, rest = scan(variables.known(words[1:]), _SRUN, tuple(o for o in SBATCH.values() if o.name != "wait"))
    if any(each.name == "multi-prog" for each in given):
        raise UsageError("srun --multi-prog: several programs are not one training")
    for each in given:
        if each.name == "export":
            for pair in (each.value or "").split(","):
                if "=" in pair:
                    launch = _with(launch, setup=f"export {pair}")
        elif each.name in {"container-image", "container-mounts"}:
            launch = _with(launch, option=(each.name, each.value or ""))
        elif "container" in each.name:
            launch = _with(launch, note=f"dropped {each.option.flag} of srun: --container-image is all that is needed")
    if any(each.name == "container-image" for each in given):
        launch = _with(launch, note=_IN_IMAGE, option=("container-runtime", "pyxis"))
    launch = replace(launch, by_srun=True, srun=(*launch.srun, *given))
    return launch, list(words[len(words) - len(rest) :])


_IN_IMAGE = "agents and workers run in the container, in which elastic_hpc must be installed"


def _apptainer(launch: Launch, words: list[str], variables: Variables) -> _Step:
    if words[1:2] not in (["exec"], ["run"]):
        return None
    given, rest = scan(variables.known(words[2:]), _APPTAINER, ())
    if not rest:
        return None
    mounts = [each.value or "" for each in given if each.name == "bind"]
    for each in given:
        if each.name == "env":
            launch = _with(launch, setup=f"export {each.value}")
        elif each.name not in {"bind", "nv", "rocm", "pwd", "cwd"}:
            launch = _with(launch, note=f"dropped {each.option.flag} of {words[0]}: not needed for the agents")
    for option in ("container-image", rest[0]), ("container-runtime", "apptainer"):
        launch = _with(launch, option=option)
    if mounts:
        pairs = [mount if ":" in mount else f"{mount}:{mount}" for each in mounts for mount in each.split(",")]
        launch = _with(launch, option=("container-mounts", ",".join(pairs)))
    return _with(launch, note=_IN_IMAGE), list(words[len(words) - len(rest) + 1 :])


def _runner(launch: Launch, words: list[str], variables: Variables) -> _Step:
    name, rest = os.path.basename(variables.resolve(words[0]) or words[0]), words[1:]
    while rest and rest[0] != "run":
        rest = rest[1:]
    rest = rest[1:]
    while rest and rest[0].startswith("-"):
        has_value = rest[0].lstrip("-") in _RUNNERS[name]
        rest = rest[2 if has_value else 1 :]
    note = f"dropped {name} run: agents and workers run with the interpreter of elastic-sbatch; --python is another"
    return _with(launch, note=note), rest


_UNWRAP: dict[str, Callable[[Launch, list[str], Variables], _Step]] = {
    **dict.fromkeys(("exec", "nohup", "time", "command"), _plain),
    **dict.fromkeys(_RUNNERS, _runner),
    "env": _env,
    "srun": _srun,
    "apptainer": _apptainer,
    "singularity": _apptainer,
}


def _of_shell(launch: Launch, words: list[str], variables: Variables) -> Launch | None:
    """``bash -c 'TEXT'``: the launch in it, and what comes before."""
    if len(words) < 3 or not re.fullmatch(r"-[a-z]*c", words[1]):
        return None
    text = words[2]
    if text[:1] == text[-1:] == "'" or text[:2] == "$'":
        inner = text[1:-1].replace("'\\''", "'")
    elif (expanded := variables.expand([text])) != [text]:
        inner = " ".join(expanded)
    else:
        inner = re.sub(r'\\(["$`\\])', r"\1", text[1:-1])
    found: Launch | None = None
    before: list[str] = []
    for statement in statements(inner):
        parts = [] if statement.compound else statement.parts()
        for _, part in parts:
            if found is None and (found := launch_of(part, variables)) is None and part:
                before.append(" ".join(part))
        if not parts and found is None:
            before.append(statement.text)
    if found is None:
        return None
    if before and any(name == "container-image" for name, _ in launch.options):
        raise UsageError(f"{before[0]!r} in the container, before the launch: expected it in the image, or use --setup")
    if len(words) > 3:
        raise UsageError(f"{words[0]} {words[1]} with arguments of its own: write the launch without it")
    seen = [*before, *found.setup, found.script, *found.script_args]
    if per_task := _OF_A_TASK.search(" ".join(seen)):
        raise UsageError(f"${per_task[0]}: of each task, and the agents are others; use RANK in the training script")
    return replace(
        found,
        options=(*launch.options, *found.options),
        by_srun=launch.by_srun or found.by_srun,
        srun=(*launch.srun, *found.srun),
        setup=(*launch.setup, *before, *found.setup),
        notes=(*launch.notes, *found.notes),
    )


_OF_A_TASK = re.compile("SLURM_(PROCID|NODEID|LOCALID|TASK_PID)")


def _torchrun(launch: Launch, words: list[str], variables: Variables) -> Launch:
    line = torchrun_options(variables.known(words))
    rest = words[len(words) - 1 - len(line.script_args) :]
    for shown, reason in line.dropped:
        launch = _with(launch, note=f"dropped {shown}: {reason}")
    for name, value in line.options:
        flag = f"--{'nnodes' if name == 'nodes' else name}={value}"
        if name == "max-restarts" and value == "0":
            launch = _with(launch, note=f"dropped {flag}: a lost node costs a restart here; see --max-restarts")
        elif name == "rdzv-endpoint":
            launch = _with(launch, note=f"dropped {flag}: each job finds its own")
        elif "$" in value or "`" in value:
            launch = _with(launch, note=f"dropped {flag}: {_UNKNOWN.get(name, 'its value is known only when it runs')}")
        elif name == "rdzv-conf":
            known = [pair for pair in value.split(",") if re.match("(join|last_call)_timeout=", pair)]
            if len(known) < len(value.split(",")):
                launch = _with(launch, note=f"dropped what is not join_timeout or last_call_timeout in {flag}")
            launch = _with(launch, option=(name, ",".join(known))) if known else launch
        else:
            launch = _with(launch, option=(name, value))
    launch = replace(launch, kind="torchrun", module=line.module, no_python=line.no_python)
    return replace(launch, script=rest[0], script_args=tuple(rest[1:]))


_UNKNOWN = {
    "nodes": "all nodes of the job take part",
    "nproc-per-node": "one worker per GPU is what is done without it, one where there are none",
}


def _accelerate(launch: Launch, words: list[str], variables: Variables) -> Launch:
    try:
        given, script = scan(variables.known(words), _ACCELERATE, ())
    except UsageError as error:
        raise UsageError(
            f"accelerate launch: {error}; what it sets for the script, torchrun would not: set it in the script, "
            "for example with Accelerator(...), and submit that: elastic-sbatch --nodes MIN:MAX SCRIPT"
        ) from None
    if not script:
        raise UsageError("accelerate launch: expected a script after its options")
    processes, machines = last(given, "num-processes") or "", last(given, "num-machines") or "1"
    if machines.isdecimal():
        launch = _with(launch, option=("nodes", machines))
        if processes.isdecimal() and int(processes) % int(machines) == 0:
            launch = _with(launch, option=("nproc-per-node", str(int(processes) // int(machines))))
    for each in given:
        if each.name == "mixed-precision":
            launch = _with(launch, setup=f"export ACCELERATE_MIXED_PRECISION={each.value}")
        elif each.name == "max-restarts":
            launch = _with(launch, option=("max-restarts", each.value or ""))
        elif each.name == "dynamo-backend" and each.value != "no":
            launch = _with(launch, setup=f"export ACCELERATE_DYNAMO_BACKEND={(each.value or '').upper()}")
    rest = words[len(words) - len(script) :]
    module = any(each.name == "module" for each in given)
    launch = _with(launch, note="accelerate launch is replaced by the agents; what it would set for the ranks is set")
    return replace(launch, kind="accelerate", script=rest[0], script_args=tuple(rest[1:]), module=module)


def _python(launch: Launch, words: list[str], variables: Variables) -> Launch | None:
    while words and words[0].startswith("-") and words[0] not in {"-m", "-c", "-"}:
        if words[0] != "-u":
            launch = _with(launch, note=f"dropped {words[0]} of python: use its variable, see python --help-env")
        words = words[2 if words[0] in {"-X", "-W"} else 1 :]
    if words[:1] == ["-m"] and len(words) > 1:
        if words[1] in {"torch.distributed.run", "torch.distributed.launch", "torchrun_jsc"}:
            return _torchrun(launch, words[2:], variables)
        if words[1] == "accelerate.commands.launch":
            return _accelerate(launch, words[2:], variables)
        return replace(launch, kind="python", module=True, script=words[1], script_args=tuple(words[2:]))
    if not words or words[0] in {"-c", "-"}:
        return None
    return replace(launch, kind="python", script=words[0], script_args=tuple(words[1:]))
