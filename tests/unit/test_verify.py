"""Ranks that no longer store or compute the same values, on two or three gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
from worlds import run

from elastic_hpc.errors import UsageError
from elastic_hpc.membership.causes import Cause, explain
from elastic_hpc.training import verify
from elastic_hpc.workers.failures import stderr_tail

WORLD = """
import datetime, os, sys
import torch, torch.distributed as dist
from torch.nn.functional import cross_entropy, dropout
from torch.nn.parallel import DistributedDataParallel
from elastic_hpc.training import verify

def loss(module, batch):
    return cross_entropy(dropout(module(batch["x"]), 0.1), batch["y"])

def train(rank, how):
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.manual_seed(rank)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(12):
        batch = {"x": torch.randn(8, 8), "y": torch.randint(4, (8,))}
        audits = {"loss": loss, "batch": batch} if how.startswith("audit") else {}
        if how == "audit-tolerance":
            audits["tolerance"] = 1e-4
        before = [each.clone() for each in net.buffers()], torch.get_rng_state()
        verify(model, step, every=5, **audits)
        assert all(map(torch.equal, before[0], net.buffers())) and torch.equal(before[1], torch.get_rng_state())
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        if how == "parameter" and rank == 1 and step == 6:
            net[0].weight.data.view(torch.int32)[3, 3] ^= 1  # the least bit
        if how in ("audit", "audit-tolerance") and rank == 1 and step == 6:
            net[3].register_forward_hook(lambda _, __, out: out * (1 + 2.0 ** (-8 if "tol" in how else -22)))

folder = sys.argv[1]
for case in sys.argv[2:]:
    how, ranks, port = case.split(":")
    children = []
    for rank in range(int(ranks)):
        if (child := os.fork()) == 0:
            os.dup2(os.open(f"{folder}/{how}.{ranks}.{rank}", os.O_CREAT | os.O_WRONLY, 0o600), 2)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=ranks)
            try:
                train(rank, how)
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        children.append(child)
    print(case, *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


CASES = [("parameter", 3), ("audit", 3), ("audit-tolerance", 3), ("parameter", 2), ("audit-nothing", 2)]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[tuple[Cause | None, str]]]:
    """Why each rank ended (None if it has done all steps), and its stderr; by fault and number of ranks."""
    folder = tmp_path_factory.mktemp("worlds")
    found = {}
    for (how, ranks), words in zip(CASES, run(WORLD, folder, CASES, 300), strict=True):
        written = [stderr_tail(folder / f"{how}.{ranks}.{rank}") for rank in range(ranks)]
        codes = [int(code) for code in words[1:]]
        found[how, ranks] = [
            (explain(code, text) if code else None, text) for code, text in zip(codes, written, strict=True)
        ]
    return found


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("parameter", "the parameters"),
        ("audit", "the gradients of one micro batch"),
        ("audit-tolerance", "the loss and gradients of one micro batch (by more than 0.0001)"),
    ],
)
def test_the_rank_of_three_that_differs_is_named_in_the_next_audit(worlds: Any, how: str, what: str) -> None:
    (first, said), (wrong, _), (last, _) = worlds[how, 3]
    assert wrong
    assert wrong.known == "computes wrongly"
    assert wrong.message == (
        f"elastic_hpc.training.audit.Diverged: this rank, 1, differs in {what} at step 10 from 2 of 3 ranks, which "
        "agree"
    )
    assert first
    assert last
    assert first.collateral
    assert last.collateral
    assert f"ranks [1] differ in {what} at step 10 from the 2 others" in said


def test_of_two_ranks_none_is_named(worlds: Any) -> None:
    assert [cause and cause.known for cause, _ in worlds["parameter", 2]] == ["ranks differ"] * 2


def test_ranks_that_agree_train_on(worlds: Any) -> None:
    assert [cause for cause, _ in worlds["audit-nothing", 2]] == [None, None]


def test_a_single_rank_has_nothing_to_compare_with() -> None:
    verify([], 0)
    with pytest.raises(UsageError, match="at least 1"):
        verify([], 0, every=0)
