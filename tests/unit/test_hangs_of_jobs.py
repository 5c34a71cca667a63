"""Jobs whose workers hang, in simulated time: the leader notices the hang, a new round continues, another leader keeps
what was learned.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from simulated import POLICY, Job, SimNode

from elastic_hpc.membership import hangs
from elastic_hpc.membership.hangs import Signs, timeout

POLICY_OF_HANGS = replace(POLICY, grow=False, learns_hangs=True, max_restarts=10)
LEAST = 30.0


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the minimum timeouts, because simulated time takes real time too."""
    monkeypatch.setattr(hangs, "LEAST", LEAST)
    monkeypatch.setattr(hangs, "LEAST_UNSURE", 6 * LEAST)


@dataclass
class Steps:
    """The workers report a step every ``every`` seconds, until they hang."""

    job: Job
    every: float
    hangs_since: float | None = None
    began: dict[tuple[int, int], float] = field(default_factory=dict)

    def __call__(self, node: SimNode) -> Signs:
        age = self.job.now - self.began.setdefault((node.index, node.workers.round), self.job.now)
        until = age if self.hangs_since is None else max(0.0, age - (self.job.now - self.hangs_since))
        reports = int(until // self.every)
        silent = age - reports * self.every
        return Signs(silent, silent, silent, reports, (reports - 1) * self.every if reports else -1.0, self.every)

    @property
    def failures(self) -> list[str]:
        return [fields["message"] for _, _, name, fields in self.job.events if name == "failure"]

    async def alarm(self, within: float) -> bool:
        before = len(self.failures)
        return await self.job.until(lambda: len(self.failures) > before, within)


@pytest.mark.parametrize("seed", range(3))
def test_a_hang_is_noticed_and_a_new_round_continues(seed: int) -> None:
    job = Job(seed, 3, POLICY_OF_HANGS, loss=0.0)
    job.signs = steps = Steps(job, every=6)

    async def story() -> None:
        assert await job.until(job.training, 60)
        assert not await steps.alarm(80)
        learned = timeout(job.nodes[1].promises.rhythm).seconds
        assert 45 <= learned <= 65, "ten times the longest silence, as far as a look each second tells"
        steps.hangs_since, first = job.now, job.trained
        assert await steps.alarm(100)
        assert learned - 6 <= job.now - steps.hangs_since <= learned + 6
        steps.hangs_since = None
        assert await job.until(lambda: job.training() and job.trained > first, 60)
        assert not await steps.alarm(100)
        (message,) = steps.failures
        assert message.startswith("no step after step ")
        said = [fields["seconds"] for _, _, name, fields in job.events if name == "hang_timeout"]
        assert said[:2] == [6 * LEAST, pytest.approx(learned, rel=0.2)], "of the first steps, then of all others"
        assert not job.over()

    job.run(story)


@pytest.mark.parametrize("seed", range(3))
def test_another_leader_knows_how_long_the_workers_may_be_silent(seed: int) -> None:
    job = Job(seed, 3, POLICY_OF_HANGS, loss=0.0)
    job.signs = steps = Steps(job, every=12)

    async def story() -> None:
        assert await job.until(job.training, 60)
        assert not await steps.alarm(140)
        first, steps.every = job.trained, 3  # the next leader itself sees only short steps
        job.nodes[0].kill()
        assert await job.until(lambda: job.training() and job.trained > first, 60)
        assert not await steps.alarm(40)
        steps.hangs_since = job.now
        assert not await steps.alarm(90)
        assert await steps.alarm(50)
        assert job.rhythm.longest == pytest.approx(12, abs=1.5), "the next run of the job knows it too"

    job.run(story)


def test_no_alarm_while_the_file_system_of_the_record_does_not_answer() -> None:
    job = Job(1, 3, POLICY_OF_HANGS, loss=0.0)
    job.signs = steps = Steps(job, every=2)

    async def story() -> None:
        assert await job.until(job.training, 60)
        assert not await steps.alarm(30)
        steps.hangs_since, job.stalls = job.now, True
        assert not await steps.alarm(200)
        job.stalls = False
        assert not await steps.alarm(15)
        steps.hangs_since = None
        assert not await steps.alarm(100)

    job.run(story)


def test_without_auto_the_leader_does_not_act_on_silent_workers() -> None:
    job = Job(1, 3, replace(POLICY_OF_HANGS, learns_hangs=False), loss=0.0)
    job.signs = steps = Steps(job, every=2)

    async def story() -> None:
        assert await job.until(job.training, 60)
        assert not await steps.alarm(30)
        steps.hangs_since = job.now
        assert not await steps.alarm(300)

    job.run(story)
