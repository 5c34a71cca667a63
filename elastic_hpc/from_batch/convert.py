"""An elastic job of a batch script as computing centres' pages have it: its #SBATCH lines, what it sets up, and its
torchrun line. Pure.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic_hpc.errors import UsageError
from elastic_hpc.from_batch.reader import Reader, first_line
from elastic_hpc.from_batch.shape import Shape
from elastic_hpc.from_batch.shell_text import statements
from elastic_hpc.from_batch.variables import Variables, names
from elastic_hpc.from_batch.wrappers import Launch
from elastic_hpc.job.config import Layer
from elastic_hpc.job.quoting import Shell
from elastic_hpc.job.script_file import interpreter
from elastic_hpc.options import sbatch_lines

_LOGIN = """source /etc/profile
for f in ~/.bash_profile ~/.bash_login ~/.profile; do if [ -r "$f" ]; then . "$f"; break; fi; done"""
_CPUS_OF_A_NODE = "SLURM_CPUS_PER_TASK=$elastic_cpus"
_ARGUMENTS = "elastic_arguments"
_BRINGS_PYTHON = re.compile(
    r"\bactivate\b|^\s*(module|ml)\b.*(python|conda|forge|torch|mamba)|^\s*(export +)?PATH=|\bpyenv\b|\bspack load\b",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class FromBatch:
    """What a batch script says of the job."""

    script: str
    script_args: tuple[str, ...]
    module: bool
    no_python: bool
    layers: tuple[Layer, ...]
    notes: tuple[str, ...]
    """What was dropped and what was changed, and why: a line each."""
    folder: str | None = ""
    """Where it changes to, from the working directory of the job; None if only running it would tell."""
    environment: str = ""
    """The set-up line that brings an interpreter, and where it is; empty if none does, or the launch names one."""


def from_batch(content: bytes, name: str, args: Sequence[str], environ: Mapping[str, str]) -> FromBatch:
    """The job of the batch script ``content``, which is called ``name`` and given ``args``; ``environ`` is that of its
    submission. UsageError, with the line, if no elastic job can be made of it.
    """
    if b"\r\n" in content:
        raise UsageError(f"{name}: has DOS line breaks, which sbatch refuses; convert them: dos2unix {name}")
    text = content.decode(errors="surrogateescape")
    shell = interpreter(text)
    if shell not in {"bash", "sh", "dash", "zsh", "ksh"}:
        what = f"a script for {shell}" if shell else "no #! line"
        raise UsageError(f"{name}: {what}; expected a batch script for bash, which begins with #!/bin/bash")
    given = sbatch_lines.options(content, name)
    try:
        found = Reader(name, statements(text), environ, given)
    except UsageError as error:
        raise UsageError(f"{name} {error}") from None
    launch, at = found.launch, f"{name} line {found.line}"
    shape = Shape(given, launch, at)
    first = text.partition("\n")[0].split()[1:]
    setup = [(_LOGIN, f"{name} line 1")] if any(re.fullmatch("-[a-z]*l[a-z]*|--login", word) for word in first) else []
    if args and not re.search(r"\$\{?[\d@*#]", text):
        raise UsageError(f"{args[0]!r} after --from-batch {name}: that batch script uses no arguments; leave it out")
    if args:
        setup.append((f"set -- {shlex.join(args)}", "command line"))
    setup += found.setup
    script, script_args, capture = _command(launch)
    if capture:
        setup.append((capture, f"{at}: the arguments, as written on that line"))
    if shape.cpus_of_a_task and any("SLURM_CPUS_PER_TASK" in names(line) for line, _ in setup):
        of_a_task = f"elastic_cpus=$SLURM_CPUS_PER_TASK SLURM_CPUS_PER_TASK={shape.cpus_of_a_task}"
        setup = [
            (of_a_task, "one task's CPUs, for the set-up lines"),
            *setup,
            (_CPUS_OF_A_NODE, "all CPUs of the node, for the agents"),
        ]
    layers = [Layer(each.source, (), [each]) for each in shape.sbatch]
    layers += [Layer(source, [(option, value)], []) for option, value, source in shape.options]
    layers += [Layer(source, [("setup", line)], []) for line, source in setup]
    notes = [*shape.notes, *found.notes, *(f"{at}: {note}" for note in launch.notes)]
    taken = [*map(str, shape.sbatch), *(f"--{option}={value}" for option, value, _ in shape.options)]
    lines = f", set-up lines: {len(setup)}" if setup else ""
    command = " ".join([launch.script, *launch.script_args])
    first_note = f"{name}: taken: {' '.join(taken)}{lines}, to run: {command}"
    notes = [first_note, *_in_order(notes)]
    brings = [f"{source}: {first_line(line)!r}" for line, source in found.setup if _BRINGS_PYTHON.search(line)]
    return FromBatch(
        script,
        script_args,
        launch.module,
        launch.no_python,
        tuple(layers),
        tuple(notes),
        found.folder,
        brings[-1] if brings else "",
    )


def _in_order(notes: Sequence[str]) -> list[str]:
    def line(note: str) -> int:
        match = re.search(r" lines? (\d+)", note)
        return int(match[1]) if match else 0

    return sorted(dict.fromkeys(notes), key=line)


def _command(launch: Launch) -> tuple[str, tuple[str, ...], str]:
    """Script and arguments, and a line that keeps them in an array if the shell has something to fill in."""
    words = [launch.script, *launch.script_args]
    values = [_literal(word) for word in words]
    if None not in values:
        script, *script_args = [value or "" for value in values]
        return script, tuple(script_args), ""
    kept = Shell(f'"${{{_ARGUMENTS}[@]}}"')
    if values[0] is None:
        return kept, (), f"{_ARGUMENTS}=({' '.join(words)})"
    return values[0], (kept,), f"{_ARGUMENTS}=({' '.join(words[1:])})"


def _literal(word: str) -> str | None:
    """The text of ``word`` if that has nothing for the shell to fill in."""
    return Variables({}).resolve(word) if word[:1] != "~" else None
