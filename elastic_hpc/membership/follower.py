"""What an agent does about the leader's latest order. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_hpc.membership.messages import Order, Plan, Status


@dataclass(frozen=True)
class Wait:
    """Do nothing."""


@dataclass(frozen=True)
class Stop:
    """Stop the workers."""

    reason: str


@dataclass(frozen=True)
class Acknowledge:
    """Report to the leader that none of this node's workers is alive, in answer to ``round``; 0 for a newcomer."""

    round: int


@dataclass(frozen=True)
class Start:
    """Start the workers of ``round``."""

    round: int
    plan: Plan


@dataclass(frozen=True)
class End:
    """Leave: the job has ended; with ``alone``, only for this agent."""

    outcome: str
    reason: str
    alone: bool


def step(order: Order | None, status: Status, workers: int) -> Wait | Stop | Acknowledge | Start | End:
    """``order``: the leader's latest, None while no leader is connected. ``workers``: the round whose workers are alive
    on this node or have just ended, 0 for none.
    """
    if order is not None and order.stage == "end":
        return End(order.outcome or "failed", order.reason, order.alone)
    if workers:
        if order is None:
            return Stop("the leader is lost")
        return Wait() if order.stage == "run" and order.round == workers else Stop(order.reason)
    if order is not None and order.stage == "gather":
        return Wait() if (status.state, status.round) == ("idle", order.round) else Acknowledge(order.round)
    if status.state == "failed" and order is not None and order.round == status.round:
        return Wait()  # the leader has received the report when it gathers the next round
    if status.state != "idle":  # the workers have stopped since: this node is a newcomer now
        return Acknowledge(0)
    if order is not None and order.plan and status.round == order.round:
        return Start(order.round, order.plan)
    return Wait()
