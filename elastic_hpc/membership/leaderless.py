"""What an agent does when it has been without a leader for some time. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LEADERLESS = "agents without a leader"
"""The ``actor`` of a verdict that no majority has agreed to. It holds until a leader continues the run."""

JOINER_PATIENCE = 30.0
"""Least number of seconds for which a joiner looks for a leader."""


@dataclass(frozen=True)
class KeepLooking:
    """Continue to look for the leader."""

    unreachable: bool = False
    """Whether there is a leader that this node has never reached."""


@dataclass(frozen=True)
class GiveUp:
    """Leave the job, which ends, or continues, without this agent."""

    outcome: str
    reason: str
    unreachable: bool = False


@dataclass(frozen=True)
class Conclude:
    """Act on ``verdict``, which a lost leader has written. If it is None, this agent has to write a verdict."""

    verdict: Mapping[str, Any] | None


def without_leader(
    waited: float,
    why: str,
    *,
    joins: bool,
    ever_led: bool,
    patient: bool,
    heartbeat_timeout: float,
    read_verdict: Callable[[], Mapping[str, Any] | None],
    somebody_leads: Callable[[], bool],
    somebody_acts: Callable[[], bool],
) -> KeepLooking | GiveUp | Conclude:
    """``waited``: seconds without a leader, because of ``why``. ``joins``: this agent is a joiner, which never ends the
    job, and never keeps its node for a job that has ended or cannot be reached. ``ever_led``: this agent has obeyed a
    leader before. ``patient``: this agent may still wait. ``read_verdict`` returns the verdict of this run or None,
    ``somebody_leads`` whether there is a leader, reached or not, and ``somebody_acts`` whether another agent ends or
    requeues the job. These functions may take long, and are called only where the answer decides.
    """
    if joins:
        if verdict := read_verdict():
            return GiveUp("lost", f"the job has ended: {verdict['reason']}")
        if waited < max(JOINER_PATIENCE, 4 * heartbeat_timeout):
            return KeepLooking()
        return GiveUp("lost", f"no leader was found for {waited:.0f} s: {why}", unreachable=somebody_leads())
    if somebody_leads():
        return KeepLooking(unreachable=not ever_led and waited > 2 * heartbeat_timeout)
    if somebody_acts():
        return GiveUp("lost", "another agent ends or requeues the job")
    if patient:
        return KeepLooking()
    verdict = read_verdict()
    if verdict and verdict.get("actor") == "batch script":  # the batch script acts when the last agent has left
        return GiveUp(verdict["outcome"], verdict["reason"])
    return Conclude(verdict)
