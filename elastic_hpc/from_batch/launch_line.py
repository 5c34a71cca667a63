"""The command of a batch script that starts the training: torchrun, accelerate, or python. Pure."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace

from elastic_hpc.errors import UsageError
from elastic_hpc.from_batch.shell_text import statements
from elastic_hpc.from_batch.variables import ASSIGNS, Variables, assigned, names
from elastic_hpc.from_batch.wrappers import OF_RENDEZVOUS, SET_BY_AGENTS, Launch, program_of, unwrapped
from elastic_hpc.options.sbatch import Option, last, scan
from elastic_hpc.options.torchrun import OF_EACH_JOB, parse_command
from elastic_hpc.options.values import number

_ACCELERATE = (
    *(Option(name) for name in ("num-processes", "num-machines", "machine-rank", "main-process-ip", "max-restarts")),
    *(Option(name) for name in ("main-process-port", "rdzv-backend", "rdzv-conf", "monitor-interval", "role", "tee")),
    *(Option(name) for name in ("mixed-precision", "dynamo-backend")),
    *(Option(name, value="") for name in ("multi-gpu", "same-network", "quiet", "debug", "cpu")),
    Option("module", "m", ""),
)
_OTHERS = {
    "mpirun": "MPI starts the workers; expected torchrun, or python started with srun",
    "mpiexec": "MPI starts the workers; expected torchrun, or python started with srun",
    "deepspeed": "DeepSpeed's launcher starts the workers over ssh; expected torchrun, or python started with srun",
    "shifter": "Shifter containers are not supported; expected pyxis (srun --container-image) or apptainer exec",
    "podman-hpc": "podman-hpc containers are not supported; expected pyxis (srun --container-image) or apptainer exec",
}
_LAUNCHERS = re.compile(r"torchrun|torchrun_jsc|accelerate|python[\d.]*")


def launch_of(words: Sequence[str], variables: Variables) -> Launch | None:
    """The launch in ``words``; None if they are no launch. Raises UsageError for an unsupported kind of launch."""
    launch, words = unwrapped(words, variables)
    if not words:
        return None
    first = program_of(words[0], variables)
    name = posixpath.basename(first)
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
    """Why ``words`` may be a launch although ``launch_of`` finds none; empty if nothing suggests that. The text may
    have ``{statement}`` in place of the whole line.
    """
    launch, words = unwrapped(words, variables)
    if (inner := _text_of_shell(words, variables)) is not None:
        parts = [part for statement in statements(inner) if not statement.compound for _, part in statement.parts()]
        return next(filter(None, (not_understood(part, variables) for part in reversed(parts))), "")
    programs = [program_of(word, variables) for word in words]
    names_of = [posixpath.basename(program) for program in programs]
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


def _interpreter(launch: Launch, command: str) -> Launch:
    """``launch`` with --python, if ``command`` is a path: the interpreter is in the same folder."""
    if "/" not in command or "$" in command:
        return launch
    folder, name = posixpath.split(command)
    python = command if name.startswith("python") else posixpath.join(folder, "python")
    note = f"{command}: agents and workers run with {python}, where elastic_hpc must be installed"
    return launch.with_note(note).with_option("python", shlex.quote(python))


def _text_of_shell(words: Sequence[str], variables: Variables) -> str | None:
    """TEXT of ``bash -c 'TEXT'``, as that shell reads it; None if ``words`` are another command."""
    program = posixpath.basename(program_of(words[0], variables)) if words else ""
    if program not in {"bash", "sh", "zsh"} or len(words) < 3 or not re.fullmatch(r"-[a-z]*c", words[1]):
        return None
    text = words[2]
    if text[:1] == text[-1:] == "'" or text[:2] == "$'":
        return text[1:-1].replace("'\\''", "'")
    if (expanded := variables.expand([text])) != [text]:
        return " ".join(expanded)
    return re.sub(r'\\(["$`\\])', r"\1", text[1:-1])


def _of_shell(launch: Launch, words: Sequence[str], inner: str, variables: Variables) -> Launch | None:
    """The launch in ``inner``, the text that ``bash -c`` runs, with the commands before it as set-up lines."""
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
            launch = launch.with_note(f"dropped {', '.join(defined)}: {SET_BY_AGENTS}")
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
            launch = launch.with_note(f"{line!r} ran on each node, and now runs on the first node only; "
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
"""Commands that change the shell, whose environment and working directory the agents on all nodes get."""
_OF_A_TASK = re.compile("SLURM_(PROCID|NODEID|LOCALID|TASK_PID)")


def _torchrun(launch: Launch, words: list[str], variables: Variables) -> Launch:
    line = parse_command(variables.known(words))
    rest = words[len(words) - 1 - len(line.script_args) :]
    for shown, reason in line.dropped:
        launch = launch.with_note(f"dropped {shown}: {reason}")
    for name, value in line.options:
        flag = f"--{'nnodes' if name == 'nodes' else name}={value}"
        if name == "max-restarts" and value == "0":
            reason = "a lost node costs a restart, so 0 would end the job; see --max-restarts"
            launch = launch.with_note(f"dropped {flag}: {reason}")
        elif name == "rdzv-endpoint":
            launch = launch.with_note(f"dropped {flag}: {OF_EACH_JOB[name]}")
        elif "$" in value or "`" in value:
            reason = _UNKNOWN.get(name, "its value is known only when the batch script runs")
            launch = launch.with_note(f"dropped {flag}: {reason}")
        elif name == "rdzv-conf":
            known = [pair for pair in value.split(",") if re.match("(join|last_call)_timeout=", pair)]
            if len(known) < len(value.split(",")):
                launch = launch.with_note(f"dropped what is not join_timeout or last_call_timeout in {flag}")
            launch = launch.with_option(name, ",".join(known)) if known else launch
        else:
            launch = launch.with_option(name, value)
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
        launch = launch.with_option("nodes", str(machines))
        if last(given, "num-processes") and processes and processes % machines == 0:
            launch = launch.with_option("nproc-per-node", str(processes // machines))
    for option in given:
        if option.name == "mixed-precision":
            launch = launch.with_setup(f"export ACCELERATE_MIXED_PRECISION={option.value}")
        elif option.name == "max-restarts":
            launch = launch.with_option("max-restarts", option.value or "")
        elif option.name == "dynamo-backend" and option.value != "no":
            launch = launch.with_setup(f"export ACCELERATE_DYNAMO_BACKEND={(option.value or '').upper()}")
    rest = words[len(words) - len(script) :]
    module = any(option.name == "module" for option in given)
    launch = launch.with_note("the agents replace accelerate launch, and set what it would set for the ranks")
    return replace(launch, kind="accelerate", script=rest[0], script_args=tuple(rest[1:]), module=module)


def _python(launch: Launch, words: list[str], variables: Variables) -> Launch | None:
    while words and words[0].startswith("-") and words[0] not in {"-m", "-c", "-"}:
        if words[0] != "-u":
            reason = "use the environment variable for it, see python --help-env"
            launch = launch.with_note(f"dropped {words[0]} of python: {reason}")
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
