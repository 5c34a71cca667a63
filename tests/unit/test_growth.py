"""Jobs that grow: whole jobs in simulated time, where Slurm gives and takes nodes, and single decisions."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import POLICY, Job, SimNode
from simulated_slurm import SimJoiner

from elastic_hpc.membership import growth
from elastic_hpc.membership.growth import Needs
from elastic_hpc.membership.leaderless import JOINER_PATIENCE
from elastic_hpc.membership.nodes import FIRST_JOINER, joiner, votes

SEEDS = st.integers(0, 2**32)
FREE = replace(POLICY, max_nodes=5, free_growth=True)


def rounds(job: Job) -> list[dict[str, Any]]:
    return [fields for _, _, name, fields in job.events if name == "round"]


def events(job: Job, name: str) -> list[dict[str, Any]]:
    return [fields for _, _, event, fields in job.events if event == name]


async def inject(job: Job, seconds: float) -> None:
    """Random faults for ``seconds``: agents also die and are restarted; Slurm gives nodes, takes nodes, refuses
    joiners.
    """
    dice = job.random
    end = job.now + seconds
    while job.now < end and not job.over():
        node: SimNode = dice.choice(job.nodes)
        match dice.randrange(10):
            case 0:
                node.end_workers(failed=True)
            case 1:
                job.cut(dice.sample(sorted(job.at), dice.randrange(1, len(job.at))))
            case 2:
                job.heal()
            case 3:
                node.freeze(dice.uniform(0, 12))
            case 4 | 5 if not votes(node.index) or sum(votes(other.index) for other in job.left) > 1:
                node.kill()
            case 6 if job.joiners:
                dice.choice(job.joiners).power_off()
            case 7 if job.joiners:
                dice.choice(job.joiners).warn()
            case 8:
                job.queue.refuses = not job.queue.refuses
            case _:
                job.files = not job.files
                job.queue.set_free(dice.randrange(4))
        await job.until(job.over, dice.choice((0.0, 0.01, 0.3, dice.uniform(0, 12))))
    job.heal()
    job.loss, job.files, job.queue.refuses = 0.0, True, False


def no_node_is_held(job: Job) -> bool:
    running = [waiting for waiting in job.queue.jobs.values() if waiting.state != "PENDING"]
    return not running and not any(not node.left and not node.dead for node in job.joiners)


@given(seed=SEEDS, nodes=st.integers(2, 5), listens=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_job_that_grows_trains_again_after_any_faults_and_never_in_two_worlds(
    *, seed: int, nodes: int, listens: bool
) -> None:
    job = Job(seed, nodes, FREE, scripts_listen=listens)
    job.queue.restarts = True

    async def story() -> None:
        job.queue.set_free(job.random.randrange(4))
        if job.random.random() < 0.7:
            assert await job.until(job.training, 60)
        await inject(job, 90)
        assert await job.until(lambda: job.training() or job.over(), 300), job.events[-8:]
        for node in job.left:
            if job.requeued:  # by an agent that has found no leader for too long: Slurm ends all joiners
                node.kill() if votes(node.index) else None
            elif not job.over():
                node.membership.terminated()
        if not job.over():
            assert await job.until(job.over, 60), job.events[-8:]
        assert await job.until(lambda: no_node_is_held(job), 120), (job.queue.jobs, job.events[-8:])

    job.run(story)


@given(seed=SEEDS, listens=st.booleans())
@settings(max_examples=20, deadline=None)
def test_joiners_that_come_together_join_in_one_round(*, seed: int, listens: bool) -> None:
    job = Job(seed, 2, replace(POLICY, max_nodes=12), loss=0.0, scripts_listen=listens)

    async def story() -> None:
        assert await job.until(job.training, 60)
        job.queue.set_free(10)
        assert await job.until(lambda: len(rounds(job)[-1]["nodes"]) == 12 and job.training(), 90), job.events[-5:]
        assert len(rounds(job)) == 2
        assert rounds(job)[-1]["restarts"] == 1
        assert [votes(node.index) for node in job.nodes] == [True] * 2 + [False] * 10

    job.run(story)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_lost_node_is_replaced_and_no_joiner_is_requested_twice(seed: int) -> None:
    job = Job(seed, 3, replace(POLICY, max_nodes=3), loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        job.nodes[1].power_off()
        assert await job.until(lambda: len(job.queue.jobs) == 1, 15)
        job.queue.set_free(1)
        assert await job.until(lambda: [len(r["nodes"]) for r in rounds(job)] == [3, 2, 3], 60), job.events[-5:]
        assert len(events(job, "joiners")) == 1

    job.run(story)


@given(seed=SEEDS, how=st.sampled_from(["power_off", "kill"]), running=st.booleans())
@settings(max_examples=25, deadline=None)
def test_after_a_takeover_no_waiting_or_running_joiner_is_forgotten(*, seed: int, how: str, running: bool) -> None:
    job = Job(seed, 3, replace(POLICY, max_nodes=5), loss=0.0)

    async def story() -> None:
        job.queue.set_free(int(running))
        assert await job.until(lambda: job.training() and len(job.queue.jobs) == 2, 90)
        assert await job.until(lambda: len(rounds(job)[-1]["nodes"]) == 3 + running and job.training(), 60)
        known = set(job.queue.jobs)
        getattr(job.nodes[0], how)()
        assert await job.until(lambda: len(rounds(job)[-1]["nodes"]) == 2 + running and job.training(), 60)
        assert await job.until(lambda: len(job.queue.jobs) == 3, 60)  # one more joiner, for the lost node
        assert known < set(job.queue.jobs)
        assert all(rounds(job)[-1]["leader"] != node.host.name for node in job.joiners)
        job.queue.set_free(3)
        assert await job.until(lambda: len(rounds(job)[-1]["nodes"]) == 5 and job.training(), 60)

    job.run(story)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_below_min_the_job_waits_for_a_replacement_but_not_forever(seed: int) -> None:
    job = Job(seed, 2, replace(POLICY, max_nodes=2), loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        job.nodes[1].power_off()
        await job.until(job.over, POLICY.wait_for_nodes - 20)
        assert not job.over()
        if job.random.random() < 0.5:
            job.queue.set_free(1)
            assert await job.until(job.training, 40)
            assert not job.over()
        else:
            assert await job.until(job.over, 40)
            assert job.verdict
            assert job.verdict["outcome"] == "requeue"
            assert await job.until(lambda: no_node_is_held(job), 30)

    job.run(story)


@given(seed=SEEDS, spare=st.booleans())
@settings(max_examples=20, deadline=None)
def test_below_min_the_job_does_not_hold_its_nodes_for_a_joiner_that_a_limit_keeps_in_the_queue(
    seed: int, *, spare: bool
) -> None:
    job = Job(seed, 2, replace(POLICY, max_nodes=2 + spare), loss=0.0)
    job.queue.holds = "AssocMaxJobsLimit"
    job.queue.set_free(3)

    async def story() -> None:
        assert await job.until(job.training, 60)
        if spare:
            assert await job.until(lambda: events(job, "growth_problem"), 60)
        job.nodes[1].power_off()
        assert await job.until(job.over, 30), job.events[-5:]
        assert job.verdict
        assert job.verdict["outcome"] == "requeue"
        reasons = [problem["reason"] for problem in events(job, "growth_problem")]
        assert any("AssocMaxJobsLimit" in reason for reason in reasons)
        assert await job.until(lambda: no_node_is_held(job), 30)

    job.run(story)


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_a_joiner_whose_limit_is_lifted_comes(seed: int) -> None:
    job = Job(seed, 2, replace(POLICY, max_nodes=3), loss=0.0)
    job.queue.holds = "QOSMaxJobsPerUserLimit"
    job.queue.set_free(1)

    async def story() -> None:
        assert await job.until(lambda: job.training() and events(job, "growth_problem"), 60)
        job.queue.holds = ""
        job.queue.set_free(1)
        assert await job.until(lambda: len(rounds(job)[-1]["nodes"]) == 3 and job.training(), 90)
        assert len(events(job, "joiners")) == 1

    job.run(story)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_if_slurm_refuses_joiners_a_job_below_min_soon_gives_its_nodes_back(seed: int) -> None:
    job = Job(seed, 2, replace(POLICY, max_nodes=2), loss=0.0)
    job.queue.refuses = True

    async def story() -> None:
        assert await job.until(job.training, 60)
        job.nodes[1].power_off()
        assert await job.until(job.over, 25), job.events[-5:]
        problems = events(job, "growth_problem")
        assert problems
        assert all(problem["reason"] for problem in problems)

    job.run(story)


@given(seed=SEEDS, finished=st.booleans())
@settings(max_examples=20, deadline=None)
def test_no_joiner_outlives_the_job(*, seed: int, finished: bool) -> None:
    """Also a joiner that starts only now, or whose job was submitted at this moment."""
    job = Job(seed, 2, replace(POLICY, max_nodes=6), loss=0.0)

    async def story() -> None:
        job.queue.set_free(job.random.randrange(4))
        assert await job.until(job.training, 60)
        await job.until(lambda: False, job.random.uniform(0, 15))
        while not job.over():
            for node in job.nodes:
                node.end_workers(failed=False) if finished else None
            if not finished:
                for node in job.nodes[:2]:
                    node.power_off()
                break
            await job.until(job.over, 0.5)
        if not finished:
            # no agent is left to write a verdict: Slurm requeues the job
            job.verdict = job.verdict or {"outcome": "requeue", "reason": "a node is lost"}
        job.queue.set_free(4)  # waiting joiners start now
        assert await job.until(lambda: no_node_is_held(job), JOINER_PATIENCE + 40), job.queue.jobs

    job.run(story)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_without_a_verdict_joiners_leave_when_their_leaders_are_gone(seed: int) -> None:
    job = Job(seed, 2, replace(POLICY, max_nodes=4), loss=0.0)

    async def story() -> None:
        job.queue.set_free(2)
        assert await job.until(lambda: len(rounds(job) and rounds(job)[-1]["nodes"]) == 4 and job.training(), 90)
        for node in job.nodes[:2]:
            node.power_off()
        assert await job.until(lambda: not any(node.workers.alive for node in job.joiners), 15)
        assert await job.until(lambda: no_node_is_held(job), JOINER_PATIENCE + 30)
        assert job.verdict is None

    job.run(story)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_joiner_that_must_leave_does_so_when_the_workers_have_saved(seed: int) -> None:
    job = Job(seed, 2, replace(POLICY, max_nodes=3), loss=0.0, scripts_listen=True)

    async def story() -> None:
        job.queue.set_free(1)
        assert await job.until(lambda: len(rounds(job) and rounds(job)[-1]["nodes"]) == 3 and job.training(), 90)
        await job.until(lambda: False, 2)
        job.queue.free = -1
        (going,) = job.joiners
        going.warn()
        assert await job.until(lambda: len(rounds(job)[-1]["nodes"]) == 2 and job.training(), 30), job.events[-5:]
        assert events(job, "lost") == []
        assert events(job, "failure") == []
        assert going.left
        assert events(job, "restart")[-1]["reason"] == "1 node(s) must leave"

    job.run(story)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_dead_agent_is_restarted_and_its_node_rejoins(seed: int) -> None:
    job = Job(seed, 3, replace(POLICY, max_nodes=3, grow=False), loss=0.0)
    job.queue.restarts = True

    async def story() -> None:
        for index in (2, 0, 1):  # the leader too
            assert await job.until(job.training, 60), job.events[-5:]
            before = job.trained
            job.at[index].kill()
            assert await job.until(
                lambda before=before: len(job.left) == 3 and job.training() and job.trained > before, 40
            )
        assert job.queue.jobs == {}

    job.run(story)


@given(seed=SEEDS, takes=st.floats(50, 290))
@settings(max_examples=10, deadline=None)
def test_an_agent_that_starts_slowly_gets_no_second_agent_whoever_leads_meanwhile(*, seed: int, takes: float) -> None:
    """``Queue.restart`` reports a second agent on one node as a bug."""
    job = Job(seed, 4, replace(POLICY, grow=False), loss=0.0)
    job.queue.restarts = True
    job.queue.start_takes = lambda: takes

    async def story() -> None:
        assert await job.until(job.training, 60)
        job.at[3].kill()
        assert await job.until(lambda: len(rounds(job)) == 2 and job.training(), 30)
        assert await job.until(lambda: events(job, "agent_restart"), 30), job.events[-5:]
        await job.until(job.over, job.random.uniform(0, takes - 40))
        job.at[0].kill()  # the leader, which has started that agent
        assert await job.until(lambda: len(job.left) == 4 and job.training(), 400), job.events[-5:]
        assert [event[3]["node"] for event in job.events if event[2] == "agent_restart"] == ["n3", "n0"]

    job.run(story)


@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_a_start_that_hangs_is_ended_before_the_next_one(seed: int) -> None:
    job = Job(seed, 3, replace(POLICY, max_nodes=3, grow=False), loss=0.0)
    job.queue.restarts = True
    starts = iter([float("inf"), 20.0])
    job.queue.start_takes = lambda: next(starts)

    async def story() -> None:
        assert await job.until(job.training, 60)
        job.at[2].kill()
        assert await job.until(lambda: len(job.left) == 3 and job.training(), 600), job.events[-5:]
        problems = [event[3]["reason"] for event in job.events if event[2] == "growth_problem"]
        assert problems == ["the new agent on n2 has not started in 300 s"]

    job.run(story)


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_a_rebooted_node_trains_again_and_does_not_vote(seed: int) -> None:
    """The node has lost its promises."""
    job = Job(seed, 4, replace(POLICY, max_nodes=4, grow=False), loss=0.0)
    job.queue.restarts = True

    async def story() -> None:
        assert await job.until(job.training, 60), job.events[-5:]
        before = job.trained
        job.at[1].kill()
        job.memories[job.at[1]._place] = b""
        assert await job.until(lambda: len(job.left) == 4 and job.training() and job.trained > before, 40)
        assert [node.promises.votes for node in sorted(job.nodes, key=lambda node: node.index)] == [
            True,
            False,
            True,
            True,
        ]
        before = job.trained
        job.queue.restarts = False
        job.at[0].power_off()
        assert await job.until(lambda: job.training() and job.trained > before, 40), job.events[-5:]
        assert events(job, "round")[-1]["leader"] == "n2"
        assert events(job, "round")[-1]["nodes"] == ["n1", "n2", "n3"]

    job.run(story)


def test_the_job_does_not_wait_for_a_rebooted_member_that_cannot_lead() -> None:
    """The node is back before another round forms without it, and then the leader is lost."""
    job = Job(1, 5, replace(POLICY, min_nodes=5, max_nodes=5, grow=False), loss=0.0)
    job.queue.restarts = True

    async def story() -> None:
        assert await job.until(job.training, 60)
        job.at[1].kill()
        job.memories[job.at[1]._place] = b""
        assert await job.until(lambda: job.at[1].promises.roster is not None and not job.at[1].dead, 60)
        assert not job.at[1].promises.votes
        job.at[0].power_off()
        assert await job.until(lambda: bool(events(job, "take_over")), 30), job.events[-5:]
        assert [index for _, index, name, _ in job.events if name == "take_over"] == [2]

    job.run(story)


def test_a_spare_waits_without_a_worker_steps_in_immediately_and_leaves_with_the_others() -> None:
    job = Job(3, 4, replace(POLICY, max_nodes=3, spares=1, grow=False), loss=0.0)

    async def story() -> None:
        assert await job.until(job.training, 60)
        assert not job.nodes[3].workers.alive
        lost_at = job.now
        job.nodes[1].kill()
        assert await job.until(lambda: len(rounds(job)) == 2, 5)
        assert job.now - lost_at < 3.0  # links of this network close after 1.5 s, workers die within 1 s
        assert rounds(job)[-1]["nodes"] == ["n0", "n2", "n3"]
        assert await job.until(job.training, 10)
        while not job.over():
            for node in job.left:
                node.end_workers(failed=False)
            await job.until(job.over, 1)
        assert await job.until(lambda: {node.left for node in job.nodes if not node.dead} == {"finished"}, 30)

    job.run(story)


@pytest.mark.parametrize("sizes", [(2, 4), (4,)])
def test_a_world_has_only_allowed_sizes_and_the_other_nodes_wait(sizes: tuple[int, ...]) -> None:
    job = Job(4, 5, replace(POLICY, min_nodes=sizes[0], sizes=sizes, grow=False), loss=0.0)

    async def story() -> None:
        assert await job.until(lambda: bool(rounds(job)), 60)
        assert len(rounds(job)[0]["nodes"]) == 4
        job.nodes[1].power_off()
        assert await job.until(lambda: len(rounds(job)) == 2, 30)
        assert len(rounds(job)[1]["nodes"]) == 4  # the fifth node stepped in
        job.nodes[2].power_off()
        if 2 in sizes:
            assert await job.until(lambda: len(rounds(job)) == 3, 30)
            assert len(rounds(job)[2]["nodes"]) == 2
        else:
            assert await job.until(job.over, 60)

    job.run(story)


@given(SEEDS)
@settings(max_examples=2, deadline=None)
def test_after_each_early_preemption_the_job_requests_joiners_later(seed: int) -> None:
    """A node is free at all times. After a joiner that stays for long, the job requests the next one soon again."""
    job = Job(seed, 2, replace(POLICY, max_nodes=3), loss=0.0, scripts_listen=True)

    def submitted() -> list[float]:
        return [when for when, _, name, _ in job.events if name == "joiners"]

    async def preempted_after(seconds: float) -> float:
        """The time from the preemption to the next request for a joiner."""
        assert await job.until(lambda: len(rounds(job) and rounds(job)[-1]["nodes"]) == 3 and job.training(), 60)
        await job.until(lambda: False, seconds)
        before, left, (going,) = len(submitted()), job.now, [node for node in job.joiners if not node.left]
        going.warn()
        assert await job.until(lambda: len(rounds(job)[-1]["nodes"]) == 2 and len(submitted()) > before, 700)
        return submitted()[-1] - left

    async def story() -> None:
        job.queue.set_free(1)
        waits = [await preempted_after(30) for _ in range(9)]
        assert waits[0] < 10, "a single preemption is no reason to wait"
        for wait, least in zip(waits[1:], (10, 20, 40, 80, 160, 320, 600, 600), strict=True):
            assert least <= wait <= least + 10
        problems = [problem["reason"] for problem in events(job, "growth_problem")]
        assert problems[0] == "Slurm takes new nodes away within 10 minutes: the next joiner is submitted in 10 s"
        assert await preempted_after(growth.WORTH) < 10
        assert events(job, "lost") == events(job, "failure") == []

    job.run(story)


@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_joiners_that_are_preempted_together_count_once_and_joiners_that_end_as_planned_do_not_count(seed: int) -> None:
    job = Job(seed, 2, replace(POLICY, max_nodes=6), loss=0.0, scripts_listen=True)

    async def all_go(reason: str) -> float:
        assert await job.until(lambda: len(rounds(job) and rounds(job)[-1]["nodes"]) == 6 and job.training(), 60)
        await job.until(lambda: False, 15)
        before, left = len(events(job, "joiners")), job.now
        for node in [node for node in job.joiners if not node.left]:
            node.warned(reason)
        assert await job.until(
            lambda: len(rounds(job)[-1]["nodes"]) < 6 and len(events(job, "joiners")) > before, 60
        ), job.events[-5:]
        return next(when for when, _, name, _ in reversed(job.events) if name == "joiners") - left

    async def story() -> None:
        job.queue.set_free(4)
        for _ in range(4):
            assert await all_go("time limit") < 10
        assert await all_go("preempted") < 10
        assert 10 <= await all_go("preempted") < 20

    job.run(story)


def test_a_flapping_joiner_does_not_restart_the_training_repeatedly() -> None:
    job = Job(5, 2, replace(FREE, max_nodes=3, grow_every=60.0), loss=0.0)

    async def story() -> None:
        job.queue.set_free(1)
        assert await job.until(lambda: len(rounds(job) and rounds(job)[-1]["nodes"]) == 3, 60)
        begin = job.now
        while job.now - begin < 240:
            for node in job.joiners:
                if node.workers.alive:
                    node.kill()
            await job.until(lambda: False, 1)
        grown = [fields for fields in rounds(job) if len(fields["nodes"]) == 3]
        assert 2 <= len(grown) <= 5

    job.run(story)


def jobs(**states: str) -> list[SimJoiner]:
    return [SimJoiner(id.removeprefix("j"), state) for id, state in states.items()]


def needs(nodes: int, *in_touch: int, over: bool = False) -> Needs:
    return Needs(nodes, frozenset(map(joiner, map(str, in_touch))), frozenset(), (), over)


@pytest.mark.parametrize(
    ("wanted", "known", "submit", "cancel"),
    [
        (needs(3), {}, 3, ()),
        (needs(3), {"j7": "PENDING", "j8": "RUNNING"}, 1, ()),
        (needs(2, 8), {"j7": "PENDING", "j8": "RUNNING"}, 1, ()),
        (needs(1), {"j7": "PENDING", "j9": "PENDING", "j10": "PENDING"}, 0, ("9", "10")),
        (needs(1), {"j7": "PENDING", "j8": "RUNNING"}, 0, ("7",)),
        (needs(2), {"j7": "COMPLETING"}, 2, ()),
        (needs(3, over=True), {"j7": "PENDING", "j8": "RUNNING"}, 0, ("7",)),
    ],
)
def test_the_requested_number_of_joiners_is_as_wanted(
    wanted: Needs, known: dict[str, str], submit: int, cancel: Any
) -> None:
    plan = growth.plan_growth(wanted, jobs(**known), came=wanted.joiners, restarting=0, remaining=3600.0)
    assert (plan.submit, plan.cancel) == (submit, cancel)


@pytest.mark.parametrize(
    ("reason", "held"),
    [
        *((reason, False) for reason in ("None", "Priority", "Resources", "BeginTime", "Licenses", "Reservation")),
        *((reason, False) for reason in ("ReqNodeNotAvail, UnavailableNodes:n3", "Cleaning", "Dependency")),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions", False),
        *((reason, True) for reason in ("AssocMaxJobsLimit", "AssocGrpNodeLimit", "QOSMaxNodePerUserLimit")),
        *((reason, True) for reason in ("QOSGrpCpuLimit", "QOSMaxSubmitJobPerUserLimit", "AssocGrpBillingMinutes")),
        *((reason, True) for reason in ("JobHeldUser", "JobHeldAdmin", "InvalidQOS", "PartitionTimeLimit")),
        *((reason, True) for reason in ("PartitionDown", "PartitionInactive", "AccountNotAllowed", "BadConstraints")),
    ],
)
def test_a_joiner_counts_as_coming_unless_it_waits_for_something_other_than_nodes(reason: str, *, held: bool) -> None:
    known = [SimJoiner("7", reason=reason), SimJoiner("8", "RUNNING")]
    plan = growth.plan_growth(needs(2), known, came=(), restarting=0, remaining=3600.0)
    assert (plan.submit, plan.cancel, plan.starting, plan.pending) == (0, (), 1, int(not held))
    assert plan.held == ((("7", reason),) if held else ())


def test_near_the_end_the_job_requests_no_more_nodes() -> None:
    plan = growth.plan_growth(needs(3), jobs(j7="PENDING"), came=(), restarting=0, remaining=growth.TOO_LATE - 1)
    assert (plan.submit, plan.cancel) == (0, ("7",))


def test_a_waiting_job_requests_no_more_than_the_remaining_time() -> None:
    known = [replace(job, time_limit=timedelta(hours=int(job.id) - 6)) for job in jobs(j7="PENDING", j8="PENDING")]
    assert growth.plan_growth(needs(2), known, came=(), restarting=0, remaining=3600.0).shorten == ("8",)
    assert growth.plan_growth(needs(2), known, came=(), restarting=0, remaining=float("inf")).shorten == ()


def test_a_restarted_agent_takes_the_place_of_a_joiner() -> None:
    assert growth.plan_growth(needs(2), [], came=(), restarting=1, remaining=3600.0).submit == 1


def test_joiners_never_vote() -> None:
    assert [votes(0), votes(FIRST_JOINER - 1), votes(joiner("1"))] == [True, True, False]
