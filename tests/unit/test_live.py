"""Workers that continue in place: real processes on torch 2.14; the test replaces their agents and the leader."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from live_agent import ROOT, SCRIPT, trainings
from live_nursery import Nursery
from on_demand import ON_DEMAND
from torch.distributed import TCPStore
from torch_214 import IN_PLACE, TORCH_214

from elastic_hpc.errors import UsageError
from elastic_hpc.training import live, read_progress
from elastic_hpc.training.progress import why_not_in_place
from elastic_hpc.workers.proc import is_stopped

pytestmark = IN_PLACE


@pytest.fixture(scope="module")
def nursery():
    made = Nursery(TORCH_214)
    yield made
    made.close()


@pytest.fixture
def train(nursery, tmp_path):
    """Starts a training: ``train(SIZE, **options of live_script)``."""
    with trainings(nursery, tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    """The losses of 250 steps in one process, without a launcher."""
    folder = tmp_path_factory.mktemp("alone")
    environ = {"OPTIONS": '{"until": 250}', "RECORD": str(folder / "record"), "PATH": os.environ["PATH"]}
    with (folder / "out").open("wb") as out:
        code = nursery.start(SCRIPT, environ, out.fileno()).wait(60)
    assert code == 0, (folder / "out").read_text()
    return [json.loads(line)["loss"] for line in (folder / "record").read_text().splitlines() if "loss" in line]


def finished(agents, undisturbed=None, until=60):
    """Assert that the workers of the last round end, and that each step has changed the weights of each worker once."""
    assert agents.ended() == [0] * len(agents.workers), agents.report()
    ends = {line["pid"]: line for line in agents.lines() if "end" in line}
    for worker in agents.workers:
        assert ends[worker.process.pid]["end"] == until
        assert ends[worker.process.pid]["done"] == list(range(until))
        assert ends[worker.process.pid]["weights"] == pytest.approx(ends[agents.workers[0].process.pid]["weights"])
    if undisturbed:
        # the mean loss of the step, as every rank knows it
        for line in agents.steps():
            assert line["loss"] == pytest.approx(undisturbed[line["step"]], rel=1e-3, abs=1e-5)


def pids(workers):
    return [worker.process.pid for worker in workers]


def test_when_a_worker_is_killed_the_others_keep_their_processes_and_no_step_is_lost(train, undisturbed):
    agents = train(3, until=60, faults=[{"where": "backward", "step": 20, "rank": 1, "do": "SIGKILL"}])
    first = agents.workers
    agents.until(lambda: not first[1].alive)
    agents.again()
    assert pids(agents.workers) == [first[0].process.pid, first[2].process.pid]
    finished(agents, undisturbed)
    assert not any(
        line.get("world", [0, 0, 0, 1])[3] == 2 and line["began"] for line in agents.lines() if "began" in line
    )


def test_a_worker_in_a_frozen_world_pauses_immediately(train, undisturbed):
    agents = train(3, until=60, faults=[{"where": "forward", "step": 20, "rank": 1, "do": "SIGSTOP"}])
    agents.until(lambda: any(line.get("fault") for line in agents.lines()))
    kept = agents.pause([agents.workers[0], agents.workers[2]], seconds=4)
    assert [worker.last("paused")["step"] for worker in kept] == [20, 20]
    agents.start(2, kept)
    finished(agents, undisturbed)


def test_workers_continue_when_the_host_of_their_store_is_frozen(train, tmp_path, nursery, undisturbed):
    agents = train(1, until=60, pause=0.01)
    agents.store_apart = True
    agents.at_step(5)
    agents.again(3, now=False)
    agents.at_step(20)
    agents.store.send_signal(signal.SIGSTOP)
    agents.workers[2].process.kill()
    agents.store_apart = False
    agents.until(lambda: not agents.workers[2].alive)
    agents.again()
    finished(agents, undisturbed)


def test_a_worker_that_joins_gets_the_state_of_the_others_and_no_checkpoint(train, undisturbed):
    agents = train(2, until=60, pause=0.01, live={"checkpoint_every": 7})
    agents.at_step(10)
    kept = agents.pause(now=False)
    steps = {worker.last("paused")["step"] for worker in kept}
    agents.start(3, kept)
    agents.until(lambda: sum("began" in line for line in agents.lines()) == 3)
    began = [line["began"] for line in agents.lines() if "began" in line]
    assert began[2] == max(steps) > 10
    finished(agents, undisturbed)


def test_a_second_fault_while_the_world_is_formed_is_survived(train, undisturbed):
    agents = train(2, until=60, pause=0.01)
    agents.at_step(10)
    kept = agents.pause()
    agents.start(3, kept)
    agents.workers[2].process.kill()
    agents.again()
    assert pids(agents.workers) == pids(kept)
    finished(agents, undisturbed)


def test_a_worker_pauses_while_it_waits_for_the_others_of_its_first_world(train):
    agents = train(2, until=5)
    agents.workers[1].process.kill()
    agents.until(lambda: agents.workers[0].link)
    agents.again()
    finished(agents, until=5)


@pytest.mark.parametrize(
    ("seed", "steps", "every"), [(0, 60, 9), (1, 60, 9), pytest.param(2, 250, 8, id="thirty", marks=ON_DEMAND)]
)
def test_in_a_storm_of_faults_no_step_is_skipped_or_done_twice(train, undisturbed, seed, steps, every):
    dice = random.Random(seed)
    places = ["forward", "backward", "between", "torn", "logging"]
    faults = [
        {"where": dice.choice(places), "step": step, "rank": dice.randrange(2), "do": dice.choice(["SIGKILL", "raise"])}
        for step in range(4, steps - 4, every)
    ]
    agents = train(3, until=steps, faults=faults, live={"checkpoint_every": 10})
    for _ in faults:
        agents.until(lambda: not all(worker.alive for worker in agents.workers))
        if dice.random() < 0.3:  # another fault while the world is formed
            kept = agents.pause([worker for worker in agents.workers if worker.alive])
            agents.start(4, kept)
            agents.workers[3].process.kill()
        agents.again(3)
    finished(agents, undisturbed, until=steps)


def test_a_repeated_step_draws_the_same_random_numbers(train):
    agents = train(2, until=30, faults=[{"where": "backward", "step": 20, "rank": 1, "do": "SIGKILL"}])
    agents.until(lambda: not agents.workers[1].alive)
    agents.again()
    finished(agents, until=30)
    drawn = [
        (line["at"], line["drawn"])
        for line in agents.lines()
        if "at" in line and line["pid"] == agents.workers[0].process.pid
    ]
    assert [step for step, _ in drawn] == [*range(21), *range(20, 30)]
    assert drawn[20] == drawn[21]
    assert len({value for _, value in drawn}) == 30


def test_a_rank_whose_optimizers_have_not_all_stepped_takes_the_state_of_another_rank(train, undisturbed):
    agents = train(3, until=60, torn="one", faults=[{"where": "torn", "step": 20, "rank": 2, "do": "SIGKILL"}])
    agents.until(lambda: not agents.workers[2].alive)
    kept = agents.pause(agents.workers[:2])
    assert [worker.last("paused")["step"] for worker in kept] == [21, 20]
    agents.start(2, kept)
    finished(agents, undisturbed)


def test_a_world_without_a_complete_state_ends_with_a_message(train):
    agents = train(2, until=60, torn="all", faults=[{"where": "torn", "step": 20, "rank": 1, "do": "SIGKILL"}])
    agents.until(lambda: not agents.workers[1].alive)
    agents.again()
    assert agents.ended() == [1]
    assert "no rank has a whole state" in agents.workers[0].last("cannot")["why"]


def test_all_ranks_complete_the_last_step_if_it_is_interrupted(train, undisturbed):
    agents = train(3, until=60, faults=[{"where": "logging", "step": 59, "rank": 1, "do": "SIGKILL"}])
    agents.until(lambda: not agents.workers[1].alive)
    agents.again()
    finished(agents, undisturbed)


def test_an_error_in_a_script_ends_only_its_own_worker(train, undisturbed):
    agents = train(2, until=60, faults=[{"where": "backward", "step": 20, "rank": 1, "do": "raise"}])
    agents.until(lambda: not agents.workers[1].alive)
    assert agents.workers[1].process.returncode == 1
    agents.until(lambda: agents.workers[0].has_said("broken"))
    assert "gloo" in agents.workers[0].last("broken")["why"]
    agents.again(2)
    finished(agents, undisturbed)


def test_a_drain_saves_and_ends_the_loop_and_a_new_world_continues_from_there(train, undisturbed):
    agents = train(2, until=60, pause=0.01, live={"checkpoint_every": 1000})
    agents.at_step(10)
    (agents.folder / "1" / "drain").touch()
    assert agents.ended() == [0, 0], agents.report()
    ends = [line for line in agents.lines() if "end" in line]
    assert [end["stopped"] for end in ends] == [True, True]
    assert ends[0]["end"] == ends[1]["end"] < 60
    progress = read_progress(agents.folder / "1" / "progress.1")
    assert (progress.step, progress.drained, progress.listens) == (ends[0]["end"], True, True)
    agents.start(1)
    finished(agents, undisturbed)
    assert [line["began"] for line in agents.lines() if "began" in line][-1] == ends[0]["end"]


def test_a_loop_that_all_ranks_leave_by_break_ends_like_any_other(train):
    agents = train(3, until=60, **{"break": 20})
    assert agents.ended() == [0, 0, 0], agents.report()
    assert [line["end"] for line in agents.lines() if "end" in line] == [21] * 3


def test_a_worker_ends_when_its_agent_is_gone(train):
    agents = train(1, until=10**6)
    agents.at_step(5)
    agents._selector.unregister(agents.workers[0].link)
    agents.workers[0].link.close()
    agents.workers[0].link = None
    assert agents.ended(10) == [1]


def test_a_worker_that_its_agent_has_not_started_itself_is_not_kept(nursery, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, (tmp_path / "out").open("wb") as out:
        listener.bind(str(tmp_path / "live"))
        listener.listen()
        environ = {
            "OPTIONS": '{"until": 3}',
            "RECORD": str(tmp_path / "record"),
            "ELASTIC_HPC_LIVE": str(tmp_path / "live"),
        }
        assert nursery.start(SCRIPT, environ, out.fileno()).wait(60) == 0
    assert "a fault restarts this worker: its agent cannot keep it" in (tmp_path / "out").read_text()


@pytest.mark.parametrize(
    ("named", "error"),
    [
        ({"checkpoint_every": 0}, "expected a number of steps, at least 1"),
        ({"checkpoint_every": 5, "load": int}, "expected one of them"),
        ({"model": torch.nn.Linear(1, 1)}, r"live\(model=...\): expected another name"),
        ({"epoch": 3}, r"epoch is a int: expected state_dict\(\)"),
    ],
)
def test_unusable_arguments_are_refused(named, error):
    with pytest.raises(UsageError, match=error):
        live(torch.nn.Linear(1, 1), **named)


def test_an_optimizer_whose_steps_torch_does_not_report_is_refused():
    class Outer:
        state_dict = load_state_dict = step = lambda *_: {}

    with pytest.raises(UsageError, match=r"live: Outer: expected a torch.optim.Optimizer"):
        live(torch.nn.Linear(1, 1), Outer())


def test_a_loop_without_its_with_block_is_refused():
    with pytest.raises(UsageError, match="with attempt as step"):
        list(live(torch.nn.Linear(1, 1)).steps(until=3))


CONTRACT = """
import inspect, os, torch, torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel
from elastic_hpc.training import reform

