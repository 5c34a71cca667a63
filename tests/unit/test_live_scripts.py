"""Scripts of ``live`` that differ from the usual one: real processes on torch 2.14, as in test_live.py."""

from __future__ import annotations

import textwrap

import pytest
from live_agent import trainings
from live_nursery import Nursery
from torch_214 import IN_PLACE, TORCH_214

pytestmark = IN_PLACE

BEGIN = """
import os, time, torch
import torch.distributed as dist
from torch import nn
from live_faults import fault, options, write
from elastic_hpc.errors import UsageError
from elastic_hpc.training import live
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
def train(step):
    mine = torch.randn(12, 4, generator=torch.Generator().manual_seed(step))[run.world.rank :: run.world.size]
    optimizer.zero_grad()
    loss = run.model(mine).square().mean()
    fault("backward", step, run.world.rank)
    loss.backward()
    optimizer.step()
"""


def script(begin: str = "", before: str = "", first: str = "", last: str = "", after: str = "") -> str:
    """A script that runs ``begin`` before it joins the world, ``before`` before the loop, ``first`` and ``last`` in
    each step, and ``after`` after each step.
    """
    return f"""{BEGIN}
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
states = {{}}
{textwrap.dedent(begin)}
run = live(net, optimizer, scheduler=scheduler, **states, **options.get("live", {{}}))
{textwrap.dedent(before)}
for attempt in run.steps(until=options["until"]):
    with attempt as step:
{indent(first, 8)}
        train(step)
{indent(last, 8)}
        scheduler.step()
{indent(after, 4)}
weights = [each.sum().item() for each in net.parameters()]
write(end=run.step, epoch=scheduler.last_epoch, weights=weights, training=net.training)
os._exit(0)
"""


def indent(text: str, blanks: int) -> str:
    return textwrap.indent(textwrap.dedent(text), " " * blanks)


@pytest.fixture(scope="module")
def nursery():
    made = Nursery(TORCH_214)
    yield made
    made.close()


@pytest.fixture
def train(nursery, tmp_path):
    """Starts ``size`` workers of a script: ``train(TEXT, size, **options)``."""
    file = tmp_path / "script.py"
    with trainings(nursery, tmp_path) as start:
        yield lambda text, size, **options: file.write_text(text) and start(size, script=file, **options)


def ends(agents):
    """Assert that all workers of the last round end without an error. Returns their final records."""
    assert agents.ended() == [0] * len(agents.workers), agents.report()
    return [line for line in agents.lines() if "end" in line]


def test_ranks_interrupted_after_the_optimizer_have_the_same_schedule(train):
    """Rank 0 has completed the step, including its exchange of a number for a
    log; rank 1's exchange was interrupted.
    """
    log = """
        if step == 10 and run.world.round == 1:
            if run.world.rank == 2:
                dist.send(torch.ones(1), 0)
                fault("log", 10, 2)
            dist.recv(torch.ones(1), 2)
    """
    fault = {"where": "log", "step": 10, "rank": 2, "do": "SIGKILL"}
    agents = train(script(last=log), 3, until=14, faults=[fault])
    agents.until(lambda: not agents.workers[2].alive)
    agents.again()
    first, second = ends(agents)
    assert (first["end"], first["epoch"]) == (second["end"], second["epoch"]) == (14, 14)
    assert first["weights"] == second["weights"]


def test_ranks_may_evaluate_different_numbers_of_batches(train):
    evaluates = """
        if step == 5:
            run.model.eval()
            with torch.no_grad():
                for _ in range(3 if run.world.rank == 0 else 2):
                    run.model(torch.randn(8, 4))
            run.model.train()
    """
    assert len(ends(train(script(after=evaluates), 2, until=10))) == 2


def test_the_mode_of_the_model_holds_in_all_worlds_and_an_interrupted_evaluation_leaves_it(train):
    """The script sets the mode once; a worker that joins then sets it in a later world than the others."""
    evaluates = """
        if step == 10 and run.world.round == 1:
            net.train()
            fault("evaluation", 10, run.world.rank)
            dist.all_reduce(torch.ones(100))
            net.eval()
    """
    fault = {"where": "evaluation", "step": 10, "rank": 2, "do": "SIGKILL"}
    agents = train(script(before="run.model.eval()", last=evaluates), 3, until=14, faults=[fault])
    agents.until(lambda: not agents.workers[2].alive)
    agents.again(3)
    first, *others = ends(agents)
    assert [end["weights"] for end in others] == [first["weights"]] * 2
    assert [end["training"] for end in (first, *others)] == [False] * 3


