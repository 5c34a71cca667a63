"""Values of options: how they are written, how they are read, what they mean. Pure."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from itertools import pairwise

from elastic_hpc.errors import UsageError
from elastic_hpc.options import durations

DEFAULT_PORT = 29400
_LOCALHOST = frozenset({"localhost", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback"})
_SOME_SIZES = r"\d{1,6}(?:-\d{1,6}(?::0*[1-9]\d{0,5})?)?"


@dataclass(frozen=True)
class NodeRange:
    """``MIN:MAX`` nodes, as in ``torchrun --nnodes``. One number means a job of fixed size.

    ``sizes``: the exact numbers of ``4,6,8``, ascending from ``min`` to ``max``; None for all numbers between.
    """

    min: int
    max: int
    sizes: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> NodeRange:
        if match := re.fullmatch(r"(\d{1,6})(?:[:-](\d{1,6}))?", text, re.ASCII):  # sbatch has a dash there
            low, high = int(match[1]), int(match[2] or match[1])
            if 1 <= low <= high:
                return cls(low, high)
        elif re.fullmatch(rf"{_SOME_SIZES}(,{_SOME_SIZES})*", text, re.ASCII):
            parts = [_sizes(part) for part in text.split(",")]
            sizes = tuple(size for part in parts for size in part)
            if all(parts) and sizes[0] >= 1 and all(a < b for a, b in pairwise(sizes)):
                return cls(sizes[0], sizes[-1], sizes if len(sizes) > 1 else None)
        raise UsageError(
            f"--nodes {text!r}: expected N or MIN:MAX with 1 <= MIN <= MAX, for example --nodes 4:8, "
            "or exact numbers in ascending order, for example --nodes 4,6,8"
        )

    def __str__(self) -> str:
        return ",".join(map(str, self.sizes)) if self.sizes else f"{self.min}:{self.max}"

    @property
    def slurm(self) -> str:
        """The range in sbatch's own notation: ``4-8``, or ``4``."""
        return f"{self.min}-{self.max}" if self.min < self.max else str(self.min)


def _sizes(part: str) -> range:
    """The sizes in one part of sbatch's list of sizes: ``4``, ``4-8`` or ``4-8:2``."""
    bounds, _, step = part.partition(":")
    low, _, high = bounds.partition("-")
    return range(int(low), int(high or low) + 1, int(step or 1))


@dataclass(frozen=True)
class Endpoint:
    """``HOST[:PORT]``. ``host`` is None for the first host of the step. Port 0 stands for the default port."""

    host: str | None = None
    port: int = DEFAULT_PORT

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]\s]*)(?::(\d{1,5}))?", text, re.ASCII)
        if match and text:
            host, port = match[1].strip("[]"), int(match[2] or 0) or DEFAULT_PORT
            if port < 65536:
                return cls(host or None, port)
        raise UsageError(
            f"--rdzv-endpoint {text!r}: expected HOST[:PORT] or :PORT, for example --rdzv-endpoint node01:29400"
        )

    @property
    def head(self) -> str | None:
        """The host, if the user named one. ``localhost`` does not count: it stands for every node."""
        return None if self.is_loopback else self.host

    @property
    def is_loopback(self) -> bool:
        """Whether the host means each machine itself: ``localhost``, ``127.0.0.1``, ``::1``, ``0.0.0.0``."""
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(self.host or "")
            return address.is_loopback or address.is_unspecified
        name = (self.host or "").lower().rstrip(".")
        return name.partition(".")[0] in _LOCALHOST or name.endswith(".localhost")

    def __str__(self) -> str:
        host = self.host or ""
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


def number(text: str) -> int | None:
    """``text`` as a whole number of at most nine ASCII digits; None if ``text`` is anything else."""
    return int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else None


def nproc(text: str) -> str:
    if text in {"auto", "gpu", "cpu"} or number(text):
        return text
    raise UsageError(f"--nproc-per-node {text!r}: expected gpu, cpu, auto or a number above 0, for example 8")


def count(text: str) -> int:
    if (found := number(text)) is not None:
        return found
    raise UsageError(f"{text!r}: expected a whole number, 0 or more, for example 10")


def port(text: str) -> int:
    if (found := number(text)) is not None and found < 65536:
        return found
    raise UsageError(f"{text!r}: expected a port, 0 to 65535, where 0 stands for any free port; for example 9650")


def positive(text: str) -> int:
    if found := number(text):
        return found
    raise UsageError(f"{text!r}: expected a whole number, 1 or more, for example 8")


