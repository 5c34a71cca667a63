"""An interrupted step of a loop in place: whether it counts as done, and that it leaves no changes if it does not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from elastic_hpc.training.live_step import Optimizers, StepStart


@pytest.mark.parametrize(
    ("done", "stepped", "expected"),
    [
        ([], [1, 1], "done"),
        ([], [1, 0], "half done"),
        ([], [0, 0], "not done"),
        ([[1, 1]], [1, 0], "half done"),
        ([[1, 0], [0, 1]], [1, 0], "done"),  # the optimizers step in turn
        ([[1, 0]], [1, 0], "half done"),  # the other optimizer may be about to step for the first time
        ([[5, 0], [5, 1]], [5, 0], "half done"),
        ([[5, 0], [5, 1]], [5, 1], "done"),
        ([[0, 0], [1, 1]], [0, 0], "not done"),  # a GradScaler skips steps
        ([[2, 1]], [1, 1], "half done"),
    ],
)
def test_a_step_is_done_if_the_optimizers_stepped_as_in_a_completed_step(done, stepped, expected):
    optimizers = [torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1) for _ in range(2)]
    counts = Optimizers(optimizers)
    for times in [*done, stepped]:
        counts.begin()
        for optimizer, count in zip(optimizers, times, strict=True):
            for _ in range(count):
                optimizer.step()
        if times is not stepped:
            counts.end()
    assert counts.interrupted() == (expected == "done", expected == "half done")


def test_the_changes_of_an_interrupted_step_are_undone():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    net[0].register_buffer("computed", torch.zeros(1), persistent=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    start = StepStart(net, [optimizer, scaler])

    def attempt(step, factor=1.0):
        start.begin(step)
        drawn = [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002
        scaler.scale(net(torch.randn(8, 4)).sum() * factor).backward()
        scaler.unscale_(optimizer)
        return drawn

    attempt(0)
    scaler.step(optimizer)
    scaler.update()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    drawn = attempt(1, float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert int(net[1].num_batches_tracked) == 2
    net[0].computed.fill_(1)
    start.put_back()
    assert scaler.get_scale() == 8.0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net[0].computed == 1
    assert attempt(1) == drawn
    start.put_back()
    attempt(1)  # gradients may be unscaled again


DRAWS = {
    "nothing": lambda: None,
    "one word": lambda: np.random.bytes(4),  # noqa: NPY002
    "a normal, of which the next is kept": np.random.standard_normal,
    "many": lambda: np.random.permutation(700).tolist(),  # noqa: NPY002
    "a seed": lambda: np.random.seed(1),  # noqa: NPY002
}


@pytest.mark.parametrize("generator", [np.random.MT19937, np.random.PCG64])
def test_numpy_repeats_its_random_numbers_whatever_was_drawn_before(generator):
    """Also detects if numpy keeps the state of its generator elsewhere than the code expects."""
    former, chosen = np.random.get_bit_generator(), random.Random(4)
    draws = [name for name in DRAWS if name != "a seed" or generator is np.random.MT19937]
    np.random.set_bit_generator(generator(7))
    try:
        start = StepStart(nn.Linear(1, 1), [])
        for step in range(300):
            start.begin(step)
            names = chosen.choices(draws, k=chosen.randrange(3))
            drawn = [DRAWS[name]() for name in names]
            if chosen.random() < 0.5:
                start.put_back()
                assert [DRAWS[name]() for name in names] == drawn, (step, names)
    finally:
        np.random.set_bit_generator(former)
