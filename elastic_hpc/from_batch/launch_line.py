"""The command of a batch script that starts the training: ``srun torchrun ... train.py``, and what is in front of it.
Pure.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from elastic_hpc.errors import UsageError
from elastic_hpc.from_batch.shell_text import statements
from elastic_hpc.from_batch.variables import ASSIGNS, Variables, assigned, names
from elastic_hpc.options.sbatch import SBATCH, Given, Option, last, scan
from elastic_hpc.options.torchrun import OF_EACH_JOB, parse_command
from elastic_hpc.options.values import number

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
    "mpirun": "MPI starts the workers; expected torchrun, or python started with srun",
    "mpiexec": "MPI starts the workers; expected torchrun, or python started with srun",
    "deepspeed": "DeepSpeed's launcher starts the workers over ssh; expected torchrun, or python started with srun",
    "shifter": "Shifter containers are not supported; expected pyxis (srun --container-image) or apptainer exec",
    "podman-hpc": "podman-hpc containers are not supported; expected pyxis (srun --container-image) or apptainer exec",
}
OF_RENDEZVOUS = re.compile(
    r"((MASTER|RDZV|RENDEZVOUS|HEAD_NODE)_\w+|HEAD_NODE|WORLD_SIZE|((NODE|LOCAL|MACHINE)_)?RANK|NODES_ARRAY)",
    re.IGNORECASE,
)
"""Variables that tell the nodes or the workers of each other."""
_LAUNCHERS = re.compile(r"torchrun|torchrun_jsc|accelerate|python[\d.]*")
_WHICH = re.compile(r"""["']?(?:\$\(|`)\s*(?:which|command -v|type -[pP])\s+(\S+?)\s*[)`]["']?""")


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
    launch, words = _unwrapped(words, variables)
    if not words:
        return None
    first = _program(words[0], variables)
    name = os.path.basename(first)
    if name in _OTHERS:
        raise UsageError(f"{first}: {_OTHERS[name]}")
    if (inner := _text_of_shell(words, variables)) is not None:
        return _of_shell(launch, words, inner, variables)
    if name in {"torchrun", "torchrun_jsc"}:
        return _torchrun(_interpreter(launch, first), words[1:], variables)
    if name == "accelerate" and words[1:2] == ["launch"]:
        return _accelerate(_interpreter(launch, first), words[2:], variables)
    if re.fullmatch(r"python[\d.]*", name):
        return _python(_interpreter(launch, first), words[1:], variables)
    return None


def not_understood(words: Sequence[str], variables: Variables) -> str:
    """Why ``words``, which :func:`launch_of` takes for no launch, may be one all the same; empty if nothing speaks for
    it. ``{statement}`` stands for the whole line.
    """
    launch, words = _unwrapped(words, variables)
    if (inner := _text_of_shell(words, variables)) is not None:
        parts = [part for each in statements(inner) if not each.compound for _, part in each.parts()]
        return next(filter(None, (not_understood(part, variables) for part in reversed(parts))), "")
    programs = [_program(word, variables) for word in words]
    names_of = [os.path.basename(program) for program in programs]
    found = next((at for at, name in enumerate(names_of) if _LAUNCHERS.fullmatch(name)), 0)
    has_script = any(word.endswith(".py") or word == "-m" for word in programs[found + 1 :])
    if found and has_script and names_of[0] not in {"echo", "printf"}:
        what = "is known only when the batch script runs; leave it out, or write out its value"
        if "$" not in programs[0]:
            what = "is not supported; expected nothing but srun there, for example srun torchrun train.py"
        shown = programs[0] if "$" in programs[0] else repr(programs[0])
        return f"{shown} in front of {names_of[found]} {what}"
    runs_script = any(name.endswith(".sh") for name in names_of[:2]) and names_of[:1] not in (["source"], ["."])
    if launch.by_srun or runs_script:
        return "{statement} starts what is not looked into; expected torchrun, or srun python, in this file"
    return ""


def _unwrapped(words: Sequence[str], variables: Variables) -> tuple[Launch, list[str]]:
    """Without what is understood in front of the program: variables, srun, a container."""
    rest, launch = variables.expand(words), Launch()
    while rest:
        name = os.path.basename(_program(rest[0], variables))
        if match := ASSIGNS.fullmatch(rest[0]):
            if OF_RENDEZVOUS.fullmatch(match[1]):
                launch = _with(launch, note=f"dropped {match[1]}: {_EACH_HAS}")
            else:
                launch = _with(launch, setup=f"export {rest[0]}")
            rest = rest[1:]
        elif name not in _UNWRAP or (step := _UNWRAP[name](launch, rest, variables)) is None:
            break
        else:
            launch, rest = step
    return launch, rest


_EACH_HAS = "the agents set it for each worker"


def _program(word: str, variables: Variables) -> str:
    """What ``word`` runs; of ``$(which torchrun)`` that is torchrun."""
    if match := _WHICH.fullmatch(word):
        return match[1]
    return variables.resolve(word) or word


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
    return launch, words[2 if words[:2] == ["time", "-p"] else 1 :]


def _env(launch: Launch, words: list[str], _: Variables) -> _Step:
    if len(words) > 1 and words[1].startswith("-"):
        raise UsageError(f"env {words[1]}: not supported; set variables with export above the launch")
    return launch, words[1:]


def _srun(launch: Launch, words: list[str], variables: Variables) -> _Step:
    given, rest = scan(variables.known(words[1:]), _SRUN, tuple(o for o in SBATCH.values() if o.name != "wait"))
    if any(each.name in {"multi-prog", "het-group"} for each in given) or ":" in rest:
        raise UsageError("srun with several commands: expected one, which all nodes run")
    for each in given:
        if each.name == "export":
            for pair in (each.value or "").split(","):
                variable, equals, value = pair.partition("=")
                if equals:
                    launch = _with(launch, setup=f"export {variable}={_assignable(value, each.value or '', variables)}")
        elif each.name in {"container-image", "container-mounts"}:
            launch = _with(launch, option=(each.name, each.value or ""))
        elif "container" in each.name:
            launch = _with(launch, note=f"dropped {each.option.flag} of srun: --container-image is all that is needed")
    if any(each.name == "container-image" for each in given):
        launch = _with(launch, note=_IN_IMAGE, option=("container-runtime", "pyxis"))
    launch = replace(launch, by_srun=True, srun=(*launch.srun, *given))
    return launch, list(words[len(words) - len(rest) :])


def _assignable(value: str, whole: str, variables: Variables) -> str:
    """``value`` as a shell assigns it, of ``whole``, which is as written if it is not known."""
    if not re.search(r"[$`]", whole):
        return shlex.quote(value)
    known = variables.resolve(value)
    return shlex.quote(known) if known is not None else value if re.search("[\"']", value) else f'"{value}"'


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
            launch = _with(launch, note=f"dropped {each.option.flag} of {words[0]}: the agents do not need it")
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
    note = f"dropped {name} run: agents and workers run with elastic-sbatch's Python; --python PATH chooses another"
    return _with(launch, note=note), rest


_UNWRAP: dict[str, Callable[[Launch, list[str], Variables], _Step]] = {
    **dict.fromkeys(("exec", "nohup", "time", "command"), _plain),
    **dict.fromkeys(_RUNNERS, _runner),
    "env": _env,
    "srun": _srun,
    "apptainer": _apptainer,
    "singularity": _apptainer,
}


def _text_of_shell(words: Sequence[str], variables: Variables) -> str | None:
    """TEXT of ``bash -c 'TEXT'``, as that shell reads it."""
    program = os.path.basename(_program(words[0], variables)) if words else ""
    if program not in {"bash", "sh", "zsh"} or len(words) < 3 or not re.fullmatch(r"-[a-z]*c", words[1]):
        return None
    text = words[2]
    if text[:1] == text[-1:] == "'" or text[:2] == "$'":
        return text[1:-1].replace("'\\''", "'")
    if (expanded := variables.expand([text])) != [text]:
        return " ".join(expanded)
    return re.sub(r'\\(["$`\\])', r"\1", text[1:-1])


def _of_shell(launch: Launch, words: Sequence[str], inner: str, variables: Variables) -> Launch | None:
    """The launch in what a shell is given to run, and what comes before."""
    found: Launch | None = None
    before: list[list[str]] = []
    for statement in statements(inner):
        parts = [[statement.text]] if statement.compound else [part for _, part in statement.parts()]
        while found is None and parts:
            part = parts.pop(0)
            found = None if statement.compound else launch_of(part, variables)
            before += [part] if part and found is None else []
    if found is None:
        return None
    used = {name for part in before for word in part[1:] for name in names(word)}
    used |= {name for word in (*found.setup, found.script, *found.script_args) for name in names(word)}
    kept: list[str] = []
    for part in before:
        defined = [match[1] for match in map(ASSIGNS.fullmatch, assigned(part)) if match]
        if defined and all(map(OF_RENDEZVOUS.fullmatch, defined)) and not used.intersection(defined):
            launch = _with(launch, note=f"dropped {', '.join(defined)}: {_EACH_HAS}")
        else:
            kept.append(" ".join(part))
    if kept and any(name == "container-image" for name, _ in launch.options):
        raise UsageError(
            f"{kept[0]!r} runs in the container before the launch; expected it in the image, or as --setup LINE"
        )
    if len(words) > 3:
        raise UsageError(f"{words[0]} {words[1]} with arguments: expected the launch without {words[0]} {words[1]}")
    if per_task := _OF_A_TASK.search(" ".join([*kept, *found.setup, found.script, *found.script_args])):
        raise UsageError(f"${per_task[0]}: Slurm's tasks are the agents here; the training script has RANK instead")
    for line in kept if launch.by_srun else ():
        if not _OF_ENVIRONMENT.match(line):
            launch = _with(launch, note=f"{line!r} ran on each node, and now runs on the first node only; "
                           f"for all nodes: --setup {shlex.quote(f'srun --ntasks-per-node=1 {line}')}")  # fmt: skip
    return replace(
        found,
        options=(*launch.options, *found.options),
        by_srun=launch.by_srun or found.by_srun,
        srun=(*launch.srun, *found.srun),
        setup=(*launch.setup, *kept, *found.setup),
        notes=(*launch.notes, *found.notes),
    )


_OF_ENVIRONMENT = re.compile(
    r"(export|declare|unset|source|\.|module|ml|conda|mamba|micromamba|spack|cd|set|ulimit|umask|eval|echo|which)\s|\w+="
)
"""What acts on the shell, whose environment and folder the agents have on all nodes."""
_OF_A_TASK = re.compile("SLURM_(PROCID|NODEID|LOCALID|TASK_PID)")


def _torchrun(launch: Launch, words: list[str], variables: Variables) -> Launch:
    line = parse_command(variables.known(words))
    rest = words[len(words) - 1 - len(line.script_args) :]
    for shown, reason in line.dropped:
        launch = _with(launch, note=f"dropped {shown}: {reason}")
    for name, value in line.options:
        flag = f"--{'nnodes' if name == 'nodes' else name}={value}"
        if name == "max-restarts" and value == "0":
            reason = "a lost node costs a restart, so 0 would end the job; see --max-restarts"
            launch = _with(launch, note=f"dropped {flag}: {reason}")
        elif name == "rdzv-endpoint":
            launch = _with(launch, note=f"dropped {flag}: {OF_EACH_JOB[name]}")
        elif "$" in value or "`" in value:
            reason = _UNKNOWN.get(name, "its value is known only when the batch script runs")
            launch = _with(launch, note=f"dropped {flag}: {reason}")
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
    "nodes": "the number of nodes comes from --nodes",
    "nproc-per-node": "each node then has one worker per GPU, or one worker if it has no GPU",
}


