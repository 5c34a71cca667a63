"""Authentication of connections: relays, strangers, and agents that answer in place
of the dialled one. Real sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from cluster import Cluster, wait_for

from elastic_hpc.membership import messages
from elastic_hpc.membership.messages import Order, Plan, ProtocolError, Status
from elastic_hpc.membership.roster import Host
from elastic_hpc.network import channel
from elastic_hpc.network.channel import Channel, Network
from elastic_hpc.network.identity import Identity, RunIsOver
from elastic_hpc.network.proofs import MAC_SIZE, Handshake, Seal

SECRET = b"secret" * 8
AGENT = Identity("job", 1, 1, "n1", "first")
OTHER = Identity("job", 1, 2, "n2", "other")


class End:
    """The network of one agent, and the channels that it has accepted."""

    def __init__(self, identity: Identity, listener: socket.socket | None = None) -> None:
        async def secret() -> bytes:
            return SECRET

        self.listener = listener or socket.create_server(("127.0.0.1", 0))
        self.network = Network([self.listener], identity, secret, 1.0)
        self.strangers: asyncio.Queue[str] = asyncio.Queue()
        self.runs_over: asyncio.Queue[str] = asyncio.Queue()
        self.network.on_stranger = lambda _, reason: self.strangers.put_nowait(reason)
        self.network.on_over = lambda over: self.runs_over.put_nowait(str(over))
        self.host = Host(identity.node, identity.name, ("127.0.0.1",), self.listener.getsockname()[1])
        self.accepted: asyncio.Queue[Channel] = asyncio.Queue()
        self._dialled: list[Channel] = []
        self._closed = asyncio.Event()

    async def dial(self, host: Host) -> Channel:
        self._dialled.append(await self.network.dial(host))
        return self._dialled[-1]

    async def serve(self) -> End:
        async def attend(link: Channel) -> None:
            self.accepted.put_nowait(link)
            await self._closed.wait()

        await self.network.serve(attend)
        return self

    def close(self) -> None:
        self._closed.set()
        for link in self._dialled:
            link.close()
        self.network.close()
        self.listener.close()


def play(story: Callable[[End, End], Awaitable[None]], one: Identity = AGENT, other: Identity = OTHER) -> None:
    async def run() -> None:
        ends = [await End(identity).serve() for identity in (one, other)]
        try:
            await asyncio.wait_for(story(*ends), 30)
        finally:
            for end in ends:
                end.close()
            for _ in range(3):
                await asyncio.sleep(0)  # transports close with the next pass of the event loop

    asyncio.run(run())


def test_each_end_knows_the_identity_of_the_other() -> None:
    async def story(one: End, other: End) -> None:
        link = await one.dial(other.host)
        assert link.identity == OTHER
        assert (await other.accepted.get()).identity == AGENT

    play(story)


def test_an_answer_of_another_node_is_skipped() -> None:
    """For example at an address that every node has, or that another node has taken over."""

    async def story(one: End, other: End) -> None:
        wanted = Host(7, "n7", ("127.0.0.1",), other.host.port)
        with pytest.raises(ProtocolError, match="n2 answers there, and not node 7"):
            await one.dial(wanted)
        with pytest.raises(ProtocolError, match=r"n1 \(this agent itself\) answers there, and not node 2"):
            await one.dial(replace(other.host, port=one.host.port))
        assert one.strangers.empty()

    play(story)


def test_the_next_address_is_tried_if_another_node_answers() -> None:
    async def story(one: End, other: End) -> None:
        with socket.create_server(("127.0.0.3", other.host.port)) as listener:
            third = End(replace(AGENT, node=3, name="n3"), listener)
            await third.serve()
            link = await one.dial(replace(other.host, addresses=("127.0.0.3", "127.0.0.1")))
            assert (link.identity, link.peer) == (OTHER, "127.0.0.1")
            third.close()

    play(story)


@pytest.mark.parametrize("older_dials", [True, False])
def test_the_older_of_two_runs_learns_that_it_has_ended(older_dials: bool) -> None:  # noqa: FBT001 - pytest's
    async def story(old: End, new: End) -> None:
        if older_dials:
            with pytest.raises(RunIsOver, match="run 2 has ended: run 4 is active"):
                await old.dial(new.host)
            assert await new.strangers.get() == "n1 belongs to run 2, which has ended"
        else:
            with pytest.raises(ProtocolError, match="n1 belongs to run 2, which has ended"):
                await new.dial(old.host)
            assert await old.runs_over.get() == "run 2 has ended: run 4 is active"
        assert old.accepted.empty()
        assert new.accepted.empty()

    play(story, AGENT, replace(OTHER, run=3))


def test_agents_of_different_jobs_do_not_connect() -> None:
    async def story(one: End, other: End) -> None:
        with pytest.raises(ProtocolError, match="n2 belongs to job other, not to job"):
            await one.dial(other.host)
        assert other.accepted.empty()

    play(story, AGENT, replace(OTHER, job="other"))


class Relay:
    """Forwards the lines of the handshake between a dialer and ``target``; then sends forged lines to both."""

    def __init__(self, target: int) -> None:
        self._target = target

    async def __aenter__(self) -> Relay:  # noqa: PYI034 - Self is not in Python 3.10
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.done = asyncio.Event()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for _, writer in (self.dialer, self.acceptor):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _forward(self, dialer: asyncio.StreamReader, to_dialer: asyncio.StreamWriter) -> None:
        acceptor, to_acceptor = await asyncio.open_connection("127.0.0.1", self._target)
        to_dialer.write(await acceptor.readline())
        to_acceptor.write(await dialer.readline())
        to_dialer.write(await acceptor.readline())
        self.dialer, self.acceptor = (dialer, to_dialer), (acceptor, to_acceptor)
        self.done.set()


def forgeries(line: bytes, heard: list[bytes]) -> dict[str, list[bytes]]:
    """The lines that a relay may send when it has ``heard`` two lines and wants ``line`` to be accepted."""
    first, second = heard
    return {
        "without a MAC": [line],
        "a MAC of zeros": [b"0" * MAC_SIZE + line],
        "the MAC of another line": [first[:MAC_SIZE] + line],
        "a key of its own": [Seal(b"key").sign(line) + line],
        "the key of a secret of its own": [Handshake(b"mine" * 8, b"").seal("dialer").sign(line) + line],
        "the same line twice": [first, first],
        "in another order": [second, first],
        "the first is left out": [second],
        "altered": [first.replace(b"user", b"USER")],
    }


@pytest.mark.parametrize("forgery", list(forgeries(b"", [b"", b""])))
@pytest.mark.parametrize("to_acceptor", [True, False])
def test_a_relay_can_neither_insert_nor_repeat_reorder_or_drop_lines(forgery: str, *, to_acceptor: bool) -> None:
    stop = messages.encode({"request": "stop", "reason": "user"})

    async def story(one: End, other: End) -> None:
        async with Relay(other.host.port) as relay:
            dialer = await one.dial(replace(other.host, port=relay.port))
            acceptor = await other.accepted.get()
            await relay.done.wait()
            speaker, hearer = (dialer, acceptor) if to_acceptor else (acceptor, dialer)
            source, sink = (relay.dialer[0], relay.acceptor[1]) if to_acceptor else (relay.acceptor[0], relay.dialer[1])
            speaker.send({"request": "drain", "reason": "user 1"}, {"request": "drain", "reason": "user 2"})
            heard = [await source.readline(), await source.readline()]
            forged = forgeries(stop, heard)[forgery]
            sink.write(b"".join(forged))
            for line in forged[:-1] if forgery == "the same line twice" else []:
                assert await hearer.read() == line[MAC_SIZE:]
            with pytest.raises(ProtocolError, match="does not come from the peer of the handshake"):
                await hearer.read()
            assert "does not come" in (other if to_acceptor else one).strangers.get_nowait()

    play(story)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


def test_neither_the_leader_nor_an_agent_obeys_a_relay(cluster: Cluster) -> None:
    """An attacker listens on the port of an agent on a shared node, and forwards the handshake to the leader."""
    cluster.seats()
    for control in cluster.controls:
        control.report("running", 1)
    leader = cluster.nodes[0]
    me = Identity("job", 0, 7, "n7", "relayed")

    async def story() -> None:
        async with Relay(cluster.port) as relay:
            link = await channel.connect(replace(leader.host, port=relay.port), me, cluster.secret)
            await relay.done.wait()
            stop = messages.encode({"request": "stop", "reason": "user"})
            relay.acceptor[1].write(stop)
            assert await relay.acceptor[0].read() == b"", "the leader closes the connection"
            plan = Plan(0, 1, 0, 1, "10.6.6.6")
            relay.dialer[1].write(messages.encode(Order(9, "run", 9, "", plan)))
            with pytest.raises(ProtocolError):
                await link.read()
            link.close()
            await asyncio.sleep(0)

    asyncio.run(story())
    wait_for(lambda: cluster.events("stranger"))
    assert not cluster.events("request")
    assert all(control.must_stop(1) is None for control in cluster.controls)


def test_an_agent_cannot_report_for_another_node(cluster: Cluster) -> None:
    cluster.seats()

    async def story() -> None:
        me = Identity("job", 0, 7, "n7", "boot")
        link = await channel.connect(cluster.nodes[0].host, me, cluster.secret)
        link.send(Status(1, cluster.nodes[1].host, 1))
        with pytest.raises(ConnectionError):
            await link.read()
        link.close()
        await asyncio.sleep(0)

    asyncio.run(story())
    assert not cluster.events("lost")
    assert all(control.must_stop(1) is None for control in cluster.controls)


SERVER = """
import asyncio, socket, sys
from elastic_hpc.network.channel import Network
from elastic_hpc.network.identity import Identity

