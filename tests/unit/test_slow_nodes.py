"""Which nodes are named slow, with simulated times of steps: many kinds of noise name no node, a node with half of its
CPU is found.
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_hpc.membership.slow import AFTER, FOR, NO_DIFFERENCE, NO_PACE, Pace, Slow, SlowWatch, usual
from elastic_hpc.training.progress import WINDOW

EVERY = 20
"""Steps from one look of the leader to the next."""


@dataclass
class Training:
    """Nodes that train together. ``taken(node, step)``: seconds of a step before its collectives."""

    nodes: int
    taken: Callable[[int, int], float]
    watch: SlowWatch = field(default_factory=lambda: SlowWatch(1.5))
    begun: list[tuple[int, Slow]] = field(default_factory=list)
    """The named nodes, each with the step at which it was named."""
    ended: list[tuple[int, int]] = field(default_factory=list)
    to_leave: set[int] = field(default_factory=set)
    step: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.steps = 0
        self.windows = [deque[float](maxlen=WINDOW) for _ in range(self.nodes)]
        self.watch.begin(range(self.nodes))

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step, self.steps = self.step + 1, self.steps + 1
            for node, window in enumerate(self.windows):
                window.append(self.taken(node, self.step))
            if self.steps % EVERY == 0:
                paces = {node: Pace(self.steps, usual(window)) for node, window in enumerate(self.windows)}
                seen = self.watch.look(paces)
                self.begun += [(self.step, slow) for slow in seen.begun]
                self.ended += [(self.step, node) for node in seen.ended]
                self.to_leave |= {slow.node for slow in seen.to_leave}

    @property
    def named(self) -> list[int]:
        return [slow.node for _, slow in self.begun]


def noisy(seed: int, typical: float = 0.03, sigma: float = 0.35) -> Callable[[int, int], float]:
    """Times with a heavy tail: one of a hundred steps takes up to a hundred times as long."""
    rng = random.Random(seed)

    def taken(_node: int, _step: int) -> float:
        time = typical * rng.lognormvariate(0, sigma)
        return time * min(100.0, 3 * rng.paretovariate(1.1)) if rng.random() < 0.01 else time

    return taken


@pytest.mark.parametrize(("nodes", "seed"), [(2, 0), (2, 1), (3, 2), (8, 3)])
def test_no_alarm_in_10000_steps_on_nodes_that_are_alike(nodes: int, seed: int) -> None:
    jitter, rng = noisy(seed), random.Random(-seed)
    evaluations = {step: rng.uniform(1, 60) for step in range(500, 10_000, 500)}

    def taken(node: int, step: int) -> float:
        time = jitter(node, step) + evaluations.get(step, 0.0)
        return time + 2.0 * (node == 0 and step % 20 == 0)  # a checkpoint of rank 0

    job = Training(nodes, taken)
    job.train(10_000)
    assert job.begun == []


def test_no_alarm_for_the_noise_of_steps_of_a_millisecond() -> None:
    job = Training(4, noisy(1, typical=0.001, sigma=1.0))
    job.train(10_000)
    assert job.begun == []


def test_no_alarm_on_hundreds_of_nodes() -> None:
    job = Training(256, noisy(2))
    job.train(400)
    assert job.begun == []


def half_of_its_cpu(node: int, since: int, work: float = 0.03) -> Callable[[int, int], float]:
    """``node`` may use 50 ms of CPU in each 100 ms, as with cpu.cfs_quota_us; otherwise it is stopped. A collective
    takes 1 ms without CPU.
    """
    left, jitter, clock = {"cpu": 0.05}, noisy(7, work, 0.1), {"now": 0.0}

    def taken(which: int, step: int) -> float:
        needed = jitter(which, step)
        if which != node or step < since:
            return needed
        began = clock["now"]
        while needed > 0:
            run = min(needed, left["cpu"])
            needed, left["cpu"], clock["now"] = needed - run, left["cpu"] - run, clock["now"] + run
            if needed > 0 or left["cpu"] <= 0:
                clock["now"], left["cpu"] = (clock["now"] // 0.1 + 1) * 0.1, 0.05
        time = clock["now"] - began
        before = clock["now"] // 0.1
        clock["now"] += 0.001
        left["cpu"] = 0.05 if clock["now"] // 0.1 > before else left["cpu"]
        return time

    return taken


@pytest.mark.parametrize("nodes", [2, 4, 16])
@pytest.mark.parametrize("work", [0.01, 0.03, 0.2])
def test_a_node_with_half_of_its_cpu_is_found_within_200_steps(nodes: int, work: float) -> None:
    job = Training(nodes, half_of_its_cpu(1, since=1000, work=work))
    job.train(1200)
    assert job.named == [1]
    step, slow = job.begun[0]
    assert step <= 1200
    assert 1.5 <= slow.times < 3
    job.train(200)
    assert job.to_leave == {1} or nodes == 2


def test_a_slow_node_is_also_found_soon_after_its_start() -> None:
    job = Training(4, half_of_its_cpu(2, since=0))
    job.train(250)
    assert job.named == [2]


def test_a_median_would_not_have_found_it() -> None:
    taken = half_of_its_cpu(1, since=0, work=0.01)
    times = [taken(1, step) for step in range(WINDOW)]
    assert statistics.median(times) < 0.012
    assert usual(times) > 0.015


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_no_alarm_for_the_first_steps_after_a_start_or_growth(steps: int) -> None:
    began = {"at": 0}

    def taken(node: int, step: int) -> float:
        return 0.03 * (5 if node == 3 and step - began["at"] <= steps else 1)

    job = Training(4, taken)
    job.train(400)
    began["at"] = job.step
    job.restart()
    job.train(400)
    assert job.begun == []


def test_a_slow_node_is_named_once_and_its_end_is_reported_once() -> None:
    slow = {"factor": 2.0}
    jitter = noisy(3)
    job = Training(4, lambda node, step: jitter(node, step) * (slow["factor"] if node == 2 else 1))
    job.train(1000)
    job.restart()  # a new round of the same nodes
    job.train(1000)
    assert (job.named, job.ended) == ([2], [])
    slow["factor"] = 1.0
    job.train(1000)
    assert job.named == [2]
    assert [node for _, node in job.ended] == [2]


def test_a_node_at_the_threshold_is_not_named_repeatedly() -> None:
    jitter = noisy(4)
    job = Training(4, lambda node, step: jitter(node, step) * (1.5 if node == 2 else 1))
    job.train(10_000)
    assert len(job.begun) <= 1


def test_a_node_that_was_slow_for_a_minute_is_no_longer_named_afterwards() -> None:
    jitter = noisy(5)
    job = Training(4, lambda node, step: jitter(node, step) * (3 if node == 1 and 1000 <= step < 1400 else 1))
    job.train(3000)
    assert job.named == [1]
    assert [node for _, node in job.ended] == [1]
    assert job.begun[0][0] <= 1200
    assert 1400 < job.ended[0][0] <= 1600


@pytest.mark.parametrize(("nodes", "slow"), [(3, 1), (4, 1), (5, 2), (9, 4)])
def test_only_a_minority_of_nodes_can_be_named(nodes: int, slow: int) -> None:
    job = Training(nodes, lambda node, _step: 0.1 * (2 if node < slow else 1))
    job.train(400)
    assert job.named == list(range(slow))
    job = Training(nodes, lambda node, _step: 0.1 * (2 if node <= slow else 1))
    job.train(400)
    assert job.named == []


def test_the_slower_of_two_nodes_is_named_and_left_only_if_the_difference_is_clear() -> None:
    for factor, sure in ((1.7, False), (2.1, True)):
        job = Training(2, lambda node, _step, factor=factor: 0.1 * (factor if node else 1))  # type: ignore[misc]
        job.train(400)
        (slow,) = (slow for _, slow in job.begun)
        assert slow.node == 1
        assert job.to_leave == ({1} if sure else set())
    assert slow.reason == "slow node: 210 ms in a step before its collectives, 2.1 times the 100 ms of the others"


def test_nodes_are_compared_only_when_all_of_them_are_measured() -> None:
    watch = SlowWatch(1.5)
    slow = Pace(AFTER, 0.2)
    assert watch.look({0: NO_PACE, 1: slow, 2: slow}) == NO_DIFFERENCE
    assert watch.look({1: slow}) == NO_DIFFERENCE
    assert watch.look({}) == NO_DIFFERENCE


@given(st.lists(st.integers(0, 9), min_size=2, max_size=9))
def test_a_node_is_compared_with_the_median_of_the_others(seconds: list[int]) -> None:
    paces = {node: Pace(AFTER, float(each)) for node, each in enumerate(seconds)}
    later: Mapping[int, Pace] = {node: Pace(AFTER + FOR, pace.seconds) for node, pace in paces.items()}
    watch = SlowWatch(1.5)
    assert not any(watch.look(paces))
    begun = watch.look(later).begun
    for slow in begun:
        assert slow.others == statistics.median(seconds[: slow.node] + seconds[slow.node + 1 :])
    assert len(begun) <= max(1, (len(seconds) - 1) // 2)
