"""Makes the parts of an elastic job from a batch script: #SBATCH lines, set-up lines, script and arguments. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from elastic_hpc.errors import UsageError
from elastic_hpc.from_batch.reader import Reader
from elastic_hpc.from_batch.shape import Shape
from elastic_hpc.from_batch.shell_text import statements
from elastic_hpc.from_batch.variables import Variables, names
from elastic_hpc.from_batch.wrappers import Launch
from elastic_hpc.job.quoting import Shell, first_line
from elastic_hpc.job.request import Request
from elastic_hpc.job.script_file import interpreter
from elastic_hpc.options import sbatch_lines
from elastic_hpc.options.sbatch import COMMAND_LINE
from elastic_hpc.options.table import Layer

_LOGIN = """source /etc/profile
for f in ~/.bash_profile ~/.bash_login ~/.profile; do if [ -r "$f" ]; then . "$f"; break; fi; done"""
_ARRAY = "elastic_arguments"
_BRINGS_PYTHON = re.compile(
    r"\bactivate\b|^\s*(module|ml)\b.*(python|conda|forge|torch|mamba)|^\s*(export +)?PATH=|\bpyenv\b|\bspack load\b",
    re.IGNORECASE | re.MULTILINE,
)


def from_batch(
    content: bytes, name: str, args: Sequence[str], environ: Mapping[str, str], instead: Mapping[str, str] | None = None
) -> tuple[Request, str]:
    """The job of the batch script ``content`` with the name ``name`` and the arguments ``args``. ``environ``: the
    environment of its submission; ``instead``: the options of the command line, which replace those of the batch
    script. Raises UsageError, with the line, if the script does not make an elastic job.

    Returns the request, whose notes list what was dropped or changed, and the set-up line that provides an interpreter,
    with its place; empty if there is no such line.
    """
    text = _text(content, name)
    given = sbatch_lines.options(content, name)
    try:
        found = Reader(name, statements(text), environ, given)
    except UsageError as error:
        raise UsageError(f"{name} {error}") from None
    launch, place = found.launch, f"{name} line {found.line}"
    shape = Shape(given, launch, place)
    if args and not re.search(r"\$\{?[\d@*#]", text):
        raise UsageError(f"{args[0]!r} after --from-batch {name}: that batch script uses no arguments; leave it out")
    script, script_args, capture = _command(launch)
    setup = [*_login(text, name), *_arguments(args), *found.setup]
    if capture:
        setup.append((capture, f"{place}: the arguments, as written on that line"))
    setup = _with_cpus_of_a_task(setup, shape.cpus_of_a_task)
    notes = [*shape.notes, *found.notes, *(f"{place}: {note}" for note in launch.notes)]
    taken = [(given.name, given.value, given.source) for given in shape.sbatch] + shape.options
    replaced = {option: value for option, value in (instead or {}).items() if option not in {"setup", "env"}}
    notes += [
        f"{source}: {_written(option, value)} replaced by {_written(option, replaced[option])} of the command line"
        for option, value, source in taken
        if option in replaced
    ]
    kept = [_written(option, value) for option, value, _ in taken if option not in replaced]
    brings_python = [f"{source}: {first_line(line)!r}" for line, source in found.setup if _BRINGS_PYTHON.search(line)]
    request = Request(
        script,
        script_args,
        options=(),
        sbatch=(),
        source=COMMAND_LINE,
        module=launch.module,
        no_python=launch.no_python,
        of_script=(
            *(Layer(option.source, (), [option]) for option in shape.sbatch),
            *(Layer(source, [(option, value)]) for option, value, source in shape.options),
            *(Layer(source, [("setup", line)]) for line, source in setup),
        ),
        notes=(f"{name}: taken: {_summary(kept, launch, len(setup))}", *_in_order(notes)),
        folder=found.folder,
    )
    return request, brings_python[-1] if brings_python else ""


def _text(content: bytes, name: str) -> str:
    """The text of the batch script. Raises UsageError if it is not a script for a shell such as bash."""
    if b"\r\n" in content:
        raise UsageError(f"{name}: has DOS line breaks, which sbatch refuses; convert them: dos2unix {name}")
    text = content.decode(errors="surrogateescape")
    shell = interpreter(text)
    if shell not in {"bash", "sh", "dash", "zsh", "ksh"}:
        what = f"a script for {shell}" if shell else "no #! line"
        raise UsageError(f"{name}: {what}; expected a batch script for bash, which begins with #!/bin/bash")
    return text


def _login(text: str, name: str) -> list[tuple[str, str]]:
    """The set-up line of a batch script whose shell is a login shell, with its source."""
    options = text.partition("\n")[0].split()[1:]
    is_login = any(re.fullmatch("-[a-z]*l[a-z]*|--login", word) for word in options)
    return [(_LOGIN, f"{name} line 1")] if is_login else []


def _arguments(args: Sequence[str]) -> list[tuple[str, str]]:
    return [(f"set -- {shlex.join(args)}", "command line")] if args else []


def _with_cpus_of_a_task(setup: list[tuple[str, str]], cpus: str) -> list[tuple[str, str]]:
    """``setup`` with SLURM_CPUS_PER_TASK=``cpus`` if a line uses the variable; the agents see all CPUs of the node."""
    if not cpus or not any("SLURM_CPUS_PER_TASK" in names(line) for line, _ in setup):
        return setup
    of_a_task = f"elastic_cpus=$SLURM_CPUS_PER_TASK SLURM_CPUS_PER_TASK={cpus}"
    return [
        (of_a_task, "one task's CPUs, for the set-up lines"),
        *setup,
        ("SLURM_CPUS_PER_TASK=$elastic_cpus", "all CPUs of the node, for the agents"),
    ]


def _written(option: str, value: str | None) -> str:
    return f"--{option}={value}" if value else f"--{option}"


def _summary(options: Sequence[str], launch: Launch, set_up_lines: int) -> str:
    """What the job takes from the batch script."""
    lines = f"set-up lines: {set_up_lines}" if set_up_lines else ""
    run = f"to run: {' '.join([launch.script, *launch.script_args])}"
    return ", ".join(filter(None, [" ".join(options), lines, run]))


def _in_order(notes: Sequence[str]) -> list[str]:
    def line(note: str) -> int:
        match = re.search(r" lines? (\d+)", note)
        return int(match[1]) if match else 0

    return sorted(dict.fromkeys(notes), key=line)


def _command(launch: Launch) -> tuple[str, tuple[str, ...], str]:
    """Script and arguments, and a set-up line that keeps them in an array if a shell must expand them."""
    words = [launch.script, *launch.script_args]
    # None for a word that a shell must expand
    values = [None if word.startswith("~") else Variables({}).resolve(word) for word in words]
    if None not in values:
        script, *script_args = [value or "" for value in values]
        return script, tuple(script_args), ""
    kept = Shell(f'"${{{_ARRAY}[@]}}"')
    if values[0] is None:
        return kept, (), f"{_ARRAY}=({' '.join(words)})"
    return values[0], (kept,), f"{_ARRAY}=({' '.join(words[1:])})"
