"""The table of torchrun's options, with the counterpart of each in an elastic job. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from elastic_hpc.errors import UsageError
from elastic_hpc.options.sbatch import Given, Option, last, scan
from elastic_hpc.options.values import TORCHRUNS_STREAMS

SAME = (
    *(Option(name) for name in ("nproc-per-node", "rdzv-endpoint", "rdzv-id", "rdzv-conf", "max-restarts", "log-dir")),
    *(Option(name) for name in ("role", "local-ranks-filter", "numa-binding")),
    Option("tee", "t"),
    Option("module", "m", ""),
    Option("no-python", value=""),
)
"""Options that elastic jobs have under the same name, with the same meaning."""


@dataclass(frozen=True)
class _Judged:
    """An option without a counterpart. A value that matches ``done`` has no effect: ``because`` says how elastic jobs
    do the same anyway. Other values are refused, and ``instead`` says what to use.
    """

    option: Option
    done: str = ""
    because: str = ""
    instead: str = ""


_FILTERS = "all output is in files: elastic-hpc logs JOB | grep WORD"

_MASTER = ("master-addr", "master-port")
_JUDGED = {row.option.name: row for row in (
    _Judged(Option("rdzv-backend"), "c10d|static|elastic-hpc",
            because="the agents meet at a rendezvous on one of the job's nodes",
            instead="the rendezvous runs on one of the job's nodes, without a server; leave out --rdzv-backend, and "
                    "the --rdzv-endpoint of a server"),
    _Judged(Option("node-rank"), "0?",
            because="one command starts the agents of all nodes and numbers them",
            instead="one command starts the agents of all nodes and numbers them; leave it out"),
    _Judged(Option("monitor-interval"), r"\d+\.?\d*|\.\d+",
            because="the end of a worker is noticed at once",
            instead="expected a number of seconds, for example 0.1; the end of a worker is noticed at once anyway"),
    _Judged(Option("start-method"), "spawn|fork|forkserver",
            because="a script is a process of its own, as under torchrun",
            instead="expected spawn, fork or forkserver; a script is a process of its own anyway"),
    _Judged(Option("event-log-handler"), "null",
            because="the run directory has the job's events",
            instead="the run directory has the job's events: elastic-hpc timeline JOB"),
    _Judged(Option("redirects", "r"), TORCHRUNS_STREAMS.pattern,
            because="the run directory has the output of each rank anyway",
            instead="expected 0 to 3, or RANK:0 to 3 separated by commas; the run directory has the output of each "
                    "rank anyway"),
    _Judged(Option("duplicate-stdout-filters"), instead=_FILTERS),
    _Judged(Option("duplicate-stderr-filters"), instead=_FILTERS),
    _Judged(Option("logs-specs"), instead="the output of each rank is in the run directory: elastic-hpc logs JOB"),
    _Judged(Option("local-addr"), instead="use --interface IFNAME, the network interface of every node"),
    _Judged(Option("signals-to-handle"), r"(SIG)?(TERM|INT|HUP|QUIT)(,(SIG)?(TERM|INT|HUP|QUIT))*",
            because="the agents handle these signals",
            instead="use --drain-signal NAME for what the workers get before the time limit and at a preemption, and "
                    "--signal=NAME@SECONDS for when they get it"),
    _Judged(Option("shutdown-timeout"), instead="use --grace SECONDS, the time that workers have to save and stop"),
    _Judged(Option("virtual-local-rank", value=""),
            instead="each worker sees all GPUs of its node; for one GPU per worker: --no-python bash -c "
                    "'CUDA_VISIBLE_DEVICES=$LOCAL_RANK exec python \"$@\"' - train.py"),
    _Judged(Option("run-path", value=""), ".*", "the script runs as __main__"),
    _Judged(Option("use-env", value=""), ".*", "workers have their ranks in the environment"),
)}  # fmt: skip
OPTIONS = (
    *(Option("nnodes"), Option("standalone", value=""), *map(Option, _MASTER), *SAME),
    *(row.option for row in _JUDGED.values()),
)
"""All options of torchrun, and ``--use-env`` of torch.distributed.launch."""

_HOST = "the rendezvous is on the job's own first node"
OF_EACH_JOB = {
    **dict.fromkeys(("rdzv-endpoint", "master-addr", "master-port"), _HOST),
    "rdzv-id": "the ID of the run is the job's ID",
    "node-rank": "the agents number the nodes",
}
"""Options whose value differs between jobs or nodes, and why a batch script need not compute the value."""

_LOCAL_HOSTS = {"127.0.0.1", "localhost", "::1", "[::1]"}


def translate(given: Sequence[Given]) -> tuple[list[Given], list[Given]]:
    """``given`` with our options in place of torchrun's, and the options of torchrun that have no counterpart: see
    ``unneeded``. Other options stay.
    """
    ours: list[Given] = []
    others: list[Given] = []
    for option in given:
        if option.name == "nnodes":
            ours.append(replace(option, option=Option("nodes")))
        elif option.name == "standalone":
            ours.insert(0, Given(Option("nodes"), "1", option.source))
        elif option.name in _JUDGED:
            others.append(option)
        elif option.name not in _MASTER:
            ours.append(option)
    address, port = (last(given, name) for name in _MASTER)
    host = "" if address in _LOCAL_HOSTS else address or ""
    if (host or port) and last(given, "rdzv-endpoint") is None:  # as torchrun does
        shown = f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host
        source = next(option.source for option in given if option.name in _MASTER)
        ours.append(Given(Option("rdzv-endpoint"), f"{shown}:{port}" if port else shown, source))
    return ours, others


def unneeded(given: Given) -> str:
    """Why ``given``, an option without a counterpart, has no effect. If its value requests something that elastic jobs
    do not do, raises UsageError, which says what to use.
    """
    row = _JUDGED[given.name]
    if row.done and re.fullmatch(row.done, given.value or ""):
        return row.because
    shown = given.flag if given.value is None else f"{given.flag} {given.value}"
    raise UsageError(f"{shown}: {row.instead}")


@dataclass(frozen=True)
class TorchrunCommand:
    """A command line of torchrun, with options of elastic jobs in place of torchrun's."""

    options: tuple[tuple[str, str], ...]
    """Our options with their values as written: ``("nodes", "2:4")``."""
    module: bool
    no_python: bool
    script: str
    script_args: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    """Options that are left out, as they were given, and why."""


def parse_command(argv: Sequence[str]) -> TorchrunCommand:
    """Read the arguments of a ``torchrun``. Raises UsageError if torchrun would refuse them.

    A value that a shell expands stays as it is written. An option of ``OF_EACH_JOB`` with such a value is dropped.
    """
    given, rest = scan(argv, OPTIONS, ())
    if not rest:
        raise UsageError(f"{' '.join(argv)!r}: expected a script after the options of torchrun")
    dropped: list[tuple[str, str]] = []
    kept = []
    for option in given:
        if option.name in OF_EACH_JOB and re.search("[$`]", option.value or ""):
            dropped.append((str(option), OF_EACH_JOB[option.name]))
        else:
            kept.append(option)
    ours, others = translate(kept)
    for option in others:
        try:
            dropped.append((str(option), unneeded(option)))
        except UsageError as error:
            dropped.append((str(option), str(error).partition(": ")[2]))
    return TorchrunCommand(
        tuple((option.name, option.value or "") for option in ours if option.value is not None),
        any(option.name == "module" for option in ours),
        any(option.name == "no-python" for option in ours),
        rest[0],
        tuple(rest[1:]),
        tuple(dropped),
    )
