"""An elastic job of a batch script as computing centres' pages have it: its #SBATCH lines, what it sets up, and its
torchrun line. Pure.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from elastic_hpc import sbatch_lines
from elastic_hpc.config import Layer
from elastic_hpc.errors import UsageError
from elastic_hpc.launch_line import Launch, Variables, launch_of
from elastic_hpc.sbatch_options import COMMAND_LINE_ONLY, SBATCH, Given, check, is_for_containers
from elastic_hpc.script import Shell
from elastic_hpc.script_file import interpreter
from elastic_hpc.shell_text import Statement, statements

_LOGIN = """source /etc/profile
for f in ~/.bash_profile ~/.bash_login ~/.profile; do if [ -r "$f" ]; then . "$f"; break; fi; done"""
_ARGUMENTS = "elastic_arguments"
_LAUNCHES = re.compile(r"\btorchrun\b|\btorch\.distributed\.(run|launch)\b|\baccelerate launch\b|\bsrun\b.*\bpython")
_SHAPE = ("nodes", "ntasks", "ntasks-per-node", "tasks-per-node", "gpus-per-task", "gpus", "cpus-per-task")
_OF_RENDEZVOUS = re.compile(
    r"((MASTER|RDZV|RENDEZVOUS|HEAD_NODE)_\w+|HEAD_NODE|WORLD_SIZE|((NODE|LOCAL|MACHINE)_)?RANK|NODES_ARRAY)",
    re.IGNORECASE,
)
_OF_NODES = re.compile(
    r"scontrol +show +hostname|SLURM_(JOB_|STEP_)?NODELIST|\bhostname\b|SLURM_(PROCID|NODEID|LOCALID)"
)
_OF_TASKS = re.compile(r"\$\{?(SLURM_(?:NTASKS\w*|NPROCS|TASKS_PER_NODE|GPUS_PER_TASK|NNODES|JOB_NUM_NODES))\b")
_ASSIGNMENT = re.compile(r"(\w+)(?:\[\w+\])?\+?=")
_DECLARES = {"export", "declare", "readonly", "local", "typeset"}


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


def from_batch(content: bytes, name: str, args: Sequence[str], environ: Mapping[str, str]) -> FromBatch:
    """The job of the batch script ``content``, which is called ``name`` and given ``args``; ``environ`` is that of its
    submission. UsageError, with the line, if no elastic job can be made of it.
    """
    if b"\r\n" in content:
        raise UsageError(f"{name}: DOS line breaks, which sbatch refuses; dos2unix {name}")
    text = content.decode(errors="surrogateescape")
    shell = interpreter(text)
    if shell not in {"bash", "sh", "dash", "zsh", "ksh"}:
        what = f"a script for {shell}" if shell else "no #! line"
        raise UsageError(f"{name}: {what}; expected a batch script for bash, which begins with #!/bin/bash")
    given = sbatch_lines.options(content, name)
    try:
        found = _Reader(name, statements(text), environ)
    except UsageError as error:
        raise UsageError(f"{name} {error}") from None
    launch, at = found.launch, f"{name} line {found.line}"
    shape = _Shape(given, launch, at)
    first = text.partition("\n")[0].split()[1:]
    setup = [(_LOGIN, f"{name} line 1")] if any(re.fullmatch("-[a-z]*l[a-z]*|--login", word) for word in first) else []
    if args and not re.search(r"\$\{?[\d@*#]", text):
        raise UsageError(f"{args[0]!r} behind --from-batch {name}: that script has no use for arguments; leave it out")
    if args:
        setup.append((f"set -- {shlex.join(args)}", "command line"))
    setup += found.setup
    script, script_args, capture = _command(launch)
    if capture:
        setup.append((capture, f"{at}: the arguments, as that line has them"))
    layers = [Layer(each.source, (), [each]) for each in shape.sbatch]
    layers += [Layer(source, [(option, value)], []) for option, value, source in shape.options]
    layers += [Layer(source, [("setup", line)], []) for line, source in setup]
    notes = [*shape.notes, *found.notes, *(f"{at}: {note}" for note in launch.notes)]
    taken = [*map(_shown, shape.sbatch), *(f"--{option}={value}" for option, value, _ in shape.options)]
    lines = f", set-up lines: {len(setup)}" if setup else ""
    command = " ".join([launch.script, *launch.script_args])
    first_note = f"{name}: taken: {' '.join(taken)}{lines}, to run: {command}"
    notes = [first_note, *_in_order(notes)]
    return FromBatch(script, script_args, launch.module, launch.no_python, tuple(layers), tuple(notes), found.folder)


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


class _Reader:
    """The statements: which is the launch, what comes before it, and what is left out."""

    def __init__(self, name: str, found: Sequence[Statement], environ: Mapping[str, str]) -> None:
        self.notes: list[str] = []
        self._name, self._variables = name, Variables(environ)
        launches = [one for one in enumerate(map(self._launch, found)) if one[1]]
        index, launch = self._choose(found, launches)
        self.line = found[index].line
        self._statement = found[index]
        launch = self._complete(launch)
        self.launch = launch
        before = self._before_launch()
        self.setup = self._kept(found[:index], [*before, *launch.setup, launch.script, *launch.script_args])
        self.setup += [(line, f"{name} line {self.line}") for line in (*before, *launch.setup)]
        self.folder = self._folder([line for line, _ in self.setup])
        self._leave_out(found[index + 1 :])

    def _launch(self, statement: Statement) -> Launch | None:
        if statement.compound:
            for name in _ASSIGNMENT.findall(statement.text):
                self._variables.assign(f"{name}=$(unknown)")
            return None
        for _, words in statement.parts():
            try:
                if launch := launch_of(words, self._variables):
                    return launch
            except UsageError as error:
                raise UsageError(f"line {statement.line}: {error}") from None
            assigned = words[1:] if words[:1] and words[0] in _DECLARES else words
            for word in assigned if all(map(_ASSIGNMENT.match, assigned)) else ():
                self._variables.assign(word)
        return None

    def _choose(
        self, found: Sequence[Statement], launches: Sequence[tuple[int, Launch | None]]
    ) -> tuple[int, Launch]:
        hidden = [each for each in found if each.compound and _LAUNCHES.search(each.text)]
        ranked = [(self._rank(launch), index, launch) for index, launch in launches if launch]
        best = [(index, launch) for rank, index, launch in ranked if rank == min(r for r, _, _ in ranked)]
        if hidden and (not ranked or ranked[0][0] > 0 or len(hidden) + len(best) > 1):
            raise UsageError(
                f"line {hidden[0].line}: the launch is in a loop, a condition or a function, "
                f"{_first(hidden[0].text)!r}; write the one that is to run by itself, "
                "or: elastic-sbatch --nodes MIN:MAX SCRIPT"
            )
        if len(best) > 1:
            lines = ", ".join(str(found[index].line) for index, _ in best)
            raise UsageError(f"lines {lines}: several launches; expected one, each is a job of its own")
        if not best:
            raise UsageError(
                "has no line that starts torchrun, or python by srun; "
                "expected one as 'srun torchrun train.py'; what it calls can be submitted by itself: "
                "elastic-sbatch --nodes MIN:MAX SCRIPT"
            )
        return best[0]

    @staticmethod
    def _rank(launch: Launch) -> int:
        """The launch is rather that of torchrun than that of a python for something else."""
        return 0 if launch.kind != "python" else 1 if launch.by_srun else 2

    def _complete(self, launch: Launch) -> Launch:
        known = self._variables.resolve(launch.script)
        following = [self._variables.resolve(word) or "" for word in launch.script_args[:1]]
        if known is None and following and following[0].endswith(".py"):
            raise UsageError(
                f"line {self.line}: what {launch.script} is can be told only when it runs; write its options there"
            )
        plain = known is not None and "\n" not in known
        return replace(launch, script=shlex.quote(known or "")) if plain else launch

    def _before_launch(self) -> list[str]:
        """What comes before the launch in its own list: ``cd there && torchrun ...``; notes what comes after."""
        before: list[str] = []
        parts = self._statement.parts()
        for at, (operator, words) in enumerate(parts):
            if launch_of(words, self._variables):
                rest = [f"{op} {' '.join(after)}".strip() for op, after in parts[at + 1 :]]
                if operator not in {"", "&&", ";"}:
                    raise UsageError(f"line {self.line}: {operator} before the launch; expected it by itself")
                if rest or re.search(r"\d?>", self._statement.text.rpartition(words[-1])[2]):
                    self._note(self._statement, "dropped what follows the launch in its line: the output is in the "
                               "job's file and the run directory, and the job ends with the training")  # fmt: skip
                break
            before.append(" ".join(words))
        return before

    def _note(self, statement: Statement, text: str) -> None:
        self.notes.append(f"{self._name} line {statement.line}: {text}")

    def _kept(self, found: Sequence[Statement], used: Sequence[str]) -> list[tuple[str, str]]:
        dropped = [each for each in found if each in _rendezvous(found, used)]
        if dropped:
            lines = f"line{'s' * (len(dropped) > 1)} {', '.join(str(each.line) for each in dropped)}"
            shown = ", ".join(dict.fromkeys(name for each in dropped for name in _defined(each)))
            self.notes.append(f"{self._name} {lines}: dropped {shown}: the agents find each other by themselves")
        kept = []
        for statement in found:
            first = statement.text.split()[0]
            if statement in dropped:
                continue
            if first == "trap":
                self._note(statement, "dropped trap: the workers are told themselves, see --grace")
            elif re.match(r"export +SRUN_\w+=", statement.text):
                self._note(statement, f"dropped {_first(statement.text)!r}: the srun line is elastic-sbatch's own")
            else:
                kept.append((statement.text, f"{self._name} line {statement.line}"))
                if not _is_plain(statement) and (match := _OF_TASKS.search(statement.text)):
                    self._note(statement, f"${match[1]} says nothing of an elastic job, whose size changes")
        for word in self.launch.script_args:
            if match := _OF_TASKS.search(word):
                self._note(self._statement, f"{word!r}: the size of an elastic job changes, ${match[1]} does not")
        return kept

    def _folder(self, lines: Sequence[str]) -> str | None:
        folder = ""
        for line in lines:
            if match := re.fullmatch(r"cd (?:-- )?(\S+)", line):
                target = self._variables.resolve(match[1])
                if target is None:
                    return None
                folder = os.path.join(folder, target)
            elif re.search(r"\b(cd|pushd|popd)\b", line):
                return None
        return folder

    def _leave_out(self, after: Sequence[Statement]) -> None:
        left = [each for each in after if each.text not in {"wait", "exit", "exit 0", "exit $?"}]
        if left:
            shown = ", ".join(repr(_first(each.text)) for each in left[:3]) + (", ..." if len(left) > 3 else "")
            self._note(left[0], f"dropped what follows the launch, {shown}: to run it after the job, submit it with "
                       "--dependency=afterok:JOB")  # fmt: skip


def _first(text: str) -> str:
    line = text.partition("\n")[0]
    return line if len(line) <= 60 else f"{line[:57]}..."


def _rendezvous(found: Sequence[Statement], used: Sequence[str]) -> set[Statement]:
    """Those that only serve to tell the nodes of each other, and those that only show it."""
    simple = [each for each in found if not each.compound and len(each.parts()) == 1]
    defines = {each: _defined(each) for each in simple}
    dropped = {
        each for each, names in defines.items()
        if names and (any(map(_OF_RENDEZVOUS.fullmatch, names)) or _OF_NODES.search(each.text))
    }  # fmt: skip
    while True:
        names = {name for each in dropped for name in defines[each]}
        shows = (each for each in simple if defines[each] or each.text.split()[0] in {"echo", "printf"})
        more = {each for each in shows if each not in dropped and _names(each.text) & names}
        if not more:
            break
        dropped |= more
    while True:
        needed = {name for text in used for name in _names(text)}
        needed |= {name for each in found if each not in dropped for name in _names(each.text)}
        back = {each for each in dropped if set(defines[each]) & needed}
        if not back:
            return dropped
        dropped -= back


def _defined(statement: Statement) -> list[str]:
    """The variables of a statement that does nothing but set some."""
    words = statement.parts()[0][1]
    if words[:1] and words[0] in {"mapfile", "readarray", "read"}:
        return [word for word in words[1:] if word[0] != "-"]
    words = words[1:] if words[:1] and words[0] in _DECLARES else words
    matches = [_ASSIGNMENT.match(word) for word in words]
    return [match[1] for match in matches if match] if all(matches) else []


def _is_plain(statement: Statement) -> bool:
    return not statement.compound and bool(_ASSIGNMENT.match(statement.text)) and len(statement.tokens) <= 2


def _names(text: str) -> set[str]:
    return set(re.findall(r"\$\{?[#!]?(\w+)", text))


class _Shape:
    """Nodes, workers, GPUs and cores: batch scripts count tasks, of which an elastic job has one on each node."""

    def __init__(self, given: Sequence[Given], launch: Launch, place: str) -> None:
        self.notes: list[str] = []
        self.options = [(name, value, place) for name, value in launch.options if name != "nodes"]
        self._by_torchrun = launch.kind != "python"
        told = {each.name: each for each in given}
        of_srun = [replace(each, source=place) for each in launch.srun if each.name in _SHAPE]
        self._all = {**{each.name: each for each in of_srun}, **told}
        self._nodes(dict(launch.options).get("nodes", ""), place)
        self.sbatch: list[Given] = []
        for each in [*of_srun, *given]:
            if each is self._all.get(each.name) and each.name != "nodes":
                self._take(each)
        per_node = self._tasks_per_node()
        if not self._by_torchrun and per_node > 1 and "nproc-per-node" not in dict(launch.options):
            self.options.append(("nproc-per-node", str(per_node), place))
        if launch.by_srun:
            self.notes.append(f"{place}: dropped srun and its options: elastic-sbatch starts one agent on each node")

    def _number(self, *names: str) -> int:
        values = [self._all[name].value or "" for name in names if name in self._all]
        return int(values[0]) if values and values[0].isdecimal() else 0

    def _tasks_per_node(self) -> int:
        tasks, nodes = self._number("ntasks"), self._number("nodes")
        by_total = tasks // nodes if nodes and tasks % nodes == 0 else 0
        return self._number("ntasks-per-node", "tasks-per-node") or by_total or 1

    def _nodes(self, of_torchrun: str, place: str) -> None:
        if (asked := self._all.get("nodes")) and ":" not in of_torchrun:
            text, source = re.sub(r"^(\d+)-(\d+)$", r"\1:\2", asked.value or ""), asked.source
        elif of_torchrun:
            text, source = of_torchrun, place
        elif tasks := self._number("ntasks"):
            per_node = self._number("ntasks-per-node", "tasks-per-node") or (1 if self._by_torchrun else 0)
            if not per_node:
                source = self._all["ntasks"].source
                raise UsageError(f"{source}: --ntasks={tasks} on how many nodes? give --nodes on the command line")
            text, source = str(-(-tasks // per_node)), self._all["ntasks"].source
        else:
            text, source = "1", place
        self.options.append(("nodes", text, source))

    def _take(self, given: Given) -> None:
        name, value, nodes = given.name, given.value or "", self._number("nodes")
        per_node = 1 if self._by_torchrun else self._tasks_per_node()
        if name in {"ntasks", "ntasks-per-node", "tasks-per-node"}:
            self._drop(given, "elastic-sbatch starts one agent on each node, which starts the workers")
        elif name == "gpus-per-task":
            self._change(given, "gpus-per-node", _times(value, per_node))
        elif name == "gpus" and nodes and (each := _divided(value, nodes)):
            self._change(given, "gpus-per-node", each)
        elif name == "cpus-per-task" and per_node > 1 and value.isdecimal():
            self._change(given, "cpus-per-task", str(int(value) * per_node))
        elif name in COMMAND_LINE_ONLY:
            self._drop(given, "it belongs on the command line")
        elif name == "signal" and not value.startswith("B:"):
            self._signal(given)
        elif is_for_containers(name):
            self._drop(given, "use --container-image IMAGE")
        else:
            try:
                if check(given):
                    self.sbatch.append(given)
                else:
                    self._drop(given, "that is done anyway")
            except UsageError as error:
                self._drop(given, str(error).partition(": ")[2])

    def _signal(self, given: Given) -> None:
        """Slurm sends it to the tasks, which the workers are."""
        word, _, seconds = (given.value or "").upper().rpartition(":")[2].partition("@")
        warning = replace(given, value=f"USR2@{seconds or 60}")
        drain = f"--drain-signal={word}"
        self.notes.append(
            f"{given.source}: changed {_shown(given)} to {_shown(warning)} and {drain}: the agents pass it on"
        )
        self.options.append(("drain-signal", word, given.source))
        self.sbatch.append(warning)

    def _drop(self, given: Given, reason: str) -> None:
        self.notes.append(f"{given.source}: dropped {_shown(given)}: {reason}")

    def _change(self, given: Given, name: str, value: str) -> None:
        changed = replace(given, option=SBATCH[name], value=value)
        self.notes.append(f"{given.source}: changed {_shown(given)} to {_shown(changed)}: an agent has all of its node")
        self.sbatch.append(changed)


def _shown(given: Given) -> str:
    return given.option.flag if given.value is None else f"{given.option.flag}={given.value}"


def _times(count: str, tasks: int) -> str:
    """``2`` or ``a100:2``, for each of so many tasks."""
    kind, colon, number = count.rpartition(":")
    return f"{kind}{colon}{int(number) * tasks}" if number.isdecimal() else count


def _divided(count: str, nodes: int) -> str:
    kind, colon, number = count.rpartition(":")
    whole = number.isdecimal() and int(number) % nodes == 0
    return f"{kind}{colon}{int(number) // nodes}" if whole else ""
