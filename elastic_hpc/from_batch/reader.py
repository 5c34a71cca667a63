"""The statements of a batch script: which is the launch, which set-up comes before it, what is left out. Pure."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace

from elastic_hpc.errors import UsageError
from elastic_hpc.from_batch.launch_line import launch_of, not_understood
from elastic_hpc.from_batch.shell_text import Statement
from elastic_hpc.from_batch.variables import ASSIGNS, Variables, assigned, names
from elastic_hpc.from_batch.wrappers import OF_RENDEZVOUS, Launch
from elastic_hpc.job.quoting import first_line
from elastic_hpc.options.sbatch import Given

_LAUNCHES = re.compile(r"\btorchrun\b|\btorch\.distributed\.(run|launch)\b|\baccelerate launch\b|\bsrun\b.*\bpython")
_OF_NODES = re.compile(
    r"scontrol +show +hostname|SLURM_(JOB_|STEP_)?NODELIST|\bhostname\b|SLURM_(PROCID|NODEID|LOCALID)"
)
_OF_SLURM = {
    "ntasks-per-node": "SLURM_NTASKS_PER_NODE",
    "tasks-per-node": "SLURM_NTASKS_PER_NODE",
    "cpus-per-task": "SLURM_CPUS_PER_TASK",
    "gpus-per-node": "SLURM_GPUS_PER_NODE",
}
"""Variables that Slurm would set in the job of the batch script."""
_OF_TASKS = re.compile(r"SLURM_(NTASKS\w*|NPROCS|TASKS_PER_NODE|GPUS_PER_TASK|NNODES|JOB_NUM_NODES)")


class Reader:
    """The statements: which is the launch, what comes before it, and what is left out."""

    def __init__(
        self, name: str, found: Sequence[Statement], environ: Mapping[str, str], given: Sequence[Given]
    ) -> None:
        self.notes: list[str] = []
        self._name, self._variables = name, Variables(environ)
        for option in given:
            if variable := _OF_SLURM.get(option.name):
                self._variables.assign(f"{variable}={option.value}")
        launches = [(index, launch) for index, launch in enumerate(map(self._launch, found)) if launch]
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
            for name in re.findall(r"(\w+)(?:\[\w+\])?\+?=", statement.text):
                self._variables.assign(f"{name}=$(unknown)")
            return None
        for _, words in statement.parts():
            try:
                if launch := launch_of(words, self._variables):
                    return launch
            except UsageError as error:
                raise UsageError(f"line {statement.line}: {error}") from None
            for word in assigned(words):
                self._variables.assign(word)
        return None

    def _choose(self, found: Sequence[Statement], launches: Sequence[tuple[int, Launch]]) -> tuple[int, Launch]:
        hidden = [statement for statement in found if statement.compound and _LAUNCHES.search(statement.text)]
        ranked = [(self._rank(launch), index, launch) for index, launch in launches]
        best = [(index, launch) for rank, index, launch in ranked if rank == min(r for r, _, _ in ranked)]
        if hidden and (not ranked or ranked[0][0] > 0 or len(hidden) + len(best) > 1):
            raise UsageError(
                f"line {hidden[0].line}: the launch is in a loop, a condition or a function, "
                f"{first_line(hidden[0].text)!r}; move the launch that you want "
                "outside, or: elastic-sbatch --nodes MIN:MAX SCRIPT"
            )
        if len(best) > 1:
            lines = ", ".join(str(found[index].line) for index, _ in best)
            raise UsageError(f"lines {lines}: several launches; expected one; submit each as a job of its own")
        if not best:
            self._say_what_it_starts(found)
            raise UsageError(
                "has no line that starts torchrun, or python with srun; "
                "expected a line such as 'srun torchrun train.py'; "
                "if another file starts the training, submit the training script itself: "
                "elastic-sbatch --nodes MIN:MAX SCRIPT"
            )
        return best[0]

    def _say_what_it_starts(self, found: Sequence[Statement]) -> None:
        """Raise UsageError for the line that may be the launch, if there is one: the last line that names torchrun or
        python, else the last line that starts another program.
        """
        named: list[str] = []
        others: list[str] = []
        for statement in found:
            for _, words in statement.parts() if not statement.compound else ():
                if reason := not_understood(words, self._variables):
                    text = reason.replace("{statement}", repr(first_line(statement.text)))
                    (named if text == reason else others).append(f"line {statement.line}: {text}")
        if reasons := [*others, *named]:
            raise UsageError(reasons[-1])

    @staticmethod
    def _rank(launch: Launch) -> int:
        """Lower for a more probable launch: a torchrun starts the training, a python may do something else."""
        return 0 if launch.kind != "python" else 1 if launch.by_srun else 2

    def _complete(self, launch: Launch) -> Launch:
        known = self._variables.resolve(launch.script)
        following = [self._variables.resolve(word) or "" for word in launch.script_args[:1]]
        if known is None and following and following[0].endswith(".py"):
            raise UsageError(
                f"line {self.line}: the value of {launch.script} is known only when the batch script runs; "
                "write it out here"
            )
        plain = known is not None and "\n" not in known
        return replace(launch, script=shlex.quote(known or "")) if plain else launch

    def _before_launch(self) -> list[str]:
        """The commands before the launch in its statement, as in ``cd src && torchrun ...``. Notes what follows it."""
        before: list[str] = []
        parts = self._statement.parts()
        for at, (operator, words) in enumerate(parts):
            if launch_of(words, self._variables):
                rest = [f"{op} {' '.join(after)}".strip() for op, after in parts[at + 1 :]]
                if operator not in {"", "&&", ";"}:
                    raise UsageError(f"line {self.line}: {operator} before the launch; expected it on its own line")
                if rest or re.search(r"\d?>", self._statement.text.rpartition(words[-1])[2]):
                    self._note(self._statement, "dropped what follows the launch on its line: the output is in the "
                               "job's file and the run directory, and the job ends with the training")  # fmt: skip
                break
            before.append(" ".join(words))
        return before

    def _note(self, statement: Statement, text: str) -> None:
        self.notes.append(f"{self._name} line {statement.line}: {text}")

    def _kept(self, found: Sequence[Statement], used: Sequence[str]) -> list[tuple[str, str]]:
        rendezvous = _rendezvous(found, used)
        dropped = [statement for statement in found if statement in rendezvous]
        if dropped:
            lines = f"line{'s' * (len(dropped) > 1)} {', '.join(str(statement.line) for statement in dropped)}"
            shown = ", ".join(dict.fromkeys(name for statement in dropped for name in _defined(statement)))
            self.notes.append(f"{self._name} {lines}: dropped {shown}: the agents find each other without this")
        kept = []
        for statement in found:
            if statement in dropped:
                continue
            if _command(statement) == "trap":
                self._note(statement, "dropped trap: the agents ask the workers to save and stop, see --grace")
            elif re.match(r"export +SRUN_\w+=", statement.text):
                self._note(
                    statement, f"dropped {first_line(statement.text)!r}: elastic-sbatch writes its own srun line"
                )
            else:
                kept.append((statement.text, f"{self._name} line {statement.line}"))
                if not _is_plain(statement) and (size := _size(statement.text)):
                    self._note(statement, f"${size} is not the size of an elastic job, which changes while it runs")
        for word in self.launch.script_args:
            if size := _size(word):
                self._note(self._statement, f"{word!r}: the size of an elastic job changes, ${size} does not")
        return kept

    def _folder(self, lines: Sequence[str]) -> str | None:
        folder = ""
        for line in lines:
            if match := re.fullmatch(r"cd (?:-- )?(\S+)", line):
                target = self._variables.resolve(match[1])
                if target is None:
                    return None
                folder = posixpath.join(folder, target)
            elif re.search(r"\b(cd|pushd|popd)\b", line):
                return None
        return folder

    def _leave_out(self, after: Sequence[Statement]) -> None:
        left = [statement for statement in after if statement.text not in {"wait", "exit", "exit 0", "exit $?"}]
        if left:
            shown = ", ".join([repr(first_line(statement.text)) for statement in left[:3]] + ["..."] * (len(left) > 3))
            self._note(left[0], f"dropped what follows the launch, {shown}: to run it after the job, submit it with "
                       "--dependency=afterok:JOB")  # fmt: skip


def _size(text: str) -> str:
    """The first variable of ``text`` that counts nodes or tasks."""
    return next(filter(_OF_TASKS.fullmatch, names(text)), "")


def _rendezvous(found: Sequence[Statement], used: Sequence[str]) -> set[Statement]:
    """The statements whose only purpose is to let nodes find each other, or to print how. ``used``: the text of the
    launch and of the lines that belong to it, whose variables are needed.
    """
    simple = [statement for statement in found if not statement.compound and len(statement.parts()) == 1]
    variables = {statement: _defined(statement) for statement in simple}
    mentioned = {statement: set(names(statement.text)) for statement in found}
    dropped = {
        statement for statement, defined in variables.items()
        if defined and (any(map(OF_RENDEZVOUS.fullmatch, defined)) or _OF_NODES.search(statement.text))
    }  # fmt: skip
    harmless = {statement for statement in simple if variables[statement] or _command(statement) in {"echo", "printf"}}
    while True:
        of_dropped = {name for statement in dropped for name in variables[statement]}
        more = {statement for statement in harmless - dropped if mentioned[statement] & of_dropped}
        if not more:
            break
        dropped |= more
    while True:
        needed = {name for text in used for name in names(text)}
        needed = needed.union(*(mentioned[statement] for statement in found if statement not in dropped))
        back = {statement for statement in dropped if needed.intersection(variables[statement])}
        if not back:
            return dropped
        dropped -= back


def _command(statement: Statement) -> str:
    return statement.text.split()[0]


def _defined(statement: Statement) -> list[str]:
    """The variables that a statement sets, if it does nothing else."""
    words = statement.parts()[0][1]
    if words[:1] and words[0] in {"mapfile", "readarray", "read"}:
        return [word for word in words[1:] if word[0] != "-"]
    return [match[1] for match in map(ASSIGNS.fullmatch, assigned(words)) if match]


def _is_plain(statement: Statement) -> bool:
    return not statement.compound and bool(ASSIGNS.fullmatch(statement.text)) and len(statement.tokens) <= 2