assert reform.obstacle(cuda=False) == ""
assert list(inspect.signature(dist._reconfigure).parameters)[:4] == ["uuid", "handles", "group", "timeout"]
assert "enable_reconfigure" in inspect.signature(dist.init_process_group).parameters
assert hasattr(DistributedDataParallel, "_remove_autograd_hooks")
assert {"init_sync", "forward_sync_buffers"} <= inspect.signature(DistributedDataParallel).parameters.keys()
assert {"pg_group_ranks", "group_count"} <= set(dir(c10d._world))
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["PORT"])
group = reform.Group(lambda: False, cuda=False)
for number in 1, 2:
    assert group.form(reform.LiveWorld(0, 1, 0, number, 0), ["whole", 5]) == [["whole", 5]]
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
assert dist._supports_reconfigure()
assert len(group._own) == 1, "gloo listens on one port"
# as soon as torch can do these itself, take out what stands in for them
assert "enable_reconfigure" not in inspect.signature(dist.new_group).parameters, "control_group() may be a group again"
dist.destroy_process_group()
"""


def test_torch_reconfigures_a_group_as_the_module_reform_assumes(nursery, tmp_path):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (tmp_path / "contract.py").write_text(CONTRACT)
    with (tmp_path / "out").open("wb") as out:
        environ = {"PORT": str(store.port), "GLOO_SOCKET_IFNAME": "lo"}
        code = nursery.start(tmp_path / "contract.py", environ, out.fileno()).wait(60)
    assert code == 0, (tmp_path / "out").read_text()


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        (sys.executable, "cannot reconfigure a process group: needs 2.14"),
        pytest.param(TORCH_214, "its agent cannot keep it", marks=ON_DEMAND),
    ],
)
def test_below_torch_2_14_and_under_torchrun_the_same_script_trains(tmp_path, undisturbed, python, reason):
    environ = {
        **os.environ,
        "OPTIONS": '{"until": 5}',
        "RECORD": str(tmp_path / "record"),
        "ELASTIC_HPC_LIVE": "/nowhere",
    }
    command = [python, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT)]
    ran = subprocess.run(
        command,
        env={**environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONOPTIMIZE": "1"},  # like python -O
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert reason in ran.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "record").read_text().splitlines() if "loss" in line]
    assert sorted(losses) == pytest.approx(sorted(undisturbed[:5] * 2), rel=1e-3)


def test_a_worker_that_gloo_does_not_release_reports_that_immediately(train):
    for _ in range(5):  # on a busy machine the message may arrive before its receiver stops
        agents = train(2, until=60, halfway=20)
        agents.until(lambda: is_stopped(agents.workers[1].process.pid))  # noqa: B023 - called at once
        worker = agents.workers[0]
        worker.link.send(b'{"do": "pause", "now": true}')
        agents.until(lambda: worker.has_said("cannot") or worker.has_said("paused"), 20)  # noqa: B023
        if worker.has_said("cannot"):
            break
    assert "gloo does not end a collective" in worker.last("cannot")["why"]


def test_a_kept_worker_does_not_open_more_files_in_each_round(train):
    agents = train(1, until=10**6, pause=0.01)
    counts = []
    for round in range(4):
        agents.at_step(round)
        counts.append(len(os.listdir(f"/proc/{agents.workers[0].process.pid}/fd")))
        agents.again(1, now=False)
    assert counts[1] == counts[2] == counts[3]


@pytest.mark.parametrize(("rank", "signal"), [(2, "SIGSTOP"), (2, "SIGKILL"), (0, "SIGKILL")])
def test_the_state_is_sent_again_when_its_sender_or_receiver_is_lost(train, undisturbed, rank, signal):
    agents = train(2, until=60, pause=0.01, ballast=1 << 24, in_share=[2, rank, signal])
    agents.at_step(5)
    agents.again(3, now=False)
    lost = agents.workers[rank]
    agents.until(lambda: any(line.get("fault") for line in agents.lines()))
    agents.until(lambda: is_stopped(lost.process.pid) if signal == "SIGSTOP" else not lost.alive)
    kept = agents.pause([worker for worker in agents.workers if worker is not lost], seconds=20)
    assert len(kept) == 2, "they are freed"
    agents.start(2, kept)
    finished(agents, undisturbed)


def test_a_compiled_model_continues_in_place(train, undisturbed):
    faults = [{"where": "backward", "step": 5, "rank": 1, "do": "SIGKILL"}]
    agents = train(3, until=10, compile="aot_eager", faults=faults)
    first = agents.workers
    agents.until(lambda: not first[1].alive)
    agents.again()
    assert pids(agents.workers) == [first[0].process.pid, first[2].process.pid]
    finished(agents, undisturbed, until=10)


@ON_DEMAND
@pytest.mark.parametrize("how", ["spawn", "fork"])
def test_the_processes_of_a_loader_are_kept_and_a_spawned_process_holds_no_connection_of_the_world(train, how):
    faults = [{"where": "backward", "step": 8, "rank": 1, "do": "SIGKILL"}]
    agents = train(3, script=Path(__file__).with_name("live_loader.py"), until=30, faults=faults, how=how)
    first = agents.workers
    agents.until(lambda: not first[1].alive, 120)
    agents.again()
    assert pids(agents.workers) == [first[0].process.pid, first[2].process.pid]
    assert agents.ended() == [0, 0], agents.report()
    assert {line["sockets"] for line in agents.steps()} == {0.0} or how == "fork"
    assert not any("Z" in line["states"] for line in agents.lines() if "end" in line)


SHARDED = """
import os, sys
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from elastic_hpc.errors import UsageError
from elastic_hpc.training import live
from live_faults import options, write

