"""sbatch's options: the table of them, a scanner that stops at the script, and what an elastic job refuses. Pure."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from elastic_hpc.errors import UsageError, did_you_mean

# In the manual's notation: --name= takes a value, --name[=] may take one, --name takes none. Slurm 22.05 to 26.05,
# and the older names that sbatch still accepts. `-K` is an option of srun; it is here so that it is refused by name.
_TABLE = """
-A,--account= --acctg-freq= -a,--array= --batch= --bb= --bbf= -b,--begin= -D,--chdir= --cluster-constraint=
-M,--clusters= --comment= --consolidate-segments -C,--constraint= --container= --container-id= --container-type=
--contiguous -S,--core-spec= --cores-per-socket= --cpu-freq= --cpus-per-gpu= -c,--cpus-per-task= --deadline=
--delay-boot= -d,--dependency= -m,--distribution= -e,--error= -x,--exclude= --exclusive[=] --export= --export-file=
--extra= -B,--extra-node-info= --get-user-env[=] --gid= --gpu-bind= --gpu-freq= -G,--gpus= --gpus-per-node=
--gpus-per-socket= --gpus-per-task= --gres= --gres-flags= -h,--help --hint= -H,--hold --ignore-pbs -i,--input=
-J,--job-name= -K,--kill-on-bad-exit[=] --kill-on-invalid-dep= -L,--licenses= --mail-type= --mail-user= --mcs-label=
--mem= --mem-bind= --mem-per-cpu= --mem-per-gpu= --mem-update= --mincpus= --network= --nice[=] -k,--no-kill[=]
--no-requeue -F,--nodefile= -w,--nodelist= -N,--nodes= -n,--ntasks= --ntasks-per-core= --ntasks-per-gpu=
--ntasks-per-node= --ntasks-per-socket= --ntasks-per-tres= --oom-kill-step[=] --open-mode= -o,--output=
-O,--overcommit -s,--oversubscribe --parsable -p,--partition= --power= --prefer= --priority= --profile=
--propagate[=] -q,--qos= -Q,--quiet --reboot --requeue[=] --reservation= --resources= --resv-ports[=] --segment=
--share --signal= --sockets-per-node= --spread-job --spread-segments --stepmgr --switches= --tasks-per-node=
--test-only --thread-spec= --threads-per-core= -t,--time= --time-min= --tmp= --tres-bind= --tres-per-task= --uid=
--usage --use-min-nodes -v,--verbose -V,--version -W,--wait --wait-all-nodes= --wckey= --wrap=
"""


@dataclass(frozen=True)
class Option:
    """One option. ``value`` is ``"="`` if the option takes a value, ``"[=]"`` if it may take one after ``=``,
    and empty if it takes none.
    """

    name: str
    letter: str = ""
    value: str = "="
    metavar: str = field(default="VALUE", compare=False)

    @property
    def flag(self) -> str:
        return f"--{self.name}"


COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Given:
    """An option with its value, and the source of both: the command line, a configuration file, a variable."""

    option: Option
    value: str | None
    source: str = COMMAND_LINE

    def __str__(self) -> str:
        return self.flag if self.value is None else f"{self.flag}={self.value}"

    @property
    def flag(self) -> str:
        return self.option.flag

    @property
    def name(self) -> str:
        return self.option.name


def _rows(table: str) -> Iterable[Option]:
    for row in table.split():
        match = re.fullmatch(r"(?:-(\w),)?--([\w-]+)(=|\[=\])?", row)
        assert match, row
        yield Option(match[2], match[1] or "", match[3] or "")


SBATCH = {option.name: option for option in _rows(_TABLE)}
_SBATCHS = tuple(SBATCH.values())

_ABOUT = frozenset({"help", "usage", "version"})
_TASKS = (
    "with a task count Slurm grants only MIN nodes, and elastic-sbatch starts one agent per node by itself; "
    "use --nodes MIN:MAX, and --nproc-per-node N for the workers of a node"
)
_TASKS_PER_GPU = (
    "it makes the number of tasks follow from the GPUs, and elastic-sbatch starts one agent per node by itself; "
    "use --gpus-per-node=N, and --nproc-per-node N for the workers of a node"
)
_GPUS = "it hides the GPUs of a node's workers from each other, which breaks peer-to-peer; use --gpus-per-node=N"
REFUSED = {
    **dict.fromkeys(("ntasks", "ntasks-per-node", "tasks-per-node"), _TASKS),
    **dict.fromkeys(("ntasks-per-gpu", "ntasks-per-tres"), _TASKS_PER_GPU),
    "gpus-per-task": _GPUS,
    "tres-per-task": _GPUS,
    "no-requeue": "an elastic job comes back through the queue when nodes are lost; "
                  "leave it out, and use --max-requeues 0 to give up at the first loss below MIN",
    "kill-on-bad-exit": "it would end the job with the first node that fails; leave it out, "
                        "and use --max-restarts 0 to give up at the first failure",
    "use-min-nodes": "it makes Slurm prefer MIN nodes to MAX; use --nodes N for a job of fixed size",
    "wrap": "elastic-sbatch writes the batch script itself; "
            "give the training script as in: elastic-sbatch --nodes 2:4 train.py, and --setup LINE for shell lines",
}  # fmt: skip
"""Options that would break an elastic job, and why."""

COMMAND_LINE_ONLY = frozenset({"help", "usage", "version", "parsable", "wait", "quiet", "verbose", "test-only"})
"""Options about what sbatch does, not about the job: they cannot be #SBATCH lines."""


