"""The cost of a round at any size, in decisions, messages and bytes. These tests measure no time."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import simulated_network
from simulated import POLICY, Job, SimNode

from elastic_hpc.membership import decisions, messages
from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.messages import Order, Status
from elastic_hpc.membership.roster import Host, Hosts, Roster, RosterChange


@dataclass
class Counts:
    """Counts of the leader's work."""

    decisions: int = 0
    messages: int = 0
    bytes: int = 0


class Crowd:
    """A leader, and ``size`` agents that answer each order immediately."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.now, self.seq = size, 0.0, 0
        self.counts = Counts()
        decide = decisions.decide

        def counted(*args: Any) -> Any:
            self.counts.decisions += 1
            return decide(*args)

        monkeypatch.setattr(decisions, "decide", counted)
        policy = replace(POLICY, max_nodes=size, max_restarts=100)
        self.leader = Leader(policy, node=0, nproc=1, now=0.0, granted=size)
        self.held: dict[int, Roster] = {}
        self.last_order: dict[int, int] = {}
        self.world: dict[int, Status] = {}
        for node in range(size):
            self.say(node)
        self.settle()

    def say(self, node: int, **changes: Any) -> None:
        self.seq += 1
        host = Host(node, f"node{node:04}", (f"10.0.{node // 256}.{node % 256}",), 29432)
        known, held = self.world.get(node, Status(0, host, 1)), self.held.get(node)
        holds = {"roster": held.round, "mark": held.mark} if held else {}
        self.world[node] = replace(known, seq=self.seq, last_order=self.last_order.get(node, 0), **holds, **changes)
        self.leader.on_status(node, host.addresses[0], self.world[node], self.now)

    def settle(self) -> None:
        """Deliver all messages before the next decision, as on a busy leader."""
        while True:
            self.leader.decide(self.now)
            if self.leader.wanted_store is not None:
                self.leader.on_store(self.leader.wanted_store, 1, self.now)
            sent = self.leader.take_orders()
            if not sent:
                return
            for node, told in sent.items():
                for message in told:
                    self.hear(node, message)

    def hear(self, node: int, message: Any) -> None:
        self.counts.messages += 1
        self.counts.bytes += len(messages.encode(message))
        if isinstance(message, Order):
            self.last_order[node] = message.seq
        if isinstance(message, Roster):
            self.held[node] = message
        elif isinstance(message, RosterChange):
            assert message.previous == self.held[node].mark
            self.held[node] = message.of(self.held[node])
        elif isinstance(message, Order) and message.stage == "gather":
            self.say(node, state="idle", round=message.round)
        elif message.plan and self.world[node].state == "idle":
            self.say(node, state="running", round=message.round)

    def pass_time(self, seconds: int) -> None:
        """The leader acts every second, and each agent answers a heartbeat before it is silent for too long."""
        for second in range(seconds):
            self.now += 1
            self.leader.on_tick(self.now)
            if second % 4 == 0:
                for node, sent in self.leader.take_orders(beat=True).items():
                    for message in sent:
                        self.hear(node, message)
                    self.say(node)
                self.settle()

    def lose(self, node: int) -> Counts:
        """Lose ``node``. Returns the cost of the next round."""
        self.counts = Counts()
        self.pass_time(20)  # until the leader is no longer new
        self.counts = Counts()
        self.leader.on_lost(node, "gone")
        self.settle()
        assert self.leader.round == self.leader.roster.round == 2
        assert all(held == self.leader.roster for at, held in self.held.items() if at != node)
        return self.counts


@pytest.fixture(params=[64, 512])
def crowd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Crowd:
    return Crowd(request.param, monkeypatch)


def test_a_large_round_is_decided_in_a_few_steps_with_the_same_cost_per_agent(crowd: Crowd) -> None:
    first = crowd.counts
    assert first.decisions < 16
    again = crowd.lose(crowd.size // 2)
    assert again.decisions < 16
    assert again.messages <= 5 * crowd.size
    assert again.bytes <= 1500 * crowd.size
    assert first.bytes <= (1500 + 40 * crowd.size) * crowd.size, "the roster names all hosts, once"


def test_heartbeats_and_steps_without_news_cause_no_decision(crowd: Crowd) -> None:
    crowd.say(0, step=1)
    crowd.settle()
    crowd.counts = Counts()
    for node in range(crowd.size):
        crowd.say(node)
        assert not crowd.leader.has_news
    crowd.say(0, step=2, step_at=3.0, loss=0.5)
    assert not crowd.leader.has_news
    assert crowd.leader.take_orders() == {}
    assert crowd.counts.decisions == 0
    crowd.say(0, state="succeeded")
    assert crowd.leader.has_news


def test_a_roster_is_encoded_once_for_all(crowd: Crowd) -> None:
    roster = crowd.leader.roster
    assert messages.encode(roster) is messages.encode(roster)


def test_an_agent_with_a_different_roster_of_the_same_round_gets_the_whole_roster(crowd: Crowd) -> None:
    crowd.held[1] = replace(crowd.held[1], mark="of another leader")
    crowd.say(1)
    crowd.settle()
    crowd.lose(2)  # asserts that all agents hold the new roster


def test_a_thousand_agents_send_to_the_server_at_once_and_it_decides_a_few_times() -> None:
    job = Job(1, 40, replace(POLICY, max_nodes=40, min_nodes=2), loss=0.0)
    decided = []

    async def story() -> None:
        assert await job.until(job.training, 60)
        leader = job.nodes[0].membership._own_leader.server
        assert leader
        act = leader.leader._advance
        leader.leader._advance = lambda now: (decided.append(now), act(now))[1]  # type: ignore[method-assign]
        job.latency = lambda: 0.001  # type: ignore[method-assign]
        job.random.uniform = lambda low, _high: low  # type: ignore[method-assign]
        job.nodes[20].kill()
        before = job.trained
        assert await job.until(lambda: job.trained > before and job.training(), 60)

    job.run(story)
    assert len(decided) < 20


def test_an_agent_joins_the_next_leader_over_the_connection_of_its_request_and_unpacks_only_the_hosts_that_it_dials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = Job(1, 40, replace(POLICY, max_nodes=40, min_nodes=2), loss=0.0)
    dialled: list[int] = []
    dial, unpack, unpacked = simulated_network.SimNetwork.dial, Hosts.at, []

    def counted_dial(network: Any, host: Host) -> Any:
        dialled.append(host.node)
        return dial(network, host)

    async def story() -> None:
        assert await job.until(job.training, 60)
        await asyncio.sleep(10)  # no agent unpacks hosts for the round any more
        monkeypatch.setattr(simulated_network.SimNetwork, "dial", counted_dial)
        monkeypatch.setattr(Hosts, "at", lambda hosts, node: (unpacked.append(node), unpack(hosts, node))[1])
        before = job.trained
        job.nodes[0].kill()
        assert await job.until(lambda: job.trained > before and job.training(), 60)

    job.run(story)
    assert dialled.count(1) <= 2 * 39, "once before its candidacy, and once to join over the same connection"
    assert len(unpacked) <= 20 * 39


# joining at start


def start_late(job: Job, node: SimNode, seconds: float) -> None:
    start = node.start
    node.start = lambda: asyncio.get_running_loop().call_later(seconds, start) and None  # type: ignore[method-assign]


def test_agents_wait_for_a_head_that_comes_a_minute_late_with_few_polls_and_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = Job(3, 4, replace(POLICY, join_timeout=300.0), loss=0.0)
    start_late(job, job.nodes[0], 60)
    looks: list[float] = []
    published = job.nodes[1].published

    async def counted() -> Any:
        looks.append(job.now)
        return await published()

    job.nodes[1].published = counted  # type: ignore[method-assign]

    async def story() -> None:
        with caplog.at_level(logging.WARNING, "elastic_hpc"):
            assert await job.until(job.training, 70)
        assert job.now < 63

    job.run(story)
    assert 30 < len(looks) < 90
    first = [later - look for look, later in itertools.pairwise(looks[:4])]
    assert max(first) < 0.5, "quickly at first"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3 * 3, "each of three after 5, 15 and 45 s"
    assert "no leader has published its address" in told[0]


def test_the_record_shows_which_nodes_are_missing_at_the_start() -> None:
    names = [f"n{node:02}" for node in range(8)]
    leader = Leader(POLICY, node=0, nproc=1, now=0.0, granted=8, granted_names=names)
    for node in range(3):
        status = Status(1, Host(node, names[node], ("10.0.0.1",), 1), 1)
        leader.on_status(node, "10.0.0.1", status, 0.0)
    for second in range(1, 4):
        leader.on_tick(float(second))
    reasons = [fields["reason"] for name, fields in leader.take_events() if name == "waiting"]
    assert reasons == ["5 more granted node(s) may join; not joined yet: n[03-07]"]


# rosters


def hosts(*nodes: int, port: int = 1) -> tuple[Host, ...]:
    return tuple(Host(node, f"n{node}", ("10.0.0.1", "10.1.0.1"), port) for node in nodes)


def arrived(message: Any) -> Any:
    return messages.decode_from_leader(messages.encode(message))


def test_a_change_turns_the_previous_roster_into_the_same_new_roster() -> None:
    base = messages.Base(3, 0, (0, 1, 2))
    before = Roster(3, hosts(0, 1, 2), (base,), 1, 0, (0, 1, 2), "3.0.1")
    after = Roster(
        4, (*hosts(0), *hosts(2, port=7), *hosts(5)), (base, replace(base, round=4)), 2, 0, (0, 2, 5), "4.0.9"
    )
    change = after.change_from(before)
    assert change
    assert [host.node for host in change.hosts] == [2, 5]
    assert change.gone == (1,)
    assert arrived(change).of(arrived(before)) == arrived(after) == after
    assert Roster(0, (), (), 0, 0).line
    assert before.change_from(Roster(0, (), (), 0, 0)) is None, "nobody holds that"


def test_hosts_are_unchanged_and_stay_packed_until_one_is_needed() -> None:
    packed = Hosts(Hosts.of(hosts(3, 1)).packed())
    assert packed == hosts(1, 3)
    assert len(packed) == 2
    assert packed[1] == packed.at(3)
    assert Hosts.of(packed) is packed
    assert list(Hosts.of(())) == list(Hosts("")) == []


@pytest.mark.parametrize("make", [lambda: Order(7, "gather", 3, "why"), lambda: Status(5, hosts(1)[0], 2, step=4)])
def test_default_values_are_not_sent(make: Callable[[], Any]) -> None:
    said = make()
    decode = messages.decode_from_agent if isinstance(said, Status) else messages.decode_from_leader
    line = messages.encode(said)
    assert decode(line) == said
    assert len(line) < 130


def test_the_simulation_drops_changes_of_rosters_too() -> None:
    assert simulated_network.RosterChange is RosterChange
