"""The detection of hanging workers, in simulated time: what a leader learns, and what raises no alarm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_hpc.membership.hangs import (
    BUSY,
    FAMILIAR,
    LEAST,
    LEAST_UNSURE,
    NO_RHYTHM,
    TIMES,
    Hang,
    HangWatch,
    Rhythm,
    Signs,
    timeout,
)

HOUR = 3600.0


@dataclass
class Node:
    """The counters of one node's agent."""

    silent: float = 0.0
    idle: float = 0.0
    unreported: float = 0.0
    reports: int = 0
    first: float = -1.0
    age: float = 0.0
    start: float = 0.0

    def live(self, *, busy: bool, blocked: bool) -> None:
        self.age += 1
        if not blocked:
            self.silent, self.unreported, self.idle = self.silent + 1, self.unreported + 1, self.idle + (not busy)

    def sign(self, *, report: bool) -> None:
        self.first = self.age if self.first < 0 else self.first
        self.silent = self.idle = 0.0
        if report:
            self.start = self.start or self.age
            self.unreported, self.reports = 0.0, self.reports + 1

    @property
    def signs(self) -> Signs:
        span = self.age - self.silent - self.first if self.first >= 0 else -1.0
        return Signs(self.silent, self.idle, self.unreported, self.reports, span, self.start)


@dataclass
class Training:
    """A job of two nodes under one leader after another. The leader looks once a second."""

    watch: HangWatch = field(default_factory=HangWatch)
    nodes: list[Node] = field(default_factory=lambda: [Node(), Node()])
    step: int = -1
    live: bool = False
    whole: bool = True
    hang: Hang | None = None

    def pass_time(self, seconds: float, *, busy: bool = False, blocked: bool = False, held: bool = False) -> float:
        """Let time pass without any sign of life. Returns the seconds until an alarm, or infinity."""
        for passed in range(int(seconds)):
            for node in self.nodes:
                node.live(busy=busy, blocked=blocked)
            if hang := self._look(held=held):
                self.hang = hang
                return passed + 1
        return math.inf

    def report(self) -> None:
        self.step += 1
        for node in self.nodes:
            node.sign(report=True)
        assert not self._look()

    def write(self, nodes: int = 2) -> None:
        for node in self.nodes[:nodes]:
            node.sign(report=False)
        assert not self._look()

    def train(self, steps: int, seconds: float = 1, *, busy: bool = True) -> None:
        for _ in range(steps):
            assert self.pass_time(seconds, busy=busy) == math.inf
            self.report()

    def restart(self, step: int = -1) -> None:
        """A new round from the checkpoint of ``step``."""
        self.nodes, self.step, self.hang = [Node(), Node()], step, None
        self.watch.begin()

    def _look(self, *, held: bool = False) -> Hang | None:
        step = self.step if any(node.reports for node in self.nodes) else -1
        signs = {number: node.signs for number, node in enumerate(self.nodes)}
        return self.watch.look(signs, step, whole=self.whole, live=self.live, held=held)


def test_a_hang_is_noticed_after_five_minutes_when_steps_are_short() -> None:
    job = Training()
    job.train(50)
    assert job.pass_time(HOUR) == LEAST + 1
    assert job.hang
    assert job.hang.message == (
        "no step after step 49, and no output, for 301 s; "
        "the longest silence before was 1 s (--hang-timeout auto: 300 s)"
    )


def test_a_hang_is_noticed_after_five_minutes_when_there_was_another_step_at_each_look() -> None:
    job = Training()
    for _ in range(FAMILIAR + 1):
        for node in job.nodes:
            node.live(busy=True, blocked=False)
        job.report()
    assert job.pass_time(HOUR) == LEAST + 1


def test_the_timeout_is_ten_times_the_longest_silence() -> None:
    job = Training()
    job.train(5)
    job.train(1, 120)
    job.train(50)
    assert job.pass_time(2 * HOUR) == pytest.approx(1200, rel=0.02)


def test_a_job_without_any_sign_of_life_yet_raises_no_alarm() -> None:
    job = Training()
    assert job.pass_time(10 * HOUR) == math.inf
    assert timeout(job.watch.rhythm).seconds == math.inf


def test_a_script_that_writes_once_and_trains_silently_raises_no_alarm() -> None:
    job = Training()
    for _ in range(100):
        job.write()
        job.pass_time(2)
    assert job.pass_time(10 * HOUR) == math.inf
    job.write()
    assert job.pass_time(20 * HOUR) == math.inf


def test_a_script_that_writes_regularly_is_watched_after_half_an_hour() -> None:
    job = Training()
    for _ in range(200):
        job.write(1)
        assert job.pass_time(10, busy=True) == math.inf
    assert job.pass_time(HOUR) == pytest.approx(LEAST_UNSURE, abs=11)
    job.restart()
    assert job.pass_time(2 * HOUR) == pytest.approx(2 * LEAST_UNSURE, abs=22), "doubled after the alarm"


