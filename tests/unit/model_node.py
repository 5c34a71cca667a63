"""One node for the model checker: the real leader, the real agent's handling of orders and rosters, and workers that
are only a name. There are no sockets, time or threads; their actions are inputs.

A node is deterministic: the same input in the same state has the same effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import simulated

from elastic_hpc.membership import follower
from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.messages import Failure, Order, Redirect, Status
from elastic_hpc.membership.policy import Policy
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Roster, RosterChange
from elastic_hpc.membership.wishes import Bounds
from elastic_hpc.network.following import Follower

HOSTS = tuple(Host(node, f"n{node}", (f"10.0.0.{node}",), node) for node in range(8))

SLOTS = 8
"""Maximum number of connections of one agent to one leader, including those that the
leader has not yet found closed.
"""

TIMEOUT = 10.0

FROZEN = 2 * TIMEOUT
"""Seconds for which a leader is frozen."""

World = tuple[int, int]
"""A formed world: its unique number, and its number of nodes."""


def policy(least: int, most: int) -> Policy:
    """Only actions of the checker end a round, and nothing ends the job."""
    return replace(
        simulated.POLICY,
        min_nodes=least,
        max_nodes=most,
        grow=False,
        wait_for_nodes=1e9,
        max_restarts=10**6,
        max_requeues=0,
        heartbeat_timeout=TIMEOUT,
        join_timeout=1e9,
        last_call_timeout=0.0,
        grace=0.0,
    )


@contextlib.contextmanager
def timeless() -> Iterator[None]:
    """Without an event loop there is no clock. A leader that takes over does not wait: the checker decides by the order
    of deliveries whether it waits.
    """
    with (
        patch("elastic_hpc.network.following.now", lambda: 0.0),
        patch("elastic_hpc.membership.rules.TAKE_OVER_WAIT", 0.0),
        patch("elastic_hpc.membership.world.SETTLE", 0.0),
    ):
        yield


@dataclass
class Output:
    """The reactions of a node to one input."""

    up: list[Any]
    """Messages of the node's agent to its leader."""
    down: list[tuple[int, list[Any]]]
    """Messages of the node's own leader, by connection."""
    closed: list[int]
    """Connections that the node's own leader closes."""
    ended: bool = False
    """Whether the node's own leader has stopped leading."""


