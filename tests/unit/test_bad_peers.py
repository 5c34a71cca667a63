"""Malicious or broken peers against the leader of a running round: whatever they do, its agents notice nothing. Real
sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from cluster import Cluster, wait_for

from elastic_hpc.membership import messages
from elastic_hpc.membership.messages import WHO, Status
from elastic_hpc.membership.roster import Host
from elastic_hpc.network import channel
from elastic_hpc.network.identity import Identity
from elastic_hpc.network.proofs import Handshake, Seal, new_nonce


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One job for all tests: it continues whatever they do."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    assert {seat.round for seat in made.seats()} == {1}
    for control in made.controls:
        control.report("running", 1)
    yield made
    made.close()


def assert_undisturbed(cluster: Cluster, *, record: bool = True) -> None:
    """Assert that the real agents are connected, and that their round and
    the heartbeats in both directions continue.
    """
    leader = cluster.nodes[0].leader
    assert leader

    def received() -> list[int]:
        return [peer.status.seq for peer in leader.peers.values() if peer.joined]

    def ordered() -> list[int]:
        return [control.order.seq if control.order else -1 for control in cluster.controls]

    statuses, orders = cluster.nodes[0].in_loop(received), ordered()
    assert len(statuses) == 3
    wait_for(lambda: min(new - old for new, old in zip(ordered(), orders, strict=True)) > 0)
    wait_for(lambda: all(new - old > 0 for new, old in zip(cluster.nodes[0].in_loop(received), statuses, strict=True)))
    assert all(control.must_stop(1) is None for control in cluster.controls)
    wait_for(lambda: leader.leads)  # on a busy machine the leader may count as frozen until its agents have answered
    assert (leader.round, leader.restarts, leader.verdict) == (1, 0, None)
    assert cluster.nodes[0].in_loop(lambda: set(leader.peers.by_node)) == {0, 1, 2}
    if record:
        assert not cluster.events("lost")
        assert not cluster.events("restart")
        assert not cluster.events("refused")


class Peer:
    """A bare connection to the leader."""

    sent: Seal
    received: Seal

    def __init__(self, cluster: Cluster, identity: Identity | None = None) -> None:
        """Connect as node 7, if the connection must prove an identity."""
        self.identity = identity or Identity("job", 0, 7, "n7", "boot")
        self.socket = cluster.connect()
        self.lines = self.socket.makefile("rb")
        self.cluster = cluster

    def __enter__(self) -> Peer:  # noqa: PYI034 - Self is not in Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.socket.close()

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.received.check(self.lines.readline()))
        return message

    def say(self, line: bytes) -> None:
        """Send ``line`` with its MAC."""
        self.send(self.sent.sign(line) + line)

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the leader closed the connection while we still sent
            self.socket.sendall(data)

    def introduce(self, challenge: bytes) -> bytes:
        """The answer of a peer with the secret to ``challenge``."""
        self.handshake = Handshake(self.cluster.secret, challenge)
        introduction = {"challenge": new_nonce(), "identity": vars(self.identity)}
        return self.handshake.sign("dialer", messages.encode(introduction))

    def prove(self) -> Peer:
        self.send(self.introduce(self.lines.readline()))
        answer = json.loads(self.handshake.check("acceptor", self.lines.readline()))
        assert answer == {"identity": vars(self.cluster.nodes[0].identity)}
        self.sent, self.received = self.handshake.seal("dialer"), self.handshake.seal("acceptor")
        return self

    def is_thrown_out(self) -> bool:
        """Whether the leader closes the connection, possibly after further messages."""
        try:
            while self.lines.readline():
                pass
        except ConnectionResetError:
            return True
        return True


def status(**fields: Any) -> bytes:
    return messages.encode(Status(**{"seq": 1, "host": Host(7, "n7", ("127.0.0.1",), 1), "nproc": 1, **fields}))


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"{}\n",
        b"[]\n",
        b"\n",
        b"\xff\xfe\n",
        b'{"challenge": "y"}\n',
        b'{"proof": "x", "challenge": "y"}\n',
        b'{"proof": {"a": 1}, "challenge": ["y"]}\n',
        '{"proof": "\u00e9"}\n'.encode(),
        b"[" * 100_000 + b"\n",
        b'{"challenge": ' + b"9" * 10_000 + b"}\n",
        b"x" * (3 * messages.MAX_LINE),
        b'{"half": ',
        b"",
    ],
    ids=lambda noise: repr(noise[:24]),
)
def test_a_peer_without_the_secret_is_refused(cluster: Cluster, noise: bytes, caplog: pytest.LogCaptureFixture) -> None:
    def strangers() -> int:
        server = cluster.nodes[0].control._membership._own_leader.server
        return server._strangers  # type: ignore[union-attr]

    before = strangers()
    with Peer(cluster) as peer:
        peer.lines.readline()
        peer.send(noise)
        if noise.endswith(b"\n") or len(noise) > messages.MAX_LINE:
            assert peer.is_thrown_out()
            wait_for(lambda: strangers() > before)
        assert_undisturbed(cluster)
    assert not caplog.records


def test_the_leader_does_not_wait_long_for_the_rest_of_a_line(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "HANDSHAKE_TIMEOUT", 0.2)
    with Peer(cluster) as peer:
        peer.send(b'{"challenge": "y", ')
        assert peer.is_thrown_out()
        assert_undisturbed(cluster)


def test_an_overheard_proof_opens_no_other_connection(cluster: Cluster) -> None:
    with Peer(cluster) as first, Peer(cluster) as second:
        overheard = first.introduce(first.lines.readline())
        first.send(overheard)
        assert b"identity" in first.lines.readline()
        second.lines.readline()
        second.send(overheard)
        assert second.is_thrown_out()
        assert_undisturbed(cluster)


def test_the_leaders_proof_to_one_peer_is_of_no_use_to_another(cluster: Cluster) -> None:
    """The leader's answer is valid for the other role only."""
    with Peer(cluster) as peer, Peer(cluster) as oracle:
        oracle.send(oracle.introduce(oracle.lines.readline()))
        answer = oracle.lines.readline()
        peer.lines.readline()
        peer.send(answer)
        assert peer.is_thrown_out()
        assert_undisturbed(cluster)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"rubbish\n",
        b"{}\n",
        b"[]\n",
        b'"who"\n',
        b'{"request": "dance"}\n',
        b'{"request": ["stop"]}\n',
        b'{"seq": 1}\n',
        b'{"seq": 1, "host": 7, "nproc": 1}\n',
        b'{"roster": 5}\n',
        b'{"roster": {"round": 9, "hosts": [], "bases": [7], "restarts": 0, "requeues": 0}}\n',
        b"[" * 100_000 + b"\n",
        b"y" * (2 * messages.MAX_LINE),
        b'{"roster":{"round":9,"hosts":"7 n7","bases":[],"restarts":0,"requeues":0,"members":"","mark":""}}\n',
        b'{"roster":{"round":9,"hosts":"","bases":[],"restarts":0,"requeues":0,"members":"0-99999999","mark":""}}\n',
        status(step=1).replace(b'"step"', b'"stop"'),
        status(seq="1"),
        status(nproc="1"),
        status(round=None),
        status(seen="9"),
        status(seen=1e300),
        status(roster=[1]),
        status(step="far"),
        status(state="dancing"),
        status(host=Host(7, "n7", ("127.0.0.1",), 1, software=2.13)),  # type: ignore[arg-type]
        status(host=Host("7", "n7", ("127.0.0.1",), 1)),  # type: ignore[arg-type]
        status(host=Host(7, None, ("127.0.0.1",), 1)),  # type: ignore[arg-type]
        status(host=Host(7, "n7", "x", "y")),  # type: ignore[arg-type]
        status(step=1).replace(b'"step":1', b'"failure":{"kind":1}'),
    ],
    ids=lambda nonsense: repr(nonsense[:90]),
)
def test_nonsense_from_a_peer_with_the_secret_costs_only_its_own_connection(
    cluster: Cluster, nonsense: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with Peer(cluster).prove() as fresh, Peer(cluster).prove() as joined:
        fresh.say(nonsense)
        assert fresh.is_thrown_out()
        joined.say(status(state="running", round=9))  # it has workers of another round, so it is no newcomer yet
        joined.receive()
        joined.say(nonsense)
        assert joined.is_thrown_out()
        assert_undisturbed(cluster)
    assert not caplog.records


def test_a_peer_that_is_silent_after_its_proof_is_given_up(cluster: Cluster) -> None:
    with Peer(cluster).prove() as silent, Peer(cluster).prove() as half:
        half.send(b'{"seq": 1, "host"')
        assert silent.is_thrown_out()
        assert half.is_thrown_out()
        assert_undisturbed(cluster)


def test_a_silent_spare_is_given_up_without_a_restart(cluster: Cluster) -> None:
    with Peer(cluster).prove() as spare:
        spare.say(status(state="running", round=9))
        assert "roster" in spare.receive()
        assert spare.receive()["stage"] == "run"
        assert spare.is_thrown_out()
        assert_undisturbed(cluster)


def test_a_peer_that_reads_too_slowly_is_given_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer sends requests, but does not read the answers."""
    monkeypatch.setattr(channel, "_SLOW_READER", 64 * 1024)
    question = messages.encode({"request": WHO, "and": "so on" * 100})

    def attended() -> int:
        return len([task for task in asyncio.all_tasks() if "Network._serve" in repr(task.get_coro())])

    leader = cluster.nodes[0]
    wait_for(lambda: leader.in_loop(attended) == 3)
    with Peer(cluster).prove() as slow:
        assert leader.in_loop(attended) == 4
        slow.socket.settimeout(5)
        while leader.in_loop(attended) == 4:
            slow.send(b"".join(slow.sent.sign(question) + question for _ in range(100)))
        assert_undisturbed(cluster)


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("this user may not open enough files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_a_thousand_idle_connections_do_not_block_the_next_agent(cluster: Cluster) -> None:
    waiting = cluster.nodes[0].network._strangers
    with ExitStack() as idle:
        for _ in range(1000):
            idle.enter_context(cluster.connect())
        assert_undisturbed(cluster)
        assert cluster.nodes[0].in_loop(lambda: len(waiting)) <= channel.MOST_STRANGERS_OF_ONE_ADDRESS
        with Peer(cluster).prove() as agent:

            def is_told_who_leads() -> bool:
                agent.say(messages.encode({"request": WHO}))
                return bool(agent.receive()["redirect"]["leads"])

            wait_for(is_told_who_leads)
    assert_undisturbed(cluster)


CROWD = """
import socket, sys, time
crowd = []
while len(crowd) < 200:
    crowd.append(socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=10))
print("here", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def no_more_files_than(number: int) -> Iterator[None]:
    """Let this process open only ``number`` more files and connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + number, hard))
    filling = []
    try:
        with contextlib.suppress(OSError):
            while True:
                filling.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(number):
            os.close(filling.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in filling:
            os.close(fd)


def test_an_agent_that_can_open_no_more_files_keeps_those_that_are_connected(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    argv = [sys.executable, "-c", CROWD, str(cluster.port)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as crowd, no_more_files_than(10):
        assert crowd.stdout
        assert crowd.stdout.readline() == b"here\n"
        wait_for(lambda: "Too many open files" in caplog.text)
        assert_undisturbed(cluster, record=False)
        crowd.communicate()
    with Peer(cluster).prove():  # as soon as descriptors are free, the leader accepts connections again
        assert_undisturbed(cluster)
