"""Messages between a training script and its agent, and a constant global batch, with real worlds over gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import run_world

from elastic_hpc.errors import UsageError
from elastic_hpc.training import (
    Leaving,
    Progress,
    accumulation,
    drain_requested,
    leaving,
    read_progress,
    report_progress,
)
from elastic_hpc.training.departures import own_question
from elastic_hpc.training.drain import own_drain
from elastic_hpc.training.progress import own_progress_file

ROOT = Path(__file__).parents[2]


def forget():
    own_progress_file.cache_clear()
    own_drain.cache_clear()
    own_question.cache_clear()


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """Reset the module's state, without an agent."""
    for name in ("ELASTIC_HPC_LOCAL_DIR", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    forget()
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # another test of this process may have left one
    yield
    signal.signal(signal.SIGTERM, handler)
    forget()


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """The folder that an agent would share with this worker."""
    monkeypatch.setenv("ELASTIC_HPC_LOCAL_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "3")
    return tmp_path


# --- progress -------------------------------------------------------------------------------------------------------


def told(agent, rank=3):
    """The step, and the state of drains."""
    return read_progress(agent / f"progress.{rank}")[:3]


def test_the_agent_reads_the_step_that_was_reported_last(agent):
    assert read_progress(agent / "progress.3") is None
    for step in (0, 1, 2**40):
        report_progress(step)
        assert told(agent) == Progress(step, drained=False)[:3]
    assert os.listdir(agent) == ["progress.3"]


def test_the_agent_reads_the_first_step_of_the_script_and_its_losses(agent):
    before = time.time()
    report_progress(41, loss=2.5)
    began = read_progress(agent / "progress.3")
    with warnings.catch_warnings(action="error"):
        report_progress(42, loss=torch.tensor(float("nan"), requires_grad=True))  # as the loss that backward() has used
    seen = read_progress(agent / "progress.3")
    assert (seen.first, seen.first_at, seen.step, seen.loss) == (41, began.first_at, 42, None)
    assert began.loss == 2.5
    assert before <= began.step_at == began.first_at <= seen.step_at <= time.time()


def test_the_agent_learns_whether_the_script_has_seen_the_drain(agent):
    assert not drain_requested()
    assert told(agent) == Progress(-1, drained=False, listens=True)[:3]
    (agent / "drain").touch()
    assert drain_requested()
    assert told(agent) == Progress(-1, drained=True, listens=True)[:3]
    report_progress(7)
    assert told(agent) == Progress(7, drained=True, listens=True)[:3]
    (agent / "drain").unlink()
    assert drain_requested()


def test_a_damaged_record_is_ignored(tmp_path):
    (tmp_path / "progress.0").write_bytes(b"short")
    assert read_progress(tmp_path / "progress.0") is None
    assert read_progress(tmp_path) is None


def test_progress_that_cannot_be_written_does_not_stop_training(agent):
    (agent / "progress.3").symlink_to("/dev/full")
    report_progress(1)
    (agent / "progress.3").unlink()
    agent.rmdir()
    forget()
    report_progress(2)
    agent.mkdir()
    report_progress(3)
    assert told(agent) == Progress(3, drained=False)[:3]


def test_a_step_that_is_no_number_is_a_fault_of_the_script_also_without_an_agent():
    with pytest.raises(TypeError):
        report_progress(1.5)  # type: ignore[arg-type]


def test_without_an_agent_the_script_reports_nothing_and_gets_no_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drain").touch()
    report_progress(1)
    assert not drain_requested()
    assert os.listdir(tmp_path) == ["drain"]


def test_agents_and_scripts_that_need_no_torch_import_none(tmp_path):
    code = (
        "import sys; from elastic_hpc.training import *; report_progress(1); drain_requested(); accumulation(4, 2);"
        "Checkpoints(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# --- drain ----------------------------------------------------------------------------------------------------------


def test_only_every_nth_call_checks_for_a_drain(agent):
    (agent / "drain").touch()
    assert [drain_requested(every=3) for _ in range(5)] == [False, False, True, True, True]
    with pytest.raises(UsageError, match="every=0"):
        drain_requested(every=0)


def test_sigterm_which_slurm_sends_to_workers_too_is_a_drain_for_a_script_that_listens(agent):
    assert not drain_requested()
    signal.raise_signal(signal.SIGTERM)
    assert drain_requested()


def test_a_process_that_a_listening_script_forks_still_dies_of_sigterm(tmp_path):
    code = (
        "import os, signal; from elastic_hpc.training import drain_requested; assert not drain_requested()\n"
        "ready, told = os.pipe(); child = os.fork()\n"
        "if child == 0: os.write(told, b'.'); signal.pause(); os._exit(7)\n"
        "os.read(ready, 1); os.kill(child, signal.SIGTERM)\n"
        "assert os.waitpid(child, 0)[1] == signal.SIGTERM; assert not drain_requested()"
    )
    environ = {**os.environ, "ELASTIC_HPC_LOCAL_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ, timeout=60)


def drained(folders: list[Path], every: int) -> tuple[list[bool], Progress | None]:
    """Results of ten calls on this rank (on rank 1 the drain file appears before the fifth), and its final record."""
    rank = int(os.environ["RANK"])
    os.environ["ELASTIC_HPC_LOCAL_DIR"] = str(folders[rank])
    answers = []
    for call in range(1, 11):
        if rank == 1 and call == 5:
            (folders[rank] / "drain").touch()
        report_progress(call)
        answers.append(drain_requested(every))
    return answers, told(folders[rank], rank)


@pytest.mark.parametrize(("every", "first"), [(1, 5), (4, 8)])
def test_all_ranks_learn_of_a_drain_at_the_same_call_even_if_only_one_agent_announces_it(tmp_path, every, first):
    folders = [tmp_path / str(rank) for rank in range(3)]
    for folder in folders:
        folder.mkdir()
    expected = [call >= first for call in range(1, 11)], Progress(10, drained=True, listens=True)[:3]
    assert run_world(3, drained, folders, every) == [expected] * 3


def heard_before(folder: Path) -> list[bool]:
    """Rank 0 learns of the drain before there is a process group."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        os.environ["ELASTIC_HPC_LOCAL_DIR"] = str(folder)
    initialised = dist.is_initialized
    dist.is_initialized = lambda: False
    before = drain_requested()
    dist.is_initialized = initialised
    return [before, drain_requested(every=3), drain_requested(every=3), drain_requested(every=3)]


def test_a_rank_that_learned_of_a_drain_before_the_process_group_still_informs_the_others(tmp_path):
    (tmp_path / "drain").touch()
    assert run_world(2, heard_before, tmp_path) == [[True, False, True, True], [False, False, True, True]]


def talks_without_agents() -> int:
    """The number of exchanges with the other ranks in ten calls."""
    import torch.distributed as dist

    talks = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *given, **named: (talks.append(1), all_reduce(*given, **named))
    assert not any(drain_requested() for _ in range(10))
    return len(talks)


def test_under_plain_torchrun_the_ranks_agree_once_that_no_drain_can_come():
    assert run_world(2, talks_without_agents) == [1, 1]


# --- who leaves -----------------------------------------------------------------------------------------------------


def who_leaves(folders: list[Path], every: int) -> list[Leaving | None]:
    """Results of six calls on this rank. Before the third call, the job must leave the nodes of ranks 1 and 2; before
    the fifth call, the node of rank 1 may stay again.
    """
    rank = int(os.environ["RANK"])
    os.environ["ELASTIC_HPC_LOCAL_DIR"] = str(folders[rank])
    answers = []
    for call in range(1, 7):
        if call == 3 and rank:
            (folders[rank] / "leaving").write_text("2000000000" if rank == 1 else "1")
        if call == 5 and rank == 1:
            (folders[rank] / "leaving").unlink()
        answers.append(leaving(every))
    return answers


@pytest.mark.parametrize(("every", "answers"), [
    (1, [None, None, Leaving((1, 2), 2e9), Leaving((1, 2), 2e9), Leaving((2,), None), Leaving((2,), None)]),
    (3, [None, None, Leaving((1, 2), 2e9), Leaving((1, 2), 2e9), Leaving((1, 2), 2e9), Leaving((2,), None)]),
])  # fmt: skip
def test_all_ranks_learn_at_the_same_call_which_of_them_are_on_nodes_that_the_job_will_leave(tmp_path, every, answers):
    folders = [tmp_path / str(rank) for rank in range(3)]
    for folder in folders:
        folder.mkdir()
    assert run_world(3, who_leaves, folders, every) == [answers] * 3


def test_without_an_agent_no_rank_leaves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaving").write_text("1")
    assert leaving() is None
    with pytest.raises(UsageError, match="every=0"):
        leaving(every=0)


SCRIPT = """
import gc, os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from elastic_hpc.training import Checkpoints, accumulation, drain_requested, report_progress
if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
net = torch.nn.Linear(2, 1)
model = DistributedDataParallel(net) if dist.is_initialized() else net
checkpoints = Checkpoints(sys.argv[1])
step = checkpoints.load(lambda path: torch.load(path / "state.pt")["step"]) or 0
end = step + 3
while step < end and not drain_requested():
    share = accumulation(5, 2)
    for part in share.micro_batches(model):
        (model(torch.ones(5, 2)[part]).sum() * share.scale).backward()
    report_progress(step := step + 1)
    with checkpoints.save(step) as path:
        if os.environ.get("RANK", "0") == "0":
            torch.save({"step": step}, path / "state.pt")
model = None
gc.collect()
if dist.is_initialized():
    dist.destroy_process_group()
"""


def test_a_script_that_uses_all_of_it_runs_under_plain_torchrun_and_plain_python(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--log-dir", str(tmp_path)]
    for launcher in (torchrun, []):
        command = [sys.executable, *launcher, str(script), str(tmp_path / "checkpoints")]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    seen = sorted(path.name for path in (tmp_path / "checkpoints").glob("[!.]*"))
    assert seen == [f"step-{step:08d}" for step in (4, 5, 6)]


# --- a constant global batch ----------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 20))
def test_the_shares_add_up_to_the_batch_in_the_same_number_of_micro_batches(global_batch, micro_batch, world_size):
    shares = [accumulation(global_batch, micro_batch, world_size=world_size, rank=rank) for rank in range(world_size)]
    samples = range(global_batch)
    assert [sample for share in shares for part in share.slices for sample in samples[part]] == list(samples)
    sizes = [[len(samples[part]) for part in share.slices] for share in shares]
    assert len({len(of_rank) for of_rank in sizes}) == 1
    assert max(map(sum, sizes)) - min(map(sum, sizes)) <= 1
    assert max(map(max, sizes)) <= micro_batch
    assert len(sizes[0]) == -(-max(map(sum, sizes)) // micro_batch)  # no more of them than needed
    if global_batch >= world_size:
        assert all(of_rank[-1] for of_rank in sizes)
        assert micro_batch == 1 or all(map(all, sizes))
    assert all(Fraction(share.scale).limit_denominator(1000) == Fraction(world_size, global_batch) for share in shares)


@pytest.mark.parametrize("given", [(0, 1, 1, 0), (1, 0, 1, 0), (4, 2, 2, 2), (4, 2, 2, -1)])
def test_impossible_batches_and_ranks_are_refused(given):
    global_batch, micro_batch, world_size, rank = given
    with pytest.raises(UsageError, match=rf"accumulation\({global_batch}, {micro_batch}, {world_size=}, {rank=}\)"):
        accumulation(global_batch, micro_batch, world_size=world_size, rank=rank)


def test_ranks_that_are_not_connected_get_no_share(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="init_process_group"):
        accumulation(4, 2)


def gradients(global_batch: int, micro_batch: int) -> tuple[list[list[float]], int]:
    """Gradients after one step of this world on a batch that is the same for all; micro batches of this rank."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()
    inputs, labels = torch.randn(global_batch, 3).double(), torch.randint(4, (global_batch,))
    model: Any = DistributedDataParallel(net) if os.environ["WORLD_SIZE"] != "1" else net
    share = accumulation(global_batch, micro_batch)
    for part in share.micro_batches(model):
        (cross_entropy(model(inputs[part]), labels[part], reduction="sum") * share.scale).backward()
    return [parameter.grad.flatten().tolist() for parameter in net.parameters()], len(share.slices)


def whole_batch(gradients_of: Callable[..., Any], global_batch: int) -> list[list[float]]:
    ((found, micro_batches),) = run_world(1, gradients_of, global_batch, global_batch)
    assert micro_batches == 1
    return found


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "counts"), [(11, 2, (6, 3, 2)), (5, 1, (5, 3, 2)), (2, 4, (1, 1, 1))]
)
def test_a_world_of_any_size_has_the_gradient_of_one_process_with_the_whole_batch(global_batch, micro_batch, counts):
    expected = whole_batch(gradients, global_batch)
    for world_size, count in enumerate(counts, 1):
        for found, micro_batches in run_world(world_size, gradients, global_batch, micro_batch):
            assert micro_batches == count
            for ours, theirs in zip(found, expected, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