def test_a_node_that_has_written_a_warning_and_is_then_silent_is_no_hang_while_another_trains() -> None:
    job = Training()
    job.nodes[1].sign(report=False)
    for _ in range(2000):
        job.nodes[0].sign(report=True)
        job.step += 1
        assert job.pass_time(2) == math.inf


def test_the_first_step_may_take_longer() -> None:
    job = Training(live=True)
    assert job.pass_time(HOUR) == LEAST_UNSURE + 1
    job = Training()
    job.train(10)
    job.restart()
    assert job.pass_time(LEAST_UNSURE) == math.inf, "a round after a fault loads a checkpoint"


def test_the_second_step_may_take_as_long_as_the_first() -> None:
    job = Training()
    for _ in range(600):  # the script has written until the first report
        job.write()
        job.pass_time(1)
    job.report()
    job.train(3, HOUR)


def test_ranks_that_report_the_first_step_seconds_apart_do_not_show_how_long_a_step_takes() -> None:
    job = Training()
    for node in job.nodes:
        node.sign(report=True)
        job.step = 1
        assert job.pass_time(5) == math.inf
    assert job.pass_time(600) == math.inf
    job.train(20, 600, busy=False)


def test_the_first_steps_of_a_round_may_take_longer_than_those_before() -> None:
    job = Training()
    job.train(100)
    job.restart(100)
    job.report()  # a report of the checkpoint's step, before the first step, which compiles
    job.train(3, 1000, busy=False)


def test_a_world_of_fewer_nodes_may_need_more_time_for_a_step() -> None:
    job = Training()
    job.train(100, 20, busy=False)
    job.restart(100)
    job.train(100, 400, busy=False)


def test_two_quick_reports_before_a_long_epoch_are_no_rhythm() -> None:
    job = Training()
    job.train(3, 2)
    job.train(5, 2 * HOUR)


def test_a_script_that_reports_every_hundredth_step_gets_the_time_of_a_thousand_steps() -> None:
    job = Training()
    job.train(20, 100)
    assert job.pass_time(HOUR) == pytest.approx(1000, abs=10)


def test_the_leader_learns_nothing_from_a_file_system_that_does_not_answer_for_long() -> None:
    job = Training()
    job.train(50)
    assert job.pass_time(6 * HOUR, held=True) == math.inf
    job.train(50)
    assert job.pass_time(HOUR) == LEAST + 1


PAUSES = st.sampled_from([1, 2, 5, 30, 350, 2000])