def check(given: Given, fixed: int | None = None) -> bool:
    """Whether to pass ``given`` to sbatch; False if the batch script has the option anyway. Raises UsageError
    for an option that breaks an elastic job. ``fixed``: the number of nodes, if the job is of fixed size.
    """
    name, value = given.name, given.value
    if value and value == {"ntasks": str(fixed), "ntasks-per-node": "1", "tasks-per-node": "1"}.get(name):
        return False
    for refused, reason in REFUSED.items():
        # getopt accepts unambiguous abbreviations, so --ntask=4 would reach sbatch as --ntasks=4
        if name == refused or (name not in SBATCH and refused.startswith(name)):
            raise UsageError(f"{given}: {reason}")
    if name == "no-kill" and value is not None:
        raise UsageError(f"{given}: then a lost node ends the whole job; leave it out")
    if name == "open-mode" and value != "append":
        raise UsageError(f"{given}: a requeue would wipe the log; leave it out, the mode is append")
    if name == "requeue" and value and "expedited".startswith(value.lower()):
        raise UsageError(
            f"{given}: Slurm would requeue and hold a job that has failed, and would not let the job choose "
            "its nodes and its start; leave it out, an elastic job requeues itself"
        )
    if name == "export" and (value or "").split(",")[0] != "ALL":
        raise UsageError(
            f"{given}: the agents need the environment of the submission; "
            "use --export=ALL,NAME=VALUE or --env NAME=VALUE"
        )
    if name == "signal":
        WarningSignal.parse(value or "")
    return not (name in {"no-kill", "open-mode"} or (name == "requeue" and value is None))


INSTEAD_OF_CONTAINER = "use --container-image IMAGE; for an OCI bundle with --container-runtime oci"


def is_for_containers(name: str) -> bool:
    """Whether ``name`` is an option for containers, of sbatch or pyxis, or the beginning of such a name."""
    return "container" in name or (name not in SBATCH and "container".startswith(name))


def scan(
    argv: Sequence[str], own: Sequence[Option], others: Sequence[Option] = _SBATCHS, command: str = "sbatch"
) -> tuple[list[Given], list[str]]:
    """Split ``argv`` into its options and, unchanged, the script with its arguments. Errors name ``command``. An option
    of ``own`` hides the option of ``others`` with the same name. If ``others`` are sbatch's, an unknown option may be
    for a newer sbatch; else errors suggest only options of ``own``. Reads nothing after --help.
    """
    by_name = {option.name: option for option in (*others, *own)}
    by_letter = {o.letter: o for o in (*others, *own) if o.letter}
    given: list[Given] = []
    rest = list(argv)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            name = name.replace("_", "-")  # torchrun accepts both in a name
            may_pass = others is _SBATCHS
            known = by_name if may_pass else [option.name for option in own]
            option = by_name.get(name) or _unknown(name, equals, known, command, may_pass=may_pass)
            given.append(_with_value(option, option.flag, text if equals else None, rest))
            if option.name in _ABOUT:
                return given, []
            continue
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter not in by_letter:
                within = f" in {word!r}" if len(word) > 2 else ""
                raise UsageError(f"-{letter}{within}: unknown option; {command} --help lists all options")
            option = by_letter[letter]
            text, letters = (letters, "") if option.value else ("", letters)
            given.append(_with_value(option, f"-{letter}", text or None, rest))
            if option.name in _ABOUT:
                return given, []
    return given, rest


