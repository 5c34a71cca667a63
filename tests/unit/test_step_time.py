"""The time of a rank in a step before its collectives, with DistributedDataParallel on two gloo processes."""

from __future__ import annotations

import pickle
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from worlds import run

from elastic_hpc.errors import UsageError
from elastic_hpc.training import step_time, time_steps
from elastic_hpc.training.progress import LOCAL_DIR, WINDOW, forget_round, read_progress, read_times, report_progress
from elastic_hpc.training.step_time import StepTimer

WORLD = """
import datetime, os, sys, time
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from elastic_hpc.training import drain_requested, live, report_progress, time_steps

class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.06 if dist.get_rank() == slow else 0)
        return x

def net():
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), Slow(), nn.Linear(8, 4))

def train_in_place():
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    run = live(module, optimizer)
    for attempt in run.steps(until=20):
        with attempt:
            optimizer.zero_grad()
            run.model(torch.randn(4, 8)).sum().backward()
            optimizer.step()

def train():
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    model = DistributedDataParallel(net())
    time_steps(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(20):
        assert not drain_requested()
        with torch.no_grad():
            model(torch.randn(4, 8)) if step == 3 else None
        optimizer.zero_grad()
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        report_progress(step)

for case in sys.argv[2:]:
    how, slow, port = case.split(":")
    slow, folder, children = int(slow), f"{sys.argv[1]}/{how}{slow}", []
    os.mkdir(folder)
    for rank in range(2):
        if (child := os.fork()) == 0:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
            os.environ.update(ELASTIC_HPC_LOCAL_DIR=folder, LOCAL_RANK=str(rank))
            try:
                train_in_place() if how == "live" else train()
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        children.append(child)
    assert not any([os.waitpid(child, 0)[1] for child in children])
"""


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(LOCAL_DIR, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    forget_round()
    yield tmp_path / "progress.0"
    forget_round()


def test_the_agent_reads_the_times_of_the_last_steps(agent: Path) -> None:
    report_progress(0)
    assert read_times(agent) == (0, ())
    for step in range(1, 4):
        report_progress(step, own_seconds=step / 4)
    assert read_times(agent) == (3, (0.25, 0.5, 0.75))
    for step in range(4, 204):
        report_progress(step, own_seconds=step / 4)
    count, times = read_times(agent)
    assert count == 203
    assert sorted(times) == [step / 4 for step in range(204 - WINDOW, 204)]
    progress = read_progress(agent)
    assert progress
    assert progress.step == 203


def test_an_invalid_time_does_not_stop_training(agent: Path) -> None:
    for seconds in (float("nan"), float("inf"), -1.0, 1e300):
        report_progress(1, own_seconds=seconds)
    count, (only,) = read_times(agent)
    assert (count, round(only)) == (1, 10**9)
    assert read_times(agent.parent / "none") == (0, ())


def test_the_slow_rank_is_distinguished_from_the_rank_that_waits_for_it(tmp_path: Path) -> None:
    cases = [("script", 0), ("script", 1), ("live", 1)]
    run(WORLD, tmp_path, cases, 180)
    for how, slow in cases:
        usual = {}
        for rank in range(2):
            count, times = read_times(tmp_path / f"{how}{slow}/progress.{rank}")
            assert count == (20 if how == "live" else 19), "the first step begins before the first report"
            usual[rank] = statistics.median(times)
        assert usual[slow] >= 0.06
        assert usual[1 - slow] < 0.04, usual


def test_a_step_is_measured_to_its_first_gradient_and_only_once() -> None:
    net = nn.Linear(2, 2)
    timer = StepTimer(net)
    net(torch.ones(2)).sum().backward()
    assert timer.known() == [], "it has not begun"
    timer.begin()
    assert timer.known() == []
    for _ in range(2):
        net(torch.ones(2)).sum().backward()
    assert len(timer.known()) == 1
    assert timer.known() == []
    timer.begin()  # the step was interrupted, and is repeated
    timer.pause()
    timer.begin()
    timer.resume()
    net(torch.ones(2)).sum().backward()
    (seconds,) = timer.known()
    assert 0 < seconds < 60


def test_a_model_that_is_measured_can_be_saved_and_one_without_parameters_is_not_measured() -> None:
    net = nn.Linear(2, 2)
    StepTimer(net)
    pickle.loads(pickle.dumps(net))(torch.ones(2)).sum().backward()
    timer = StepTimer(nn.ReLU())
    timer.begin()
    assert timer.known() == []


class _Parallel(nn.Module):
    """Replaces DistributedDataParallel, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.module(values)


def test_a_model_with_buffers_that_is_measured_can_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.parallel.DistributedDataParallel", _Parallel)
    monkeypatch.setattr(step_time, "_own", None)
    model = _Parallel(nn.BatchNorm1d(2))
    time_steps(model)
    for saved in (model.module, model):
        pickle.loads(pickle.dumps(saved))(torch.ones(3, 2)).sum().backward()


def test_a_problem_with_a_measurement_ends_the_measurement_and_not_the_script(caplog: pytest.LogCaptureFixture) -> None:
    class Captured:
        def query(self) -> bool:
            raise RuntimeError("operation not permitted on an event last recorded in a capturing stream")

    timer = StepTimer(nn.Linear(2, 2))
    timer._done.append([Captured(), Captured()])
    assert timer.known() == []
    assert "capturing stream" in caplog.text
    timer.begin()
    timer.pause()
    timer.resume()
    assert timer.known() == []
    StepTimer(nn.LazyLinear(2)).begin()


def test_in_a_world_of_one_rank_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    time_steps(nn.Linear(2, 2))


def test_only_distributed_data_parallel_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="expected a DistributedDataParallel, not a Linear"):
        time_steps(nn.Linear(2, 2))