@given(
    st.lists(
        st.tuples(st.integers(1, 15), PAUSES, st.sampled_from([0, 1, 8]), st.booleans(), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=30, deadline=None)
def test_no_alarm_comes_before_the_timeout_and_an_alarm_comes_soon_after_it(
    rounds: list[tuple[int, int, int, bool, bool]],
) -> None:
    """Rounds of ``steps`` of ``seconds``, which the nodes report ``apart`` seconds apart, with a restart or requeue
    between.
    """
    job, longest, start = Training(), 0.0, 0.0
    for steps, seconds, apart, busy, requeue in rounds:
        for step in range(steps):
            promised = max(LEAST if step > FAMILIAR else LEAST_UNSURE, TIMES * longest)
            promised = max(promised, TIMES * start) if step <= FAMILIAR else promised
            pause = min(int(seconds), int(promised) * (BUSY if busy else 1) - apart - 2)
            assert job.pass_time(pause, busy=busy) == math.inf, (step, pause, promised)
            if not step:
                start = max(start, pause)
            job.step += 1
            job.nodes[0].sign(report=True)
            assert job.pass_time(apart) == math.inf
            job.nodes[1].sign(report=True)
            assert not job._look()
            longest = max(longest, pause / 1.1 - 1 if step else 0.0)
        if job.watch.rhythm.reports:
            limit = timeout(job.watch.rhythm, sure=steps > FAMILIAR).seconds
            assert job.pass_time(3 * limit) <= limit + 2
        job.restart(job.step)
        if requeue:
            job.watch = HangWatch(Rhythm.of(list(job.watch.rhythm)))


def test_an_evaluation_that_computes_may_take_half_an_hour_unseen() -> None:
    job = Training()
    job.train(500)
    assert job.pass_time(BUSY * LEAST - 2, busy=True) == math.inf
    job.train(500)
    assert timeout(job.watch.rhythm).seconds == pytest.approx(TIMES * BUSY * LEAST, rel=0.01)


def test_an_evaluation_on_one_node_while_the_others_wait_is_no_hang() -> None:
    job = Training()
    job.train(500)
    for _ in range(int(BUSY * LEAST)):
        job.nodes[0].live(busy=True, blocked=False)
        job.nodes[1].live(busy=False, blocked=False)
        assert not job._look()


def test_nodes_that_save_one_after_another_raise_no_alarm() -> None:
    job = Training(nodes=[Node() for _ in range(16)])
    job.train(50)
    for saving in job.nodes:
        for _ in range(60):
            for node in job.nodes:
                node.live(busy=node is saving, blocked=False)
            assert not job._look()
    for node in job.nodes:
        node.sign(report=True)


@pytest.mark.parametrize("every", [1, 3, 12])
def test_a_hang_is_noticed_however_rare_and_irregular_the_reports_are(every: int) -> None:
    job = Training(nodes=[Node() for _ in range(16)])
    job.train(50)
    heard = {number: node.signs for number, node in enumerate(job.nodes)}
    for passed in count():
        for number, node in enumerate(job.nodes):
            node.live(busy=False, blocked=False)
            if (passed + number) % every == 0:
                heard[number] = node.signs
        if job.watch.look(heard, job.step):
            break
    assert LEAST <= passed <= 1.05 * LEAST + 5 * every


def test_a_slow_checkpoint_raises_no_alarm() -> None:
    job = Training()
    job.train(500)
    assert job.pass_time(6 * HOUR, blocked=True) == math.inf, "the workers wait for a disk"
    assert job.pass_time(1000, busy=True) == math.inf, "and write"
    job.train(10)


def test_a_file_system_that_does_not_answer_raises_no_alarm_and_the_stalled_time_does_not_count() -> None:
    job = Training()
    job.train(500)
    assert job.pass_time(6 * HOUR, held=True) == math.inf
    assert job.pass_time(LEAST) == math.inf
    assert job.pass_time(10) == 1
    job.restart(500)
    job.train(10)


def test_after_the_end_of_some_workers_the_others_have_more_time() -> None:
    job = Training()
    job.train(50)
    job.whole = False
    assert job.pass_time(LEAST_UNSURE) == math.inf


def test_a_false_alarm_doubles_the_timeout_and_is_not_repeated() -> None:
    job = Training()
    job.train(100)
    assert job.pass_time(HOUR) == LEAST + 1
    job.restart(90)
    job.train(9)
    assert job.pass_time(500) == math.inf, "the same place takes as long again, and longer"
    job.report()
    job.train(100)
    assert timeout(job.watch.rhythm).seconds == pytest.approx(5000, rel=0.01)


def test_the_third_alarm_at_the_same_place_comes_after_four_times_as_long() -> None:
    job = Training()
    job.train(100)
    waited = []
    for _ in range(3):
        waited.append(job.pass_time(3 * HOUR))
        job.restart(80)
        job.train(19)
    assert waited == pytest.approx([300, 600, 1200], rel=0.02)


def test_after_a_real_hang_the_timeout_is_unchanged() -> None:
    job = Training()
    job.train(100)
    assert job.pass_time(HOUR) == LEAST + 1
    job.restart(90)
    job.train(20)
    assert job.pass_time(HOUR) == LEAST + 1


def test_another_leader_and_another_run_know_the_learned_timeout() -> None:
    job = Training()
    job.train(10)
    job.train(1, 200)
    for heir in (HangWatch(job.watch.rhythm), HangWatch(Rhythm.of(list(job.watch.rhythm)))):
        assert timeout(heir.rhythm).seconds == 2000
    stranger = HangWatch()
    stranger.adopt(job.watch.rhythm)
    stranger.adopt(NO_RHYTHM)
    assert stranger.rhythm == job.watch.rhythm


@pytest.mark.parametrize("damaged", [None, 3, [], ["x"] * 7, [1, math.nan, 0, 0, 1, 0, 0], {"number": 1}])
def test_damaged_state_counts_as_nothing_learned(damaged: object) -> None:
    assert Rhythm.of(damaged) == NO_RHYTHM


def test_the_learned_state_changes_rarely() -> None:
    job = Training()
    for seconds in range(1, 60):
        job.train(20, seconds)
    assert job.watch.rhythm.number < 120


def random_job(seed: int) -> Iterator[Callable[[Training], float]]:
    import random

    dice = random.Random(seed)
    step = dice.choice([0.5, 2, 20, 200])
    evaluation = dice.uniform(1, 10) * step
    for number in count():
        pause = evaluation if number % 50 == 49 else step * dice.uniform(0.5, 2)
        busy = dice.random() < 0.5
        yield lambda job, pause=pause, busy=busy: job.pass_time(max(1, pause), busy=busy)  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(8))
def test_ten_thousand_steps_of_any_length_raise_no_alarm(seed: int) -> None:
    job, pauses = Training(), random_job(seed)
    for _ in range(1000):
        assert next(pauses)(job) == math.inf
        job.report()
