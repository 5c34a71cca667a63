"""What the agent's workers part needs from the rest of the agent: the connection to the leader, and the rendezvous."""

from __future__ import annotations

from typing import Protocol

from elastic_hpc.membership.hangs import Signs
from elastic_hpc.membership.messages import Failure, Order, Plan, State
from elastic_hpc.membership.slow import Pace
from elastic_hpc.training.progress import Progress


class LeaderConnection(Protocol):
    """The agent's connection to the leader (``agent.bridge.Control``). ``must_stop`` raises JobEnded."""

    wake_fd: int
    """Readable when a new order has come."""

    @property
    def order(self) -> Order | None: ...
    def must_stop(self, round: int) -> str | None: ...
    def report(self, state: State, round: int, failure: Failure | None = None, *, drained: bool = False) -> None: ...
    def report_progress(self, progress: Progress, /, *, live: bool, signs: Signs, pace: Pace) -> None: ...
    def report_start(self, *, kept: int, not_kept: str, warm: int, cold: int, why: str, standby_mb: float) -> None: ...
    def report_unfit(self, why: str) -> None: ...
    def on_signal(self) -> None: ...


class Rendezvous(Protocol):
    """The rendezvous handler of the agent (``agent.rendezvous``)."""

    restart_wanted: bool
    """Set this when the workers of the current round must stop."""

    @property
    def round(self) -> int: ...
    @property
    def plan(self) -> Plan: ...
