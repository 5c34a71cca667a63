"""Leader and agents over real sockets on loopback: who gets in, who is dropped, who does not disturb."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from elastic_hpc import channel, net, protocol
from elastic_hpc.ask import ask_leader
from elastic_hpc.control import Control, LeaderAddress, Seat
from elastic_hpc.decide import Policy
from elastic_hpc.errors import ElasticError, JobEnded
from elastic_hpc.leader import Leader
from elastic_hpc.protocol import Failure, Status
from elastic_hpc.recorder import Recorder
from elastic_hpc.rundir import RunDir
from elastic_hpc.server import LeaderServer

POLICY = Policy(
    min_nodes=1,
    max_nodes=3,
    max_restarts=3,
    max_requeues=1,
    heartbeat_timeout=2.0,
    join_timeout=20.0,
    last_call_timeout=5.0,
    can_requeue=False,
)


class Cluster:
    """One leader and some agents, all in this process."""

    def __init__(self, path: Path, granted: int) -> None:
        self.rundir = RunDir(path / "run").create()
        self.secret = self.rundir.make_secret()
        self.recorder = Recorder(self.rundir, run=0)
        listener = net.listen_from(42000)
        self.port: int = listener.getsockname()[1]
        self.rundir.write("endpoint.json", {"run": 0, "host": "n0", "addresses": ["127.0.0.1"], "port": self.port})
        self.leader = Leader(POLICY, granted=granted, nproc=1, now=time.monotonic())
        self.server = LeaderServer(self.leader, listener, self.secret, self.recorder, self._store)
        self.controls: list[Control] = []
        for node in range(granted):
            self.add(node, lead=self.server.run if node == 0 else None)

    @staticmethod
    def _store(round: int) -> Future[int]:
        opened: Future[int] = Future()
        opened.set_result(1000 + round)
        return opened

    def add(self, node: int, **options: object) -> Control:
        control = Control(
            Status(0, node, f"n{node}", 1),
            self.rundir.read_secret,
            lambda: LeaderAddress(("127.0.0.1",), self.port),
            heartbeat_timeout=POLICY.heartbeat_timeout,
            join_timeout=POLICY.join_timeout,
            **options,  # type: ignore[arg-type]
        )
        control.start()
        self.controls.append(control)
        return control

    def seats(self) -> list[Seat]:
        """The places of all agents in the next round; each waits on a thread of its own, as in life."""
        with ThreadPoolExecutor(len(self.controls)) as threads:
            return list(threads.map(Control.next_seat, self.controls))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def events(self, name: str) -> list[dict[str, object]]:
        return [event for event in self.rundir.events() if event["event"] == name]

    def close(self) -> None:
        self.leader.on_request("stop", "test", time.monotonic())
        for control in reversed(self.controls):
            control.close(timeout=10)
        self.recorder.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path, granted=3)
    yield made
    made.close()


def wait_for(look: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_round_forms_restarts_after_a_failure_and_finishes(cluster: Cluster) -> None:
    seats = cluster.seats()
    assert [seat.plan.group_rank for seat in seats] == [0, 1, 2]
    assert {(seat.round, seat.plan.store_port, seat.leader_addr) for seat in seats} == {(1, 1001, "127.0.0.1")}
    failure = Failure("exit", "n1", 1, 0, 9, "exit code 9", 0.0)
    cluster.controls[1].report("failed", 1, failure)
    for control in cluster.controls:
        wait_for(lambda control=control: control.must_stop(1) == "rank 1 on n1: exit code 9")
    assert {seat.plan.restart_count for seat in cluster.seats()} == {1}
    for control in cluster.controls:
        control.report("running", 2)
        assert control.must_stop(2) is None
        control.report("succeeded", 2)
    for control in cluster.controls:
        with pytest.raises(JobEnded, match="all workers finished"):
            wait_for(lambda control=control: control.must_stop(2))
    verdict = cluster.rundir.read("verdict.json")
    assert verdict
    assert (verdict["outcome"], verdict["restarts"], verdict["round"]) == ("finished", 1, 2)


def test_a_closed_connection_is_a_loss_at_once(cluster: Cluster) -> None:
    cluster.seats()
    began = time.monotonic()
    cluster.controls.pop().close(timeout=5)
    wait_for(lambda: cluster.controls[1].must_stop(1))
    assert time.monotonic() - began < POLICY.heartbeat_timeout, "it was noticed before any heartbeat was missed"
    assert {seat.plan.group_world_size for seat in cluster.seats()} == {2}


def test_strangers_are_refused_recorded_and_do_not_disturb(cluster: Cluster) -> None:
    with ExitStack() as open_connections:
        for noise in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b"{}\n",
            b"\xff" * 300_000,
            b'{"proof": "x", "challenge": "y"}\n',
        ):
            stranger = open_connections.enter_context(cluster.connect())
            if noise:
                try:
                    stranger.sendall(noise)
                except OSError:
                    continue  # it was thrown out while it still shouted
        for _ in range(300):
            open_connections.enter_context(cluster.connect())
        assert {seat.plan.group_world_size for seat in cluster.seats()} == {3}
        wait_for(lambda: len(cluster.events("stranger")) >= 4)
        assert all(control.must_stop(1) is None for control in cluster.controls)
    assert not cluster.events("lost")


def test_half_a_message_of_an_authenticated_peer_costs_only_its_own_connection(cluster: Cluster) -> None:
    async def talk() -> None:
        link = await channel.connect(["127.0.0.1"], cluster.port, cluster.secret)
        link._writer.write(b'{"seq": 1, "node"')
        await link.flush()

    asyncio.run(talk())
    assert {seat.plan.group_world_size for seat in cluster.seats()} == {3}


def test_a_leader_without_the_secret_is_not_believed(tmp_path: Path) -> None:
    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = channel.Channel(reader, writer)
        link.send({"challenge": protocol.new_nonce()})
        await link.read()
        link.send({"proof": "0" * 64})
        link.close()

    async def dial() -> None:
        server = await asyncio.start_server(impostor, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises((protocol.ProtocolError, OSError)):
            await channel.connect(["127.0.0.1"], port, b"secret" * 8)
        server.close()

    asyncio.run(dial())


def test_an_agents_proof_cannot_be_played_back_as_the_leaders() -> None:
    proof = protocol.proof(b"secret", "agent", "a", "b")
    with pytest.raises(protocol.ProtocolError):
        protocol.check_proof(b"secret", "leader", "a", "b", proof)


def test_the_batch_script_can_ask_for_a_drain_with_nothing_but_the_run_directory(cluster: Cluster) -> None:
    cluster.seats()
    ask_leader(cluster.rundir, "drain")
    for control in cluster.controls:
        with pytest.raises(JobEnded, match="warned by Slurm"):  # noqa: PT012 - it ends at the one call or at the other
            wait_for(lambda control=control: control.must_stop(1))
            control.next_seat()


def test_an_unreachable_leader_is_told_with_its_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    rundir = RunDir(tmp_path)
    rundir.make_secret()
    rundir.write("endpoint.json", {"run": 0, "host": "n0", "addresses": ["127.0.0.1"], "port": port})
    with pytest.raises(ElasticError, match=f"the leader on n0 port {port} did not answer"):
        ask_leader(rundir, "stop")
    control = Control(
        Status(0, 1, "n1", 1),
        rundir.read_secret,
        lambda: LeaderAddress(("127.0.0.1",), port),
        heartbeat_timeout=1.0,
        join_timeout=0.5,
    )
    control.start()
    with pytest.raises(JobEnded, match=f"the leader at 127.0.0.1 port {port} was not reached") as ended:
        control.next_seat()
    assert ended.value.outcome == "lost"
    control.close(timeout=5)


def test_a_record_that_cannot_be_written_does_not_stop_the_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(RunDir(tmp_path / "missing"), run=0)
    recorder.event("join", {"node": "n0"})
    with pytest.raises(OSError, match="missing"):
        recorder.verdict({"outcome": "finished"}).result(timeout=5)
    recorder.close()
    assert "training goes on without its record" in caplog.text


def test_events_are_one_json_object_a_line(cluster: Cluster) -> None:
    cluster.seats()
    wait_for(lambda: cluster.events("round"))
    for line in (cluster.rundir.path / "events.jsonl").read_text().splitlines():
        assert {"time", "event"} <= json.loads(line).keys()