async def main():
    async def secret():
        return b"secret" * 8
    listener = socket.create_server(("", 0), backlog=4096)
    await Network([listener], Identity("job", 0, 0, "n0", "boot"), secret, 1.0).serve(lambda link: asyncio.sleep(60))
    print(listener.getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


def peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


@pytest.mark.parametrize("sent", [b"x" * 500, b"x" * (1024 * 1024), b"{}\n" + b"x" * (1024 * 1024)], ids=len)
def test_four_hundred_strangers_use_no_memory(sent: bytes) -> None:
    """The strangers use several addresses, so that all handshakes are open at once."""
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=-1, stdout=-1) as agent, ExitStack() as crowd:
        assert agent.stdout
        port = int(agent.stdout.readline())
        before = peak_mib(agent.pid)
        strangers = []
        for number in range(400):
            stranger = crowd.enter_context(socket.socket())
            stranger.bind((f"127.0.0.{2 + number // 100}", 0))
            stranger.connect(("127.0.0.1", port))
            strangers.append(stranger)
        for stranger in strangers:
            assert stranger.recv(1), "the challenge"
            stranger.settimeout(0)
        for stranger in strangers:
            with contextlib.suppress(OSError):
                stranger.send(sent)
        with socket.create_connection(("127.0.0.1", port)) as last:  # the server handles it after the earlier ones
            assert last.recv(1)
        grown = peak_mib(agent.pid) - before
        agent.communicate()
    assert grown < 10, f"{grown:.1f} MiB"


def test_one_address_gets_only_a_share_of_the_open_handshakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MOST_STRANGERS_OF_ONE_ADDRESS", 10)

    async def story(one: End, other: End) -> None:
        def connect(address: str) -> socket.socket:
            connection = socket.socket()
            connection.bind((address, 0))
            connection.connect(("127.0.0.1", other.host.port))
            connection.settimeout(0)
            return connection

        async def received(connection: socket.socket) -> bytes:
            return await asyncio.get_running_loop().sock_recv(connection, 1000)

        with ExitStack() as opened:
            elsewhere = opened.enter_context(connect("127.0.0.4"))
            assert b"challenge" in await received(elsewhere)
            crowd = [opened.enter_context(connect("127.0.0.5")) for _ in range(25)]
            for stranger in crowd[:15]:
                while await received(stranger):  # until the connection is closed
                    pass
            for stranger in crowd[15:]:
                assert b"challenge" in await received(stranger)
            assert len(other.network._strangers) == 11
            assert (await one.dial(other.host)).identity == OTHER
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(received(elsewhere), 0.1)  # the connection is still open

    play(story)
