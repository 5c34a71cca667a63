"""A running job gets new bounds, releases nodes, and gives its own nodes back: whole jobs in simulated time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated import POLICY, Job, SimNode
from test_growth import SEEDS, events, inject, rounds

from elastic_hpc.agent import conclude
from elastic_hpc.membership import messages, wishes
from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.messages import Order, ProtocolError, Status
from elastic_hpc.membership.nodes import votes
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host
from elastic_hpc.membership.sizing import Answer
from elastic_hpc.membership.wishes import Bounds, Parting, Wishes
from elastic_hpc.network.server import LeaderServer
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.view.account import account
from elastic_hpc.view.story_builder import story_of

WHEN = "at the next step boundary; if no steps are reported, within a minute"
CALM = replace(POLICY, min_nodes=2, max_nodes=4, grow=False, max_restarts=20)


def bounds(least: int, most: int) -> Bounds:
    return Bounds(least, most, ())


def server(job: Job) -> LeaderServer | None:
    """The server of the leader with a majority."""
    for node in job.left:
        found = node.membership._own_leader.server
        if found and found.leader.leads and not node.frozen:
            return found
    return None


def ask(job: Job, what: Callable[[LeaderServer], Any]) -> Any:
    found = server(job)
    assert found
    answer = what(found)
    found._after_input()
    return answer


def resize(job: Job, least: int, most: int) -> Answer:
    return ask(job, lambda s: s.leader.on_resize(bounds(least, most), job.now))  # type: ignore[no-any-return]


def release(job: Job, name: str, **how: bool) -> Answer:
    how = {"give_back": True, **how}
    return ask(job, lambda s: s.leader.on_leave(name, "the user releases it", job.now, **how))  # type: ignore[no-any-return]


def world(job: Job) -> set[int]:
    """The nodes of the only world that trains."""
    running = [node for node in job.left if node.workers.alive]
    whole = running and len(running) == running[0].started[-1][1].group_world_size
    return {node.index for node in running} if whole else set()


def own_left(job: Job) -> set[int]:
    return {node.index for node in job.left if votes(node.index)}


@given(SEEDS, st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_job_that_shrinks_drains_its_highest_nodes_and_gives_them_back_without_charge(seed: int, grow: bool) -> None:  # noqa: FBT001
    job = Job(seed, 4, replace(CALM, grow=grow), loss=0.0, scripts_listen=True)

    async def story() -> None:
        assert await job.until(lambda: world(job) == {0, 1, 2, 3}, 60)
        answer = resize(job, 1, 2)
        assert answer == Answer(f"2 node(s) leave {WHEN}: n[2-3]")
        assert await job.until(lambda: sorted(job.queue.given_back) == ["n2", "n3"], 60), job.events[-8:]
        assert (world(job), own_left(job)) == ({0, 1}, {0, 1})
        assert [node.left for node in job.nodes] == ["", "", "finished", "finished"], "that they go is no failure"
        assert [len(event["nodes"]) for event in events(job, "given_back")] in ([2], [1, 1])
        assert rounds(job)[-1]["restarts"] == 0
        assert len(rounds(job)) == 2
        assert not events(job, "lost")
        assert not await job.until(lambda: bool(events(job, "agent_restart") or events(job, "joiners")), 60)
        assert job.bounds == bounds(1, 2), "for the next run"

    job.run(story)


def test_joiners_are_released_before_the_jobs_own_nodes_and_the_job_grows_again_with_new_bounds() -> None:
    job = Job(3, 3, replace(CALM, max_nodes=5, grow=True, free_growth=True), loss=0.0, scripts_listen=True)

    async def story() -> None:
        job.queue.set_free(2)
        assert await job.until(lambda: len(world(job)) == 5, 120), job.events[-8:]
        resize(job, 2, 3)
        assert await job.until(lambda: world(job) == {0, 1, 2}, 60), job.events[-8:]
        assert await job.until(lambda: not job.joiners or all(node.left for node in job.joiners), 60)
        assert not job.queue.given_back
        resize(job, 2, 4)
        assert await job.until(lambda: len(world(job)) == 4, 120), job.events[-8:]
        assert not job.over()

    job.run(story)


@given(SEEDS)
@example(33924)  # an older order, in transit to the leader's own agent, reset the bounds
@settings(max_examples=20, deadline=None)
def test_the_bounds_outlive_the_leader_that_received_them_even_without_a_round_in_between(seed: int) -> None:
    job = Job(seed, 4, CALM, loss=0.0, scripts_listen=True)

    async def story() -> None:
        assert await job.until(lambda: world(job) == {0, 1, 2, 3}, 60)
        resize(job, 2, 3)
        await job.until(lambda: False, job.random.uniform(1.1, 8))  # so that the orders have arrived
        job.nodes[0].power_off()
        assert await job.until(lambda: world(job) == {1, 2, 3} or len(world(job) - {0}) == 2, 60), job.events[-8:]
        assert not await job.until(lambda: len(world(job)) > 3, 30)
        found = server(job)
        assert found
        assert found.leader.policy.max_nodes == 3

    job.run(story)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_after_a_takeover_in_the_middle_of_giving_back_the_same_nodes_are_given_back(seed: int) -> None:
    job = Job(seed, 6, replace(CALM, max_nodes=6), loss=0.0, scripts_listen=True)
    job.queue.restarts = True

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 6, 60)
        resize(job, 2, 3)
        await job.until(lambda: False, job.random.uniform(0.5, 8))
        job.nodes[0].kill()
        assert await job.until(lambda: len(own_left(job)) == 3 and len(world(job)) == 3, 120), job.events[-12:]
        assert not job.over()

    job.run(story)


def test_a_named_node_is_given_back_and_avoided_and_the_leaders_node_is_refused() -> None:
    job = Job(5, 4, CALM, loss=0.0, scripts_listen=True)

    async def story() -> None:
        assert await job.until(lambda: world(job) == {0, 1, 2, 3}, 60)
        assert "n0 leads the job" in release(job, "n0").refusal
        assert "n9 is not a node of this job" in release(job, "n9").refusal
        assert release(job, "n1") == Answer()
        assert await job.until(lambda: job.queue.given_back == ["n1"], 60), job.events[-8:]
        assert world(job) == {0, 2, 3}
        assert release(job, "n2") == Answer()
        assert "fewer than MIN 2" in release(job, "n3").refusal
        assert await job.until(lambda: world(job) == {0, 3}, 60), job.events[-8:]
        assert release(job, "n1") == Answer("n1 has left already")
        assert rounds(job)[-1]["restarts"] == 0
        found = server(job)
        assert found
        assert {"n1", "n2"} <= found.leader.needs.names  # type: ignore[union-attr]

    job.run(story)


def test_a_size_below_the_number_of_nodes_that_must_stay_is_accepted_and_the_answer_names_them() -> None:
    job = Job(5, 4, CALM, loss=0.0, scripts_listen=True)
    job.queue.restarts = True

    async def story() -> None:
        assert await job.until(lambda: world(job) == {0, 1, 2, 3}, 60)
        job.nodes[0].kill()
        assert await job.until(lambda: len(rounds(job)) > 1 and len(world(job)) == 4, 120), job.events[-8:]
        answer = resize(job, 1, 1).text
        assert answer == (
            f"2 node(s) leave {WHEN}: n[2-3]; n[0-1] stay, as they run the batch script and lead the "
            "job: 1 without workers"
        )
        assert await job.until(lambda: own_left(job) == {0, 1} and len(world(job)) == 1, 120), job.events[-8:]
        assert resize(job, 1, 1).text.startswith("n[0-1] stay")

    job.run(story)


def test_a_node_that_is_lost_can_be_given_back_too() -> None:
    job = Job(5, 4, CALM, loss=0.0, scripts_listen=True)

    async def story() -> None:
        assert await job.until(lambda: world(job) == {0, 1, 2, 3}, 60)
        job.nodes[3].power_off()
        assert await job.until(lambda: world(job) == {0, 1, 2}, 60), job.events[-8:]
        assert await job.until(lambda: not release(job, "n3").refusal, 20)
        assert await job.until(lambda: job.queue.given_back == ["n3"], 60), job.events[-8:]
        assert len(events(job, "given_back")) == 1

    job.run(story)


def test_the_job_offers_a_node_again_that_slurm_did_not_take_back() -> None:
    job = Job(5, 4, CALM, loss=0.0, scripts_listen=True)

    async def story() -> None:
        assert await job.until(lambda: world(job) == {0, 1, 2, 3}, 60)
        job.queue.refuses = True
        release(job, "n3")
        assert await job.until(lambda: bool(events(job, "not_given_back")), 60), job.events[-8:]
        assert not await job.until(lambda: world(job) != {0, 1, 2}, 60)
        assert len(events(job, "not_given_back")) == 1
        job.queue.refuses = False
        assert await job.until(lambda: job.queue.given_back == ["n3"], 120)

    job.run(story)


def test_a_node_that_must_leave_stays_while_it_is_needed_for_min() -> None:
    job = Job(5, 3, CALM, loss=0.0, scripts_listen=True)

    async def story() -> None:
        assert await job.until(lambda: world(job) == {0, 1, 2}, 60)
        assert release(job, "n2", exclude=True, give_back=False) == Answer()
        assert await job.until(lambda: world(job) == {0, 1}, 60), job.events[-8:]
        assert "fewer than MIN" in release(job, "n1", exclude=True, give_back=False).text
        assert events(job, "stays")
        job.nodes[1].power_off()
        assert await job.until(lambda: world(job) == {0, 2}, 60), job.events[-8:]
        assert not job.over()

    job.run(story)


def test_a_node_that_may_stay_after_all_rejoins_the_world() -> None:
    job = Job(5, 4, replace(CALM, free_growth=True), loss=0.0, scripts_listen=True)

    async def story() -> None:
        assert await job.until(lambda: world(job) == {0, 1, 2, 3}, 60)
        release(job, "n0", exclude=True)  # the leader's node, which continues to lead
        assert await job.until(lambda: world(job) == {1, 2, 3}, 60), job.events[-8:]
        ask(job, lambda s: s.leader.on_stay("n0", job.now))
        assert await job.until(lambda: world(job) == {0, 1, 2, 3}, 90), job.events[-8:]
        assert [event["node"] for event in events(job, "stay")] == ["n0"]

    job.run(story)


def test_a_cap_applies_as_long_as_it_exists_and_never_goes_below_min() -> None:
    job = Job(5, 4, replace(CALM, grow=True, free_growth=True), loss=0.0, scripts_listen=True)

    async def story() -> None:
        assert await job.until(lambda: world(job) == {0, 1, 2, 3}, 60)
        ask(job, lambda s: s.leader.on_cap(1, "job 4712 waits", job.now))
        assert await job.until(lambda: sorted(job.queue.given_back) == ["n2", "n3"], 60), job.events[-8:]
        assert world(job) == {0, 1}
        assert job.bounds is None
        ask(job, lambda s: s.leader.on_cap(None, "nobody waits", job.now))
        assert await job.until(lambda: len(world(job)) == 4, 120), job.events[-8:]

    job.run(story)


@pytest.mark.parametrize("spares", [0, 1])
def test_a_resize_to_the_current_size_changes_nothing(spares: int) -> None:
    job = Job(5, 4, replace(CALM, max_nodes=4 - spares, spares=spares), loss=0.0, scripts_listen=True)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 4 - spares, 60)
        assert resize(job, 1, 4 - spares) == Answer()
        assert not await job.until(lambda: len(rounds(job)) > 1 or bool(job.queue.given_back), 30)

    job.run(story)


def test_a_spare_that_a_larger_max_lets_train_is_not_missing() -> None:
    job = Job(5, 4, replace(CALM, max_nodes=3, spares=1), loss=0.0, scripts_listen=True)

    async def story() -> None:
        assert await job.until(lambda: len(world(job)) == 3, 60)
        assert resize(job, 1, 4) == Answer()
        assert await job.until(lambda: len(world(job)) == 4, 120), job.events[-8:]

    job.run(story)


async def inject_wishes(job: Job, seconds: float) -> None:
    """The faults of ``inject``, and between them random resizes, releases, caps and their withdrawals."""
    dice, end = job.random, job.now + seconds
    while job.now < end and not job.over():
        found = server(job)
        if found and not found.leader.verdict:
            leader, node = found.leader, dice.choice(job.nodes)
            match dice.randrange(5):
                case 0 | 1:
                    least = dice.randrange(1, 3)
                    leader.on_resize(bounds(least, least + dice.randrange(4)), job.now)
                case 2:
                    leader.on_leave(node.host.name, "why not", job.now, exclude=dice.random() < 0.5, give_back=True)
                case 3:
                    leader.on_stay(node.host.name, job.now)
                case _:
                    leader.on_cap(dice.choice((None, 1, 2, 3)), "others wait", job.now)
            found._after_input()
        await inject(job, dice.uniform(0, 10))
        job.loss = 0.1


@given(seed=SEEDS, nodes=st.integers(2, 6), listens=st.booleans(), grow=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_job_that_is_resized_among_faults_trains_again_and_never_in_two_worlds(
    *, seed: int, nodes: int, listens: bool, grow: bool
) -> None:
    job = Job(seed, nodes, replace(POLICY, max_nodes=6, free_growth=True, grow=grow), scripts_listen=listens)
    job.queue.restarts = True

    def settled() -> bool:
        found = server(job)
        if not found or not world(job):
            return False
        members: list[SimNode] = [node for node in job.left if node.workers.alive]
        return len(members) <= found.leader.policy.max_nodes

    async def story() -> None:
        assert await job.until(lambda: bool(world(job)) or job.over(), 90)
        await inject_wishes(job, 90)
        job.heal()
        job.loss, job.files, job.queue.refuses = 0.0, True, False
        # the world's only node may be lost: then the batch script ends the job
        ended = lambda: job.over() or job.requeued or not own_left(job)  # noqa: E731
        assert await job.until(lambda: settled() or ended(), 300), job.events[-8:]

    job.run(story)


WISHES = Wishes(3, Bounds(2, 6, (2, 4, 6)), (Parting(1, "n1", "drained", exclude=True, give_back=True),), (3, 4, 5))


def test_wishes_arrive_as_they_were_sent_and_malformed_wishes_are_refused() -> None:
    order = replace(Order(1, "run", 2, "why"), wishes=WISHES)
    assert messages.decode_from_leader(messages.encode(order)) == order
    status = Status(1, Host(0, "n0", ("10.0.0.1",), 1), 1, wishes=WISHES)
    assert messages.decode_from_agent(messages.encode(status)) == status
    body = {"request": "resize", "min_nodes": 1, "max_nodes": 4, "sizes": "1,4"}
    assert messages.decode_from_agent(messages.encode(body)) == Bounds(1, 4, (1, 4))
    for wrong in ({"min_nodes": 5}, {"min_nodes": "1"}, {"max_nodes": None}, {"sizes": 4}, {"sizes": "4-"}):
        with pytest.raises(ProtocolError):
            messages.decode_from_agent(messages.encode(body | wrong))
    for wrong in ({"number": "x"}, {"bounds": 4}, {"partings": [{"node": 1}]}, {"given_back": 4}):
        line = messages.json_line({"seq": 1, "stage": "run", "round": 1, "reason": "", "wishes": WISHES.body | wrong})
        with pytest.raises(ProtocolError):
            messages.decode_from_leader(line)


def test_a_restarted_agent_knows_the_wishes_that_its_node_received() -> None:
    kept: list[bytes] = []
    Promises(kept.append).wish(WISHES)
    assert Promises(lambda _: None, kept[-1]).wishes == WISHES


def test_an_older_wish_does_not_override_a_newer_one() -> None:
    promises = Promises()
    promises.wish(WISHES)
    promises.wish(replace(WISHES, number=2, bounds=None))
    assert promises.wishes == WISHES


def test_the_next_run_starts_with_the_bounds_and_requests_them_from_slurm(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    rundir.write("spec.json", {"--nodes": "4:8", "--spares": "1"})
    assert conclude._nodes_to_ask_for(rundir) == "4-9"
    rundir.write("spec.json", {"--nodes": "3:8", "--spares": "1", "--world-multiple-of": "4", "--nproc-per-node": "2"})
    assert conclude._nodes_to_ask_for(rundir) == "4-9", "three nodes have no world"
    (tmp_path / "script.sbatch").write_text("#!/bin/bash\n#SBATCH --partition=safe\n#GROW --partition=cheap\nsrun\n")
    assert conclude._nodes_to_ask_for(rundir) == "4", "all nodes above MIN come from another partition"
    (tmp_path / "script.sbatch").unlink()
    rundir.write("state.json", {"round": 3})
    rundir.write_bounds((2, 4, 6))
    assert rundir.read("state.json") == {"round": 3, "bounds": Bounds(2, 6, (2, 4, 6)).body}
    assert conclude._nodes_to_ask_for(rundir) == "2-7"
    leader = Leader(CALM, node=0, nproc=1, now=0.0, bounds=wishes.saved(rundir.read("state.json")))
    assert (leader.policy.min_nodes, leader.policy.max_nodes, leader.policy.sizes) == (2, 6, (2, 4, 6))
    assert wishes.saved({"bounds": {"min_nodes": 4}}) is None, "damaged"


@pytest.mark.parametrize(
    ("given", "cap", "held"),
    [
        (Bounds(2, 6, ()), 4, Bounds(2, 4, ())),
        (Bounds(2, 6, ()), 1, Bounds(2, 2, ())),
        (Bounds(2, 6, (2, 4, 6)), 5, Bounds(2, 4, (2, 4))),
        (Bounds(4, 8, (4, 8)), 1, Bounds(4, 4, (4,))),
    ],
)
def test_a_cap_leaves_the_largest_world_below_it(given: Bounds, cap: int, held: Bounds) -> None:
    assert given.capped(cap) == held


def test_a_node_that_was_given_back_no_longer_counts_as_node_time_of_the_job() -> None:
    told = [
        {"time": 0.0, "event": "start", "run": 0, "job": "1", "granted": 4},
        {"time": 0.0, "event": "round", "round": 1, "nodes": ["n0", "n1"], "world_size": 2, "restarts": 0, "leader": 0},
        {"time": 10.0, "event": "given_back", "nodes": ["n2", "n3"], "reason": "the user releases it"},
    ]
    spent = account(story_of(told), 100.0)
    assert (spent.total, spent.node_seconds["idle"]) == (220.0, 20.0)