wrap = {"fsdp2": fully_shard, "fsdp1": lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu"))}
net = nn.Linear(8, 8)
every = options.get("every")
try:
    run = live(net, torch.optim.SGD(net.parameters(), lr=0.1), wrap=wrap[options["how"]], checkpoint_every=every)
except UsageError as error:
    write(refused=str(error))
    os._exit(0)
write(linked=run._link is not None, step_=run.step)
os._exit(0)
"""


@pytest.mark.parametrize(("how", "every"), [("fsdp2", None), ("fsdp1", None), ("fsdp2", 5)])
def test_a_sharded_model_is_restarted_and_the_agent_knows_why(train, tmp_path, how, every):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    agents = train(2, script=script, how=how, **({"every": every} if every else {}))
    assert agents.ended() == [0, 0], agents.report()
    if every:
        assert all("is sharded" in line["refused"] for line in agents.lines())
        return
    assert [line["linked"] for line in agents.lines()] == [False, False]
    agents.until(lambda: not any(worker.link for worker in agents.workers))
    for rank in range(2):
        assert "is sharded, so no rank has the whole state" in why_not_in_place(str(agents.folder / "1"), rank)


def test_a_joining_worker_starts_with_the_current_loop_of_the_others(train, undisturbed):
    faults = [{"where": "backward", "step": step, "rank": 1, "do": "SIGKILL"} for step in (30, 40)]
    agents = train(3, until=60, loops=[20, 40, 60], faults=faults)
    for _ in faults:
        agents.until(lambda: not all(worker.alive for worker in agents.workers))
        agents.again(3)
    finished(agents, undisturbed)


def test_an_interrupted_step_changes_nothing_before_it_is_repeated(train):
    """Buffers, random numbers, the scale of the loss, gradients: the final state is the same as without a fault."""
    whole = Path(__file__).with_name("live_whole.py")
    places = [("backward 0", 3, 1), ("unscaled", 5, 2), ("skipped", 6, 1), ("backward 1", 8, 2)]
    faults = [{"where": where, "step": step, "rank": rank, "do": "SIGKILL"} for where, step, rank in places]
    ends = []
    for some in [], faults:
        agents = train(3, script=whole, until=10, faults=some)
        for _ in some:
            agents.until(lambda: not all(worker.alive for worker in agents.workers))  # noqa: B023 - called at once
            agents.again(3)
        assert agents.ended() == [0, 0, 0], agents.report()
        ends += [line["has"] for line in agents.lines() if line.get("end") == 0]
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)
    drawn = {}
    for line in agents.lines():
        if "drawn" in line:
            assert drawn.setdefault((line["pid"], line["at"]), line["drawn"]) == line["drawn"]