def _accelerate(launch: Launch, words: list[str], variables: Variables) -> Launch:
    try:
        given, script = scan(variables.known(words), _ACCELERATE, ())
    except UsageError as error:
        raise UsageError(
            f"accelerate launch: {error}; torchrun has no such option: set the value in the script, "
            "for example with Accelerator(...), and submit the script: elastic-sbatch --nodes MIN:MAX SCRIPT"
        ) from None
    if not script:
        raise UsageError("accelerate launch: expected a script after its options")
    processes, machines = (number(last(given, f"num-{name}") or "1") for name in ("processes", "machines"))
    if machines:
        launch = _with(launch, option=("nodes", str(machines)))
        if last(given, "num-processes") and processes and processes % machines == 0:
            launch = _with(launch, option=("nproc-per-node", str(processes // machines)))
    for each in given:
        if each.name == "mixed-precision":
            launch = _with(launch, setup=f"export ACCELERATE_MIXED_PRECISION={each.value}")
        elif each.name == "max-restarts":
            launch = _with(launch, option=("max-restarts", each.value or ""))
        elif each.name == "dynamo-backend" and each.value != "no":
            launch = _with(launch, setup=f"export ACCELERATE_DYNAMO_BACKEND={(each.value or '').upper()}")
    rest = words[len(words) - len(script) :]
    module = any(each.name == "module" for each in given)
    launch = _with(launch, note="the agents replace accelerate launch, and set what it would set for the ranks")
    return replace(launch, kind="accelerate", script=rest[0], script_args=tuple(rest[1:]), module=module)


def _python(launch: Launch, words: list[str], variables: Variables) -> Launch | None:
    while words and words[0].startswith("-") and words[0] not in {"-m", "-c", "-"}:
        if words[0] != "-u":
            reason = "use the environment variable for it, see python --help-env"
            launch = _with(launch, note=f"dropped {words[0]} of python: {reason}")
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