def absolute(text: str) -> str:
    if text.startswith("/"):
        return text
    raise UsageError(f"{text!r}: expected a folder as all nodes see it, with a /, for example /shared/health")


def ranks(text: str) -> str:
    if re.fullmatch(r"\d{1,6}(,\d{1,6})*", text, re.ASCII):
        return text
    raise UsageError(f"{text!r}: expected local ranks separated by commas, for example 0,1")


def tee(text: str) -> str:
    """Ranks, or what torchrun's --tee takes."""
    spans = [re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", span, re.ASCII) for span in text.split(",")]
    are_ranks = all(span and int(span[1]) <= int(span[2] or span[1]) for span in spans)
    if are_ranks or text == "all" or TORCHRUNS_STREAMS.fullmatch(text):
        return text
    raise UsageError(f"{text!r}: expected all, or ranks separated by commas, for example 0,8-15")


TORCHRUNS_STREAMS = re.compile(r"[0-3]|\d+:[0-3](,\d+:[0-3])*", re.ASCII)
"""The values of torchrun's --tee and --redirects: streams (3 for both) of all local ranks or of single ranks."""


def choice(*words: str) -> Callable[[str], str]:
    """A parser that accepts one of ``words``."""

    def parse(text: str) -> str:
        if text in words:
            return text
        raise UsageError(f"{text!r}: expected {', '.join(words[:-1])} or {words[-1]}")

    return parse


def on_off(text: str) -> bool:
    if text in {"on", "off"}:
        return text == "on"
    raise UsageError(f"{text!r}: expected on or off")


def yield_to(text: str) -> str:
    if re.fullmatch(r"pending|user|(qos|partition):[^\s,:]+", text):
        return text
    raise UsageError(f"{text!r}: expected pending, user, qos:NAME or partition:NAME, for example qos:urgent")


def setup_line(text: str) -> str:
    if re.search(r"[\r\0]", text):
        raise UsageError(f"--setup {text!r}: sbatch refuses scripts with DOS line breaks; expected plain lines")
    return text


def variable(text: str) -> tuple[str, str]:
    """The name and the value of ``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in value:
        raise UsageError(f"--env {text!r}: expected NAME=VALUE, for example --env OMP_NUM_THREADS=8")
    return name, value


def notify(text: str) -> str:
    """A command, or a web address."""
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that is not closed
        words = []
    is_command = bool(words) and not re.match(r"[\w+.-]+:/|\w+=", words[0])
    if not text.isprintable() or not (is_command or is_web_address(text)):
        raise UsageError(
            f"--notify {text!r}: expected a command, for example 'mail -s job me@example.org', or a web address that "
            "begins with http:// or https:// and has a host"
        )
    return text


def is_web_address(text: str) -> bool:
    """Whether the value of ``--notify`` is a web address, not a command."""
    return bool(re.fullmatch(r"https?://[^\s/?#]\S*", text, re.IGNORECASE))


def interpreter(text: str) -> tuple[str, ...]:
    """The words of a Python interpreter and its own options."""
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that is not closed, a null byte
        words = []
    if not words or not words[0]:
        raise UsageError(
            f"--python {text!r}: expected a Python interpreter, for example --python python3, "
            "or with options of its own: --python 'python3 -X faulthandler'"
        )
    return tuple(words)


def container_image(text: str) -> str:
    if not text:
        raise UsageError("--container-image '': expected an image, for example --container-image train.sif")
    return text


def container_mounts(text: str) -> str:
    for mount in text.split(","):
        source, _, target = mount.partition(":")
        if not source or not target.startswith("/"):
            raise UsageError(
                f"--container-mounts {text!r}: expected SRC:DST[:FLAGS] with an absolute DST, separated by commas, for "
                "example --container-mounts /data:/data:ro,/scratch:/scratch"
            )
    return text


@dataclass(frozen=True)
class Preload:
    """``--preload auto|MODULE,...|off``: the modules that a standby imports before the job needs it."""

    modules: tuple[str, ...] = ("torch",)
    learns: bool = True
    """``auto``: a standby also imports the modules that the script imported in an earlier round."""

    @classmethod
    def parse(cls, text: str) -> Preload:
        if text == "off":
            return cls((), learns=False)
        words = text.split(",")
        learns = "auto" in words
        modules = tuple(dict.fromkeys(word if word != "auto" else "torch" for word in words))
        if all(re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module) for module in modules):
            return cls(modules, learns)
        raise UsageError(
            f"--preload {text!r}: expected auto, MODULE,... or off, for example --preload auto,transformers"
        )

    def __str__(self) -> str:
        names = ["auto" if name == "torch" and self.learns else name for name in self.modules]
        return ",".join(names) or "off"


@dataclass(frozen=True)
class HangTimeout:
    """``--hang-timeout auto|TIME|off``: the silence after which workers hang. None for ``off`` and ``auto``."""

    limit: timedelta | None = None
    learns: bool = True
    """``auto``: the leader learns the time from the job."""

    @classmethod
    def parse(cls, text: str) -> HangTimeout:
        if text == "auto":
            return cls()
        if text == "off" or re.fullmatch(r"0+(\.0*)?", text, re.ASCII):
            return cls(None, learns=False)
        try:
            return cls(durations.parse(text), learns=False)
        except UsageError:
            raise UsageError(
                f"--hang-timeout {text!r}: expected auto, off, or a time above 0, for example --hang-timeout 10m"
            ) from None

    def __str__(self) -> str:
        return durations.as_text(self.limit) if self.limit else "auto" if self.learns else "off"


@dataclass(frozen=True)
class SlowNode:
    """``--slow-node FACTOR[:leave]|off``: a node is slow if its steps take FACTOR times as long as the steps of the
    other nodes; 0 for ``off``.
    """

    factor: float = 1.5
    leaves: bool = False
    """Whether the job leaves a slow node, or only reports it."""

    @classmethod
    def parse(cls, text: str) -> SlowNode:
        if text == "off":
            return cls(0.0)
        found = re.fullmatch(r"(\d+(?:\.\d*)?)(:leave)?", text, re.ASCII)
        if found and 1.1 <= float(found[1]) <= 100:
            return cls(float(found[1]), bool(found[2]))
        raise UsageError(
            f"--slow-node {text!r}: expected FACTOR or FACTOR:leave with FACTOR from 1.1 to 100, or off, for example "
            "--slow-node 1.5:leave"
        )

    def __str__(self) -> str:
        return f"{self.factor:g}{':leave' * self.leaves}" if self.factor else "off"


@dataclass(frozen=True)
class DrainSignal:
    """``--drain-signal SIGNAL``, as sbatch names it; ``number`` is 0 for ``off``."""

    number: int

    @classmethod
    def parse(cls, text: str) -> DrainSignal:
        if text == "off":
            return cls(0)
        name = text.upper().removeprefix("SIG")
        known = {sig.name.removeprefix("SIG"): sig for sig in signal.Signals}
        found = known.get(name) or (number(name) in set(known.values()) and signal.Signals(int(name)))
        if found and found not in {signal.SIGKILL, signal.SIGSTOP}:
            return cls(found)
        raise UsageError(
            f"--drain-signal {text!r}: expected a signal that a process can handle, for example --drain-signal USR1, "
            "or off"
        )

    def __str__(self) -> str:
        return signal.Signals(self.number).name if self.number else "off"


_TORCHS_OWN = frozenset(
    {
        *("timeout", "close_timeout", "read_timeout", "heartbeat", "keep_alive_interval", "keep_alive_max_attempt"),
        *("is_host", "store_type", "use_libuv", "rank"),
    }
)
"""Keys of torch's rendezvous and store that have no effect on an elastic job."""


@dataclass(frozen=True)
class RdzvConf:
    """``--rdzv-conf KEY=VALUE,...`` with torchrun's keys. Other keys of torch's rendezvous are accepted without effect.

    ``join_timeout``: how long a start waits for MIN nodes before it gives the allocation back.
    ``last_call_timeout``: how long it waits, once MIN are there, for the rest of the granted nodes.
    """

    join_timeout: timedelta = timedelta(seconds=600)
    last_call_timeout: timedelta = timedelta(seconds=30)

    @classmethod
    def parse(cls, text: str) -> RdzvConf:
        values: dict[str, timedelta] = {}
        for pair in filter(None, text.split(",")):
            key, _, value = pair.partition("=")
            if key in _TORCHS_OWN:
                continue
            if key not in {f.name for f in fields(cls)}:
                known = ", ".join(f.name for f in fields(cls))
                raise UsageError(
                    f"--rdzv-conf {pair!r}: expected KEY=TIME with KEY one of {known}, "
                    "for example --rdzv-conf last_call_timeout=60"
                )
            try:
                values[key] = durations.parse(value)
            except UsageError as error:
                raise UsageError(f"--rdzv-conf {key}={error}") from None
        return cls(**values)

    def __str__(self) -> str:
        return ",".join(f"{f.name}={durations.as_text(getattr(self, f.name))}" for f in fields(self))
