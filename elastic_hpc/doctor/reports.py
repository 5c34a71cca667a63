"""What the nodes of the doctor's job report, and how the job ended. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

FIRST_PORT, LAST_PORT = 29400, 29499
SCHEMA = 1
LATE = "late"
END_TIMEOUT = 45.0
"""Seconds to wait for the end of the job after its cancellation."""


@dataclass(frozen=True)
class Dial:
    """One attempt to connect. ``error`` is empty if it succeeded."""

    address: str
    port: int
    any_port: bool
    """Whether the port is outside the agents' range: workers talk over ports that the system chooses."""
    error: str = ""


@dataclass(frozen=True)
class PeerReport:
    """What one node measured about another node. Times in seconds; None for what could not be measured."""

    resolves: tuple[str, ...] = ()
    dials: tuple[Dial, ...] = ()
    ahead: float | None = None
    """The other node's clock minus this node's."""
    seen_after: float | None = None
    """Time from when the other node made a file until this node saw the file."""
    lock_held: bool | None = None
    """Whether the other node's flock on that file was effective on this node."""
    error: str = ""


@dataclass(frozen=True)
class NodeReport:
    """What one node found out."""

    node: str
    hostname: str
    python: str
    torch: str
    """Version, empty if torch is not installed."""
    elastic_hpc: str
    interfaces: Mapping[str, str]
    """The address of each interface."""
    gpus_granted: str | None
    gpus_visible: str | None
    gpu_devices: int
    created: bool
    """Whether this node made the file that all nodes tried to make with O_EXCL."""
    problems: tuple[str, ...] = ()
    peers: Mapping[str, PeerReport] = field(default_factory=dict)

    def as_body(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> NodeReport:
        """The report in ``body``. Raises ValueError if another version wrote it."""
        if body.get("schema") != SCHEMA:
            raise ValueError(f"report of another version of elastic_hpc: schema {body.get('schema')}")
        values = {name: value for name, value in body.items() if name != "schema"}
        values["peers"] = {name: _peer(body) for name, body in values["peers"].items()}
        values["problems"] = tuple(values["problems"])
        return cls(**values)


def _peer(body: Mapping[str, Any]) -> PeerReport:
    dials = tuple(Dial(**dial) for dial in body["dials"])
    return PeerReport(**{**body, "dials": dials, "resolves": tuple(body["resolves"])})


@dataclass(frozen=True)
class ProbeRun:
    """The doctor's job: its nodes, their reports, and how it ended."""

    nodes: tuple[str, ...]
    """The nodes that Slurm gave to the job."""
    reports: tuple[NodeReport, ...]
    may_requeue: bool
    """Whether Slurm lets the job, with ``--requeue``, back into the queue."""
    ended: str
    """Slurm's word for the last state of the job; ``LATE`` if it did not end in time."""
    causes: Mapping[str, str] = field(default_factory=dict)
    """Why there is no report, by node; under "" for the whole job."""
    completed_after: float | None = None
    """Seconds until the nodes of the job were free, at most ``END_TIMEOUT``; None for unknown."""


def pairs(reports: Sequence[NodeReport]) -> list[tuple[NodeReport, str, PeerReport]]:
    """Every ordered pair of nodes that have reported, with the first node's report on the second."""
    names = {report.node: report for report in reports}
    both = [pair for a, b in combinations(sorted(names), 2) for pair in ((a, b), (b, a))]
    return [(names[a], b, names[a].peers.get(b, PeerReport(error="did not report in time"))) for a, b in both]
