"""Leader and agents over real sockets on loopback: rounds, the loss of an agent, the loss of the leader, requests."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from cluster import Cluster, Node, end_of, wait_for

from elastic_hpc.agent import warned
from elastic_hpc.cli import hpc
from elastic_hpc.errors import ElasticError, JobEnded
from elastic_hpc.membership import messages
from elastic_hpc.membership.messages import WHO, Failure, Redirect
from elastic_hpc.membership.roster import Host
from elastic_hpc.network import channel, proofs
from elastic_hpc.network.client import ask_leader
from elastic_hpc.network.identity import OUTSIDE, Identity
from elastic_hpc.record.events import event_files
from elastic_hpc.record.recorder import Recorder
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.training import Progress

OUTSIDER = Identity("job", 0, OUTSIDE, "login", "boot")
SEAL = proofs.Seal(b"key")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


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
    assert {end_of(control, 2).outcome for control in cluster.controls} == {"finished"}
    verdict = cluster.rundir.read("verdict.json")
    assert verdict
    assert (verdict["outcome"], verdict["restarts"], verdict["round"]) == ("finished", 1, 2)
    assert verdict["actor"] == "batch script"


def test_a_closed_connection_is_a_loss_immediately(cluster: Cluster) -> None:
    cluster.seats()
    cluster.nodes[2].die()
    cluster.wait_stop(1)
    assert {seat.plan.group_world_size for seat in cluster.seats()} == {2}
    (lost,) = cluster.events("lost")
    assert (lost["node"], lost["reason"]) == ("n2", "its connection was closed"), "not that it was silent for too long"


def test_the_next_agent_takes_over_when_the_first_is_gone(cluster: Cluster) -> None:
    cluster.seats()
    cluster.nodes[0].die()
    cluster.wait_stop(1)
    seats = cluster.seats()
    assert [(seat.plan.group_rank, seat.plan.group_world_size) for seat in seats] == [(0, 2), (1, 2)]
    assert {seat.plan.restart_count for seat in seats} == {1}
    (round,) = {seat.round for seat in seats}
    assert round > 1
    wait_for(lambda: cluster.events("take_over"))
    assert "n0 lost" in cluster.events("take_over")[0]["reason"]
    published = cluster.nodes[0].find_leader()
    assert published
    assert published.leader == cluster.nodes[0].host
    for control in cluster.controls:
        control.report("succeeded", round)
    assert {end_of(control, round).outcome for control in cluster.controls} == {"finished"}
    wait_for(lambda: cluster.rundir.read("verdict.json"))
    verdict = cluster.rundir.read("verdict.json")
    assert verdict
    assert (verdict["outcome"], verdict["actor"]) == ("finished", "agents"), "the batch host is gone"
    assert [(lost, alone) for _, lost, alone in cluster.acted] == [(["n0"], True)]


def test_two_agents_left_of_three_survive_the_next_loss_too(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        cluster.seats()
        for left in (2, 1):
            before = cluster.nodes[1].control.order
            assert before
            cluster.nodes[0].die()
            cluster.wait_stop(before.round)
            if left == 2:
                assert {seat.plan.group_world_size for seat in cluster.seats()} == {2}
        # one of two nodes, if it did not lead, cannot know whether the other continues
        survivor = cluster.nodes[0]
        wait_for(lambda: survivor.gave_up)
        assert survivor.leader
        assert not survivor.leader.leads
    finally:
        cluster.close()


def test_a_client_with_the_secret_can_ask_who_leads(cluster: Cluster) -> None:
    cluster.seats()

    async def ask(host: Host) -> Redirect:
        link = await channel.connect(host, OUTSIDER, cluster.secret)
        link.send({"request": WHO})
        reply = messages.decode_from_leader(await link.read())
        link.close()
        assert isinstance(reply, Redirect)
        return reply

    for node in cluster.nodes:
        assert asyncio.run(ask(node.host)) == Redirect(cluster.nodes[0].host, leads=True)
    assert all(control.must_stop(1) is None for control in cluster.controls)


def test_a_leader_without_the_secret_is_rejected() -> None:
    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        challenge = messages.encode({"challenge": proofs.new_nonce()})
        writer.write(challenge)
        handshake = proofs.Handshake(b"another" * 8, challenge)
        with pytest.raises(messages.ProtocolError):
            handshake.check("dialer", await reader.readline())
        writer.write(handshake.sign("acceptor", messages.encode({"identity": vars(OUTSIDER)})))
        await writer.drain()
        writer.close()

    async def dial() -> None:
        server = await asyncio.start_server(impostor, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(messages.ProtocolError, match="does not hold this job's secret"):
            await channel.connect(Host(0, "n0", ("127.0.0.1",), port), OUTSIDER, b"secret" * 8)
        server.close()
        await server.wait_closed()

    asyncio.run(dial())


@pytest.fixture
def warn(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cluster, int], None]:
    """The batch script of a run handles its warning."""
    monkeypatch.setattr(warned, "_PAUSE", 0.01)
    monkeypatch.setenv("PATH", "")  # without Slurm's commands the reason is the time limit
    monkeypatch.setenv("SLURM_JOB_ID", "17")

    def call(cluster: Cluster, run: int) -> None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(run))
        assert hpc.main(["warned", str(cluster.rundir.path)]) == 0

    return call


def drained(cluster: Cluster) -> list[str]:
    """The reasons for which workers of round 1 were asked to save; each once."""
    for control in cluster.controls:
        wait_for(lambda control=control: control.order and control.order.drain)
    wait_for(lambda: cluster.events("request"))
    return [event["reason"] for event in cluster.events("request")]


def test_a_warning_waits_for_a_leader_that_has_not_published_its_address_yet(
    cluster: Cluster, warn: Callable[[Cluster, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.seats()
    # the leader publishes its address again, with the other agents, when the round has been formed
    wait_for(lambda: len((cluster.rundir.read("endpoint.json") or {}).get("others", ())) == 2)
    endpoint = cluster.rundir.path / "endpoint.json"
    hidden = endpoint.rename(endpoint.with_name("hidden"))
    monkeypatch.setattr(RunDir, "write_warning", lambda *_: None)  # the disk is full
    monkeypatch.setattr(warned, "time", SimpleNamespace(sleep=lambda _: hidden.rename(endpoint)))
    warn(cluster, 0)
    assert drained(cluster) == ["time limit"]
    assert not hidden.exists()


def test_a_leader_finds_a_warning_that_came_before_its_start(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, granted=0, join_timeout=20.0)
    cluster.rundir.write_warning(0, "preempted")
    cluster.nodes.append(Node(cluster, 0, first=True))
    wait_for(lambda: cluster.events("request"))
    assert end_of(cluster.controls[0], 1).reason == "preempted: no worker ran; this job cannot be requeued"
    cluster.close()


def test_a_warning_that_the_lost_leader_received_is_known_to_the_next_leader(
    cluster: Cluster, warn: Callable[[Cluster, int], None]
) -> None:
    cluster.seats()
    for node in cluster.nodes:
        node.train(1)
    wait_for(lambda: cluster.rundir.read("endpoint.json"))
    warn(cluster, 0)
    drained(cluster)
    cluster.nodes[0].die()
    wait_for(lambda: cluster.rundir.read("verdict.json"))
    verdict = cluster.rundir.read("verdict.json")
    assert verdict
    assert verdict["cause"] == "time limit"
    assert [event["reason"] for event in cluster.events("request")] == ["time limit"] * 2, "once for each leader"


def test_a_warning_of_the_previous_run_is_not_a_warning_of_this_run(
    cluster: Cluster, warn: Callable[[Cluster, int], None]
) -> None:
    cluster.rundir.write_warning(-1, "time limit")
    cluster.seats()
    cluster.rundir.write("verdict.json", {"run": -1, "outcome": "requeue"})
    warn(cluster, -1)  # its batch script lives longer than the job's next run needs to start
    beats = cluster.nodes[0].recorder._last_beat
    wait_for(lambda: cluster.nodes[0].recorder._last_beat > beats)
    assert cluster.events("request") == []


def test_the_warning_of_a_run_does_not_use_the_address_of_the_previous_run(
    tmp_path: Path, warn: Callable[[Cluster, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(tmp_path, granted=1)
    wait_for(lambda: cluster.rundir.read("endpoint.json"))
    asked = []

    def verdict(_seconds: float) -> None:
        asked.append(cluster.rundir.warning(1))
        cluster.rundir.write("verdict.json", {"run": 1, "outcome": "requeue"})

    monkeypatch.setattr(warned, "time", SimpleNamespace(sleep=verdict))
    warn(cluster, 1)  # the warning of the following run, whose agents are still starting
    assert asked == ["time limit"], "asked again until there is a verdict, and left for the leader"
    assert cluster.events("request") == []
    cluster.close()


def test_the_batch_script_can_request_a_drain_with_only_the_run_directory(cluster: Cluster) -> None:
    cluster.seats()
    for control in cluster.controls:
        control.report("running", 1)
    wait_for(lambda: cluster.rundir.read("endpoint.json"))
    ask_leader(cluster.rundir, "drain", "time limit")
    for control in cluster.controls:
        wait_for(lambda control=control: control.order and control.order.drain)
        assert control.must_stop(1) is None, "they save first"
    for control in cluster.controls:
        control.report("succeeded", 1, drained=True)
    reasons = {end_of(control, 1).reason for control in cluster.controls}
    assert reasons == {"time limit: the workers saved and stopped; this job cannot be requeued"}


@pytest.mark.parametrize(("script", "then"), [("script.sbatch", "returns to the queue"), ("other", "ends")])
def test_drain_says_what_happens_next(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, script: str, then: str
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    cluster.seats()
    wait_for(lambda: cluster.rundir.read("endpoint.json"))
    (cluster.rundir.path / script).touch()
    assert hpc.main(["drain", str(cluster.rundir.path)]) == 0
    assert (
        capsys.readouterr().out
        == f"job {cluster.rundir.path.name}: the workers are asked to save, then the job {then}\n"
    )
    assert drained(cluster) == ["user"]


def test_sigterm_of_the_leaders_agent_counts_as_the_end_of_the_allocation(cluster: Cluster) -> None:
    cluster.seats()
    cluster.controls[1].on_signal()
    cluster.controls[0].on_signal()
    for control in cluster.controls:
        wait_for(lambda control=control: control.order and control.order.drain)
    wait_for(lambda: cluster.events("request"))
    assert [event["reason"] for event in cluster.events("request")] == ["terminated"]


def test_an_unreachable_leader_is_reported_with_its_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    cluster = Cluster(tmp_path, granted=0, heartbeat_timeout=0.5, join_timeout=1.0)
    where = {"job": "job", "run": 0, "node": 0, "host": "n0", "addresses": ["127.0.0.1"], "port": port}
    cluster.rundir.write("endpoint.json", where)
    with pytest.raises(ElasticError, match=f"the leader on n0 port {port} did not answer"):
        ask_leader(cluster.rundir, "stop")
    cluster.nodes.append(Node(cluster, 1, first=False))
    with pytest.raises(JobEnded, match=f"n0 at 127.0.0.1 port {port}") as ended:
        cluster.controls[0].next_seat()
    assert ended.value.outcome == "lost"
    assert len(cluster.nodes[0].gave_up) > 1, "it was patient at first"
    cluster.close()


def test_the_outer_agent_gets_heartbeats_as_long_as_the_control_thread_lives(cluster: Cluster) -> None:
    wait_for(lambda: all(node.beats >= 2 for node in cluster.nodes))


def test_news_makes_the_descriptor_readable_on_which_the_main_thread_waits(cluster: Cluster) -> None:
    import select

    cluster.seats()
    assert cluster.controls[1].must_stop(1) is None
    poll = select.poll()
    poll.register(cluster.controls[1].wake_fd, select.POLLIN)
    assert poll.poll(0) == []
    cluster.nodes[2].die()
    assert poll.poll(10_000)
    wait_for(lambda: cluster.controls[1].must_stop(1))


def test_failed_writes_are_repeated_later_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rundir = RunDir(tmp_path / "late")
    recorder = Recorder(rundir, 0, Host(0, "n0", ("127.0.0.1",), 1))
    recorder.state(round=1)
    for name in ("n0", "n1"):
        recorder.event("join", {"node": name})
    with pytest.raises(OSError, match="late"):
        recorder.verdict({}).result(timeout=5)
    assert caplog.text.count("training continues without its record") == 1
    rundir.create()
    recorder.close()
    assert [event["node"] for event in rundir.events()] == ["n0", "n1"]
    assert (rundir.read("state.json") or {})["round"] == 1


def test_a_traceback_is_logged_once_and_not_where_the_output_of_its_rank_is_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "elastic_hpc")
    host = Host(0, "n0", ("127.0.0.1",), 1)
    recorder = Recorder(RunDir(tmp_path), 0, host, is_shown=lambda rank, _local: rank == 0)
    for rank, trace in [(0, "Traceback of 0"), (1, "Traceback of 1"), (1, "Traceback of 1"), (1, "Traceback, new")]:
        failure = Failure("exception", "n0", rank, rank, 1, "ValueError: no", 0.0, trace)
        recorder.event("failure", {"first": True, **vars(failure)})
    recorder.close()
    assert caplog.messages == [
        "rank 0 on n0 failed: ValueError: no",
        "rank 1 on n0 failed: ValueError: no\nTraceback of 1",
        "rank 1 on n0 failed: ValueError: no",
        "rank 1 on n0 failed: ValueError: no\nTraceback, new",
    ]


def test_events_are_one_json_object_per_line(cluster: Cluster) -> None:
    cluster.seats()
    wait_for(lambda: cluster.events("round"))
    (path,) = event_files(cluster.rundir.path)
    for line in path.read_text().splitlines():
        assert {"time", "event"} <= json.loads(line).keys()


def test_the_steps_of_a_round_are_not_reported_for_the_next_one(cluster: Cluster) -> None:
    cluster.seats()
    for control in cluster.controls:
        control.report("running", 1)
        progress = Progress(62, drained=False, listens=True, first=1, first_at=100.0, step_at=162.0)
        control.report_progress(progress)
    wait_for(lambda: cluster.events("progress"))
    cluster.controls[1].report("failed", 1, Failure("exit", "n1", 1, 0, 9, "exit code 9", 0.0))
    cluster.wait_stop(1)
    cluster.seats()
    assert not any(control.status().listens for control in cluster.controls)
    for control in cluster.controls:
        control.report("running", 2)
        control.report_progress(Progress(61, drained=False, first=61, first_at=200.0, step_at=200.0))
    wait_for(lambda: cluster.events("progress")[-1]["round"] == 2)
    event = cluster.events("progress")[-1]
    assert (event["first"], event["step"], event["first_at"]) == (61, 61, 200.0)


def test_a_peer_that_resets_the_connection_immediately_counts_as_unreachable() -> None:
    class Reset:
        def get_extra_info(self, name: str) -> object:
            return ("127.0.0.1", 1) if name == "sockname" else None

    with pytest.raises(ConnectionResetError):
        channel.Channel(None, Reset(), OUTSIDER, SEAL, SEAL)  # type: ignore[arg-type]
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as threads:
        server.settimeout(30)

        def reset() -> None:
            for _ in range(50):
                met, _ = server.accept()
                met.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                met.close()

        async def dial() -> None:
            for _ in range(50):
                with pytest.raises((OSError, asyncio.TimeoutError)):
                    await channel.connect(Host(0, "n0", ("127.0.0.1",), server.getsockname()[1]), OUTSIDER, b"secret")

        done = threads.submit(reset)
        asyncio.run(dial())
        done.result()