def test_a_save_that_a_fault_interrupts_is_done_in_the_next_world(train, tmp_path):
    folder = tmp_path / "checkpoints"
    slow = """
        class Slow:
            def state_dict(self):
                fault("save", run.step if "run" in globals() else 0, 0)
                return {}
            def load_state_dict(self, _): pass
        states = {"slow": Slow()}
    """
    fault = {"where": "save", "step": 5, "rank": 0, "do": "SIGKILL"}
    saves = {"folder": str(folder), "checkpoint_every": 5}
    agents = train(script(begin=slow), 3, until=8, live=saves, faults=[fault])
    agents.until(lambda: not agents.workers[0].alive)
    agents.again()
    assert len(ends(agents)) == 2
    assert [path.name for path in sorted(folder.glob("step-*"))] == ["step-00000005", "step-00000008"]


def test_a_group_of_the_script_waits_for_a_rank_that_is_slow(train):
    """The rank is slow for longer than a world waits for its members, as in torch."""
    group = """
        if step == 2:
            if run.world.rank == 1:
                from elastic_hpc.training import reform
                time.sleep(reform._PATIENCE + 1)
            dist.all_reduce(torch.ones(100), group=dist.new_group(list(range(run.world.size))))
    """
    agents = train(script(first=group), 2, until=4)
    assert len(ends(agents)) == 2
    assert agents.round == 1


def test_a_rank_with_complete_state_does_not_hold_the_state_that_another_rank_receives(train):
    """The rank takes part piece by piece. A node has several ranks, and the state may need
    a large part of its memory.
    """
    large = """
        from elastic_hpc.training import live_state
        live_state._PIECE = 1 << 23
        class Large:
            def state_dict(self): return {"large": torch.ones(200 << 20, dtype=torch.uint8)}
            def load_state_dict(self, state): assert state["large"].sum() == 200 << 20
        states = {"large": Large()}
    """
    used = """
        def used(what):
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) >> 10 for line in status if line.startswith(what))
        if step == 12:
            write(rank=run.world.rank, peak=used("VmHWM"))
        if run.world.round == 1 and step == 9:
            with open("/proc/self/clear_refs", "w") as peak:
                peak.write("5")
            write(rank=run.world.rank, before=used("VmRSS"))
    """
    fault = {"where": "backward", "step": 10, "rank": 2, "do": "SIGKILL"}
    agents = train(script(begin=large, first=used), 3, until=14, faults=[fault])
    agents.until(lambda: not agents.workers[2].alive)
    agents.again(3)
    assert len(ends(agents)) == 3
    before, peak = (
        {line["rank"]: line[what] for line in agents.lines() if what in line} for what in ("before", "peak")
    )
    assert peak[0] - before[0] >= 200, "rank 0 sends the state"
    assert peak[1] - before[1] < 100


def test_a_second_run_in_a_process_is_refused(train):
    second = """
        try:
            live(nn.Linear(4, 1))
        except UsageError as error:
            write(refused=str(error))
    """
    agents = train(script(before=second), 2, until=2)
    assert len(ends(agents)) == 2
    first, second = [line["refused"] for line in agents.lines() if "refused" in line]
    assert first == second
    assert first.startswith("live: expected one run at a time in a process. For several networks: live(nn.ModuleDict(")


def test_a_folder_that_cannot_be_written_costs_checkpoints_but_no_worker(train, tmp_path):
    """Neither while the training saves, nor when a world begins. The last save must succeed."""
    folder = tmp_path / "checkpoints"
    away = """
        folder = options["live"]["folder"]
        if step == 3 and run.world.rank == 0:
            os.rename(folder, f"{folder}.away")
            open(folder, "w").close()
        if step == 12 and run.world.rank == 0:
            os.unlink(folder)
            os.rename(f"{folder}.away", folder)
    """
    fault = {"where": "backward", "step": 7, "rank": 2, "do": "SIGKILL"}
    saves = {"folder": str(folder), "checkpoint_every": 2}
    agents = train(script(first=away), 3, until=14, live=saves, faults=[fault])
    agents.until(lambda: not agents.workers[2].alive)
    agents.again()
    assert [end["end"] for end in ends(agents)] == [14, 14]
    assert (folder / "step-00000014").is_dir(), list(folder.iterdir())
    assert "the training continues" in (agents.folder / "out").read_text()