class Site:
    """A node. For ``Follower`` it is both the ``Node`` and the connection."""

    def __init__(self, index: int, rules: Policy, *, steps: bool) -> None:
        """``steps``: whether the workers report that they have done a step, without which no leader shrinks a world."""
        self.index, self.policy, self.steps = index, rules, steps
        self.leader: Leader | None = None
        self.gone = False
        """Whether the node was given back to Slurm, or is about to be."""
        self.begun = 0
        """Number of leaders that have started on this node. It serves as their clock, so that their rosters' marks
        differ.
        """
        self.slept = self.agents = 0
        self.out = Output([], [], [])
        self.kept = b""
        """The file in which this node keeps its promises."""
        self._new_agent(Promises(self.keep))

    def _new_agent(self, promises: Promises) -> None:
        self.promises = promises
        self.agents += 1
        self.own = Status(0, HOSTS[self.index], 1)
        self.order: Order | None = None
        self.round, self.world = 0, None
        self.follower = Follower(self, promises, TIMEOUT)  # type: ignore[arg-type]

    round: int
    """The round whose workers are alive or have just ended."""
    world: World | None
    """The world of the living workers."""

    @property
    def clock(self) -> float:
        return self.begun * 0.001 + self.slept * FROZEN

    def keep(self, promises: bytes) -> None:
        self.kept = promises

    # needed by the follower

    def status(self) -> Status:
        return self.own

    def set_order(self, order: Order | None, _link: object) -> None:
        self.order = order

    def send(self, *messages: Any) -> None:
        self.out.up.extend(messages)

    def close(self) -> None:
        raise AssertionError("no message closes a connection")

    # the state of a node

    @property
    def linked(self) -> bool:
        return self.follower._link is not None

    @property
    def must_act(self) -> bool:
        """Whether the agent's main thread has something to do."""
        return not isinstance(follower.step(self.order, self.own, self.round), follower.Wait)

    # inputs of the agent

    def connect(self) -> None:
        self.follower._link, self.follower._last_order = self, 0  # type: ignore[assignment]
        self.follower.send_status()

    def leave(self) -> None:
        """The connection has ended, and the control thread has noticed that."""
        self.follower._link = self.follower.order = self.order = None

    def hear(self, message: Any) -> None:
        """One turn of ``Follower.follow``."""
        if isinstance(message, Redirect):
            self.leave()
        elif isinstance(message, (Roster, RosterChange)):
            if self.promises.accept(message):
                self.follower.send_status()
        else:
            self.follower._obey(message, self)  # type: ignore[arg-type]

    def heartbeat(self) -> None:
        self.follower.send_status()

    def act(self) -> None:
        """The main thread has a turn."""
        while True:
            match follower.step(self.order, self.own, self.round):
                case follower.Stop():
                    self.round, self.world = 0, None
                case follower.Acknowledge(round):
                    self._report(state="idle", round=round, failure=None)
                case follower.Start(round, plan):
                    self.round, self.world = round, (plan.store_port, plan.group_world_size)
                    self._report(state="running", round=round, step=0 if self.steps else -1)
                case follower.End():
                    self.gone, self.round, self.world = True, 0, None
                    self.leave()
                    return
                case _:
                    return

    def fail(self) -> None:
        """The node's workers fail."""
        self.world = None
        failure = Failure("signal", HOSTS[self.index].name, 0, 0, -9, "killed", 0.0)
        self._report(state="failed", failure=failure)

    def _report(self, **changes: Any) -> None:
        self.own = replace(self.own, **changes)
        self.follower.send_status()

    def restart(self) -> None:
        """The node's agent dies with its workers and its leader, and is restarted."""
        self.leader = None
        self._new_agent(Promises(self.keep, self.kept))

    def reboot(self) -> None:
        """As ``restart``, but the node's promises are lost."""
        self.leader = None
        self._new_agent(Promises(self.keep, votes=False))

    # inputs of the leader

    def lead(self, *, first: bool = False) -> None:
        self.begun += 1
        assert first == (self.promises.roster is None)
        self.leader = Leader(
            self.policy, node=self.index, nproc=1, now=self.clock, promises=self.promises, reason="the leader is lost"
        )
        self._after()

    def hears(self, conn: int, boot: int, message: Any) -> None:
        """``boot``: identifies the agent among those that have run on its node."""
        assert self.leader
        if isinstance(message, Status):
            status, addr = replace(message, seq=1), HOSTS[message.node].addresses[0]
            self.leader.on_status(conn, addr, status, self.clock, boot=str(boot))
        else:
            self.leader.on_roster(message)

    def lost(self, conn: int) -> None:
        assert self.leader
        self.leader.on_lost(conn, "lost")

    def decide(self) -> None:
        assert self.leader
        self.leader.decide(self.clock)
        self._after()

    def beat(self) -> None:
        assert self.leader
        self.leader.on_tick(self.clock)
        self._after(beat=True)

    def sleep(self) -> None:
        """The node freezes for longer than the timeout; the leader handles the next message after it wakes up."""
        self.slept += 1

    def resize(self, most: int) -> None:
        """The user changes the MAX of the job."""
        assert self.leader
        self.leader.on_resize(Bounds(1, most, ()), self.clock)
        self._after()

    def release(self, node: int) -> None:
        """The user gives a node back."""
        assert self.leader
        self.leader.on_leave(node, "released", self.clock, exclude=True, give_back=True)
        self._after()

    def stop(self) -> None:
        """A candidate gives way."""
        self._end_lead()

    def _after(self, *, beat: bool = False) -> None:
        leader = self.leader
        assert leader
        while (round := leader.wanted_store) is not None:
            leader.on_store(round, (round * 8 + self.index) * 16 + self.begun, self.clock)
        assert not leader.verdict, leader.verdict
        if leader.needs and leader.needs.surplus:
            leader.on_given_back([host.node for host in leader.needs.surplus], self.clock)
        self.out.closed = leader.take_dropped()
        # orders that are sent before the leader freezes again all have the same number, and so the same content
        leader._orders._seq = max(leader.peers.fresh_order, 1) - 1
        self.out.down = list(leader.take_orders(beat=beat).items())
        if leader.abdicated:
            self._end_lead()

    def _end_lead(self) -> None:
        self.leader, self.out.ended = None, True

    def settle(self) -> Output:
        """The effects since the last call. Resets the numbers of messages, because a connection keeps their order."""
        if self.leader:
            self.leader.take_events()
            self.leader._orders._unacknowledged.clear()  # a heartbeat may repeat a roster at any time
            for peer in self.leader.peers.values():
                peer.status = replace(peer.status, seq=0)
        self.follower._seq = 0
        out, self.out = self.out, Output([], [], [])
        return out