def _with_value(option: Option, shown: str, value: str | None, rest: list[str]) -> Given:
    if option.value == "=" and value is None:
        if not rest:
            raise UsageError(f"{shown}: expected a value: {option.flag} {option.metavar}")
        value = rest.pop(0)
    elif not option.value and value is not None:
        raise UsageError(f"{shown}={value}: expected no value, for example {option.flag}")
    return Given(option, value)


def named(name: str) -> Option:
    """The long option ``name`` of sbatch. sbatch itself judges a name that is not in the table."""
    if option := SBATCH.get(name):
        return option
    if not re.fullmatch(r"[a-z][\w-]+", name):
        raise UsageError(f"{name!r}: expected a long option of sbatch without the dashes, for example gpus-per-node")
    return Option(name, value="[=]")


def _unknown(name: str, equals: str, known: Collection[str], command: str, *, may_pass: bool) -> Option:
    """The option that an unknown ``name`` means: the beginning of a name that only sbatch has, or an option of a newer
    sbatch.
    """
    begins = [candidate for candidate in known if candidate.startswith(name)]
    if may_pass and len(begins) == 1 and begins[0] in SBATCH and begins[0] not in COMMAND_LINE_ONLY:
        return SBATCH[begins[0]]
    for_sbatch = may_pass and equals  # sbatch itself judges a name that is close to its own options
    if for_sbatch and SBATCH.keys() >= set(begins):
        begins = []
    like = [candidate for candidate in known if candidate not in (SBATCH if for_sbatch else REFUSED)]
    hint = did_you_mean(name, like, 0.85 if for_sbatch else 0.7, "--")
    if meant := [candidate for candidate in begins if candidate not in REFUSED][:3]:
        hint = f"did you mean --{' or --'.join(meant)}?"
    if may_pass and ((equals and not hint) or is_for_containers(name)) and re.fullmatch(r"[a-z][\w-]*", name):
        return named(name)
    hints = [hint] if hint else []
    if may_pass:
        hints.append(f"an option that only sbatch knows needs its value after '=': --{name}=VALUE")
    raise UsageError(f"--{name}: unknown option; {' '.join(hints) or f'{command} --help lists all options'}")


def last(given: Sequence[Given], name: str) -> str | None:
    """The value of the option ``name``. The last value counts, as for sbatch."""
    return next((option.value for option in reversed(given) if option.name == name), None)


LONGEST_LEAD = 65535
"""The longest lead of a --signal that Slurm accepts, in seconds."""


@dataclass(frozen=True)
class WarningSignal:
    """sbatch's ``--signal``, which Slurm sends to the batch shell ``lead`` before the time limit, and at some sites
    before preemption.
    """

    name: str = "URG"
    """URG ends no process that has no handler: Slurm may send the signal just before the batch script sets its trap."""
    lead: timedelta = timedelta(seconds=120)
    before_reservations: bool = False
    """sbatch's ``R:``: the job may overlap a reservation, and gets the signal before the reservation begins."""

    @classmethod
    def parse(cls, text: str, lead: timedelta | None = None) -> WarningSignal:
        """Read ``text`` in any form that sbatch accepts. ``lead``: the default for a text without a time."""
        match = re.fullmatch(r"(?:([BR]{1,2}):)?(?:SIG)?([A-Z]+\d?|\d{1,2})(?:@(\d{1,5}))?", text.upper(), re.ASCII)
        name = match[2] if match else ""
        if name.isdecimal() and int(name) in set(signal.Signals):
            name = signal.Signals(int(name)).name.removeprefix("SIG")
        if match and f"SIG{name}" in signal.Signals.__members__ and int(match[3] or 0) <= LONGEST_LEAD:
            if name in {"TERM", "CONT", "KILL", "STOP", "INT", "CHLD"}:
                raise UsageError(f"--signal={text}: Slurm or the shell needs SIG{name} itself; use --signal=URG@120")
            given = timedelta(seconds=int(match[3])) if match[3] else lead or cls.lead
            return cls(name, given, "R" in (match[1] or ""))
        raise UsageError(
            f"--signal={text}: expected [B:|R:]SIGNAL[@SECONDS] with at most {LONGEST_LEAD} s, for example "
            "--signal=URG@120"
        )

    def __str__(self) -> str:
        return f"{'R' * self.before_reservations}B:{self.name}@{math.ceil(self.lead.total_seconds())}"
