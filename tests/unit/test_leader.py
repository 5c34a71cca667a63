"""Single steps of the leader, without a network; ``test_membership.py`` has whole jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import simulated

from elastic_hpc.membership.failures import ALIVE_IS_PROGRESS
from elastic_hpc.membership.known import known_of
from elastic_hpc.membership.leader import STOP_TIMEOUT, Leader
from elastic_hpc.membership.messages import Failure, Order, Request, Status
from elastic_hpc.membership.policy import TERM_GRACE
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host, Roster
from elastic_hpc.membership.rules import NEWCOMER_QUIET, STORE_TIMEOUT
from elastic_hpc.membership.strikes import Strike
from elastic_hpc.membership.world import RECORD_EVERY, SETTLE

POLICY = replace(simulated.POLICY, max_restarts=100)


def host(node: int) -> Host:
    return Host(node, f"n{node}", ("10.0.0.1",), 29432)


def failure(node: int = 0, message: str = "exit code 1", **fields: Any) -> Failure:
    known = {"kind": "exit", "node": f"n{node}", "rank": node, "local_rank": 0, "exitcode": 1, "time": 0.0}
    found = known_of([message])
    return Failure(**{**known, "message": message, "known": found.name if found else "", **fields})


def promises_of(roster: Roster | None) -> Promises:
    promises = Promises()
    if roster:
        promises.accept(roster)
    return promises


class Job:
    """A leader whose agents, one per connection of the same number, send what the test requests."""

    def __init__(
        self,
        granted: int = 2,
        inherited: Roster | None = None,
        strikes: Sequence[Strike] = (),
        names: Sequence[str] = (),
        **changes: Any,
    ) -> None:
        self.now = 0.0
        self.leader = Leader(
            replace(POLICY, **changes),
            node=0,
            nproc=2,
            now=0.0,
            granted=granted,
            granted_names=names,
            promises=promises_of(inherited),
            reason="n9 lost" if inherited else "",
            strikes=strikes,
        )
        self.seq = 0
        self.store()

    def store(self) -> None:
        wanted = self.leader.wanted_store
        if wanted is not None:
            self.leader.on_store(wanted, 29400 + wanted, self.now)

    def say(self, node: int, conn: int | None = None, **fields: Any) -> dict[int, list[Order | Roster]]:
        self.seq += 1
        status = Status(**{"seq": self.seq, "host": host(node), "nproc": 2, **fields})
        self.leader.on_status(node if conn is None else conn, f"10.0.0.{node}", status, self.now)
        self.leader.decide(self.now)
        self.store()
        return self.leader.take_orders()

    def lose(self, conn: int, reason: str) -> None:
        self.leader.on_lost(conn, reason)
        self.leader.decide(self.now)

    def wait(self, seconds: float) -> None:
        """Let time pass while all connections are alive."""
        self.now += seconds
        for peer in self.leader.peers.values():
            peer.last_contact = self.now
        self.leader.peers._checked_at = self.now
        self.leader.on_tick(self.now)

    def ready(self, *nodes: int) -> dict[int, list[Order | Roster]]:
        """``nodes`` report that they have no living workers. Returns the messages that the leader sends."""
        sent: dict[int, list[Order | Roster]] = {}
        for node in nodes:
            sent |= self.say(node, round=self.leader.round)
        return sent

    def fail(self, node: int, what: Failure | None = None, **fields: Any) -> None:
        self.say(node, state="failed", round=self.leader.round, failure=what or failure(node), **fields)

    def reach(self, *nodes: int) -> None:
        """``nodes`` report to the leader that they reach each other."""
        probe = orders(self.leader.take_orders(beat=True))[nodes[0]].probe
        assert probe
        for node in nodes:
            self.seq += 1
            status = replace(self.leader.peers.by_node[node].status, seq=self.seq, probed=probe)
            self.leader.on_status(node, f"10.0.0.{node}", status, self.now)
        self.leader.decide(self.now)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.leader.take_events() if event == name]

    @property
    def verdict(self) -> Any:
        return self.leader.verdict


def formed(granted: int = 2, **changes: Any) -> Job:
    """Round 1 runs on ``granted`` nodes."""
    job = Job(granted, **changes)
    job.ready(*range(granted))
    assert job.leader.roster.round == 1
    job.wait(POLICY.heartbeat_timeout)
    return job


def orders(sent: dict[int, list[Order | Roster]]) -> dict[int, Order]:
    return {conn: messages[-1] for conn, messages in sent.items() if isinstance(messages[-1], Order)}


def test_a_round_forms_without_any_wait_when_all_granted_nodes_have_joined() -> None:
    job = Job()
    assert orders(job.say(0))[0].stage == "gather"
    assert job.say(0, round=1) == {}
    assert orders(job.say(1))[1].stage == "gather"
    sent = orders(job.say(1, round=1))
    assert {order.stage for order in sent.values()} == {"run"}
    assert [sent[conn].plan.group_rank for conn in (0, 1)] == [0, 1]  # type: ignore[union-attr]


NAMES = ("n0", "n1", "n2")


def test_a_granted_node_whose_agent_never_starts_is_given_up_long_before_the_join_timeout() -> None:
    job = Job(3, names=NAMES, min_nodes=3, max_nodes=3, can_requeue=True, join_timeout=600.0)
    job.ready(0)
    job.wait(20)
    job.ready(1)
    while not job.leader.verdict and job.now < 600:
        job.wait(1)
        job.ready(0, 1)
    assert 200 <= job.now < 210, "180 s after the last agent came"
    assert job.leader.verdict
    assert job.leader.verdict.outcome == "requeue"
    assert job.leader.verdict.reason.endswith("; never joined: n2")
    assert [event["node"] for event in job.events("absent")] == ["n2"]


@pytest.mark.parametrize("changes", [{"can_requeue": False}, {"can_requeue": True, "max_requeues": 0}])
def test_a_job_that_cannot_get_other_nodes_waits_for_the_whole_join_timeout(changes: Any) -> None:
    job = Job(3, names=NAMES, min_nodes=3, max_nodes=3, join_timeout=600.0, **changes)
    job.ready(0)
    while not job.leader.verdict and job.now < 700:
        job.wait(1)
        job.ready(0)
    assert 599 < job.now < 605


def test_a_world_that_forms_without_a_granted_node_records_that_node() -> None:
    job = Job(3, names=NAMES, min_nodes=2, max_nodes=3)
    job.ready(0)
    job.ready(1)
    job.wait(POLICY.last_call_timeout + 1)
    assert [event["node"] for event in job.events("absent")] == ["n2"]


def test_the_roster_is_sent_before_the_run_order_and_only_to_agents_that_do_not_have_it() -> None:
    job = Job(3)
    sent = job.ready(0, 1, 2)
    for conn in (0, 1, 2):
        roster, order = sent[conn]
        assert isinstance(roster, Roster)
        assert isinstance(order, Order)
        assert (roster.round, order.roster, order.stage) == (1, 1, "run")
        assert roster.bases[-1].members == (0, 1, 2)
        assert [known.name for known in roster.hosts] == ["n0", "n1", "n2"]
    assert job.say(0, state="running", round=1, roster=1) == {}
    job.leader.take_orders(beat=True)
    for _ in range(2):
        beat = job.leader.take_orders(beat=True)
        assert [len(beat[conn]) for conn in (0, 1, 2)] == [1, 2, 2], "to the others once more"
        job.leader.take_orders(beat=True)


def test_before_the_first_round_there_is_no_roster_to_send() -> None:
    job = Job()
    assert [type(message) for message in job.say(0)[0]] == [Order]


def formed_again_without_2() -> Job:
    job = formed(3)
    for node in (0, 1, 2):
        job.say(node, state="running", round=1, seen=1, roster=1)
    job.lose(2, "gone")
    job.ready(0, 1)
    assert job.leader.roster.round == 2
    return job


def test_once_enough_members_hold_the_new_roster_the_new_round_is_the_oldest_one_that_must_agree() -> None:
    job = formed_again_without_2()
    assert {order.oldest for order in orders(job.leader.take_orders(beat=True)).values()} == {1}
    assert (
        orders(job.say(1, state="running", round=2, seen=2, roster=2))[1].oldest == 2
    )  # node 0 formed the round, node 1 holds its roster


def test_only_nodes_with_this_leaders_newest_roster_count_as_knowing_it() -> None:
    job = formed_again_without_2()
    for fields in ({"seen": 3, "roster": 2}, {"seen": 3, "roster": 3}, {"seen": 2, "roster": 1}):
        job.say(1, state="running", round=2, **fields)
        assert orders(job.leader.take_orders(beat=True))[0].oldest == 1, fields


def test_a_report_on_an_old_round_changes_nothing() -> None:
    job = formed()
    job.fail(1)
    assert job.leader.round == 2
    job.say(0, state="failed", round=1, failure=failure())
    assert (job.leader.round, job.leader.restarts) == (2, 1)


def test_the_first_failure_of_a_round_is_the_cause() -> None:
    job = formed(max_restarts=0)
    job.fail(1, failure(1, "out of memory"))
    job.say(0, state="failed", round=1, failure=failure(0, "connection reset"))
    assert job.verdict.failure.message == "out of memory"
    assert job.verdict.cause == "budget"


def test_the_leader_briefly_waits_after_an_echo_for_the_original_failure() -> None:
    job = formed()
    job.fail(0, failure(0, "connection closed by peer", collateral=True))
    assert job.leader.round == 1
    assert job.leader.next_expiry == job.now + SETTLE
    job.fail(1, failure(1, "out of memory"))
    assert job.leader.round == 2
    assert [event["reason"] for event in job.events("restart")] == ["rank 1 on n1: out of memory"]


def test_an_echo_alone_is_accepted_as_the_cause_after_a_moment() -> None:
    job = formed()
    job.fail(0, failure(0, "connection closed by peer", collateral=True))
    job.wait(SETTLE / 2)
    assert job.leader.round == 1
    job.wait(SETTLE)
    job.reach(0, 1)
    assert [event["reason"] for event in job.events("restart")] == ["rank 0 on n0: connection closed by peer"]


def test_a_lost_node_is_the_cause_of_an_echo_that_came_first() -> None:
    job = formed(3)
    job.fail(0, failure(0, "connection closed by peer", collateral=True))
    job.lose(2, "its connection was closed")
    assert [event["reason"] for event in job.events("restart")] == ["n2 lost: its connection was closed"]


def test_the_same_failure_without_a_step_in_between_ends_the_job() -> None:
    job = formed()
    job.fail(0, failure(message="ValueError: no such data set"), step=5)
    job.ready(0, 1)
    job.fail(1, failure(1, message="ValueError: no such data set"), step=5)
    assert job.verdict.outcome == "failed"
    assert job.verdict.cause == "exit"
    assert "the same failure as before, without progress in between" in job.verdict.reason
    assert job.verdict.restarts == 1


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"message": "ValueError: a"}, {"message": "LookupError: b"}),
        ({"kind": "signal", "message": "killed"}, {"kind": "signal", "message": "killed"}),
        ({"kind": "stopped", "message": "SIGSTOP"}, {"kind": "stopped", "message": "SIGSTOP"}),
    ],
)
def test_a_different_or_external_failure_does_not_end_the_job(first: Any, then: Any) -> None:
    job = formed()
    job.fail(0, failure(**first))
    job.ready(0, 1)
    job.fail(0, failure(**then))
    assert job.verdict is None
    assert job.leader.restarts == 2


def test_an_echo_in_between_does_not_count_as_a_different_failure() -> None:
    job = formed()
    job.fail(0, failure(message="ValueError: a"))
    job.ready(0, 1)
    job.fail(0, failure(message="connection closed", collateral=True))
    job.wait(SETTLE * 2)
    job.reach(0, 1)
    job.ready(0, 1)
    job.fail(1, failure(1, message="ValueError: a"))
    assert job.verdict
    assert job.verdict.outcome == "failed"


def test_a_step_between_two_failures_is_progress() -> None:
    job = formed()
    for step in (5, 6, 7):
        job.fail(0, step=step)
        job.ready(0, 1)
    assert job.verdict is None
    job.fail(1, step=7)
    assert job.verdict


def test_a_round_that_lived_long_enough_is_progress_where_no_steps_are_reported() -> None:
    job = formed()
    job.fail(0)
    job.ready(0, 1)
    job.wait(ALIVE_IS_PROGRESS + 1)
    job.fail(0)
    assert job.verdict is None
    job.ready(0, 1)
    job.wait(ALIVE_IS_PROGRESS - 1)
    job.fail(1)
    assert job.verdict


def test_a_leader_that_was_frozen_does_not_blame_its_agents() -> None:
    job = formed()
    job.leader.on_tick(job.now + 1.0)
    job.leader.on_tick(job.now + 100.0)
    assert job.leader.take_dropped() == []
    for second in (101.0, 102.0, 103.0, 104.0, 105.2):
        job.leader.on_tick(job.now + second)
    assert sorted(job.leader.take_dropped()) == [0, 1]


def test_a_leader_that_was_frozen_leads_again_when_its_agents_have_answered_and_their_workers_continue() -> None:
    job = formed(3)
    for node in (0, 1, 2):
        job.say(node, state="running", round=1, roster=1, seen=1)
    heard = max(order.seq for order in orders(job.leader.take_orders(beat=True)).values())
    job.now += 100.0
    job.leader.on_request("stop", "user", job.now)
    asked = orders(job.leader.take_orders(beat=True))
    for conn in (1, 2):
        assert (asked[conn].leads, asked[conn].stage, asked[conn].plan) == (False, "run", None)
        job.say(conn, state="running", round=1, roster=1, seen=1, last_order=heard)
    assert not job.leader.leads, "what was under way when it was frozen proves nothing"
    assert job.verdict is None
    assert not job.leader.abdicated
    for conn in (1, 2):
        assert job.verdict is None
        job.say(conn, state="running", round=1, roster=1, seen=1, last_order=asked[conn].seq)
    assert job.leader.leads
    assert job.verdict.reason == "stopped by the user"


def test_a_leader_that_was_frozen_and_gets_no_answer_leaves_no_verdict() -> None:
    job = formed(3, max_restarts=0)
    job.now += 100.0
    for _ in range(30):
        job.lose(1, "gone")
        job.leader.on_tick(job.now)
        assert job.verdict is None
        assert not any(order.plan or order.leads for order in orders(job.leader.take_orders(beat=True)).values())
        job.now += POLICY.heartbeat_timeout / 5
    assert job.leader.abdicated


def test_a_node_that_has_lost_its_promises_trains_but_neither_votes_nor_acknowledges() -> None:
    job = formed(3)
    for node in (0, 1, 2):
        job.say(node, state="running", round=1, roster=1, seen=1)
    for node in (1, 2):
        job.lose(node, "gone")
        job.say(node, conn=7 + node, votes=node == 2)
        job.say(node, conn=7 + node, round=job.leader.round, votes=node == 2)
    job.wait(POLICY.heartbeat_timeout)
    job.ready(0)
    assert job.leader.roster.members == (0, 1, 2)
    assert job.leader.roster.bases[-1].members == (0, 2)
    assert job.leader.roster.successors == (0, 2)
    job.lose(9, "gone")
    job.say(1, conn=8, state="running", round=2, roster=2, votes=False)
    assert {base.round for base in job.leader._mandate.bases} == {1, 2}


def test_workers_that_cannot_be_stopped_do_not_block_the_others_forever() -> None:
    job = formed(3, last_call_timeout=0.0, min_nodes=1)
    for node in (0, 1, 2):
        job.say(node, state="running", round=1, seen=1, roster=1)
    job.fail(0)
    for _ in range(int(STOP_TIMEOUT) + 5):
        job.ready(0, 2)
        job.say(1, state="running", round=1)
        job.wait(1.0)
    assert job.leader.take_dropped() == [1]
    assert orders(job.leader.take_orders(beat=True))[0].plan
    assert orders(job.say(1, conn=7, state="running", round=1))[7].stage == "run"
    assert job.leader.round == 2  # the node is no newcomer before its workers have ended


def test_a_node_with_a_different_number_of_workers_is_refused_with_the_reason() -> None:
    job = Job()
    order = orders(job.say(1, nproc=1))[1]
    assert (order.stage, order.outcome) == ("end", "failed")
    assert "n1 would start 1 workers, the leader's node 2" in order.reason
    assert job.verdict is None


@pytest.mark.parametrize("other", ["torch 2.12.0, Python 3.11", "torch 2.13.0, Python 3.12", ""])
def test_a_node_with_a_different_torch_or_python_is_refused_with_both_nodes_and_both_versions(other: str) -> None:
    job = Job(3)
    ours = "torch 2.13.0, Python 3.11"
    hosts = [replace(host(node), software=software) for node, software in enumerate([ours, other, ours])]
    job.leader._admission.leader = hosts[0]
    for round in (0, 1):
        for each in hosts:
            sent = job.say(each.node, round=round, host=each)
    assert orders(sent)[2].stage == "run", "the refused node is not waited for"
    assert job.leader.roster.members == (0, 2)
    (refused,) = job.events("refused")
    expected = f"n1 has {other or 'unknown versions'}, the leader's node n0 torch 2.13.0, Python 3.11: all nodes must "
    assert refused["reason"].startswith(expected)


def test_a_second_agent_of_a_node_replaces_the_first() -> None:
    job = formed()
    job.say(1, conn=7)
    assert job.leader.take_dropped() == [1]
    assert job.leader.round == 2


# requests


@pytest.mark.parametrize("drained", [True, False])
@pytest.mark.parametrize(
    ("request_", "outcome", "cause"), [("drain", "requeue", "time limit"), ("save-and-stop", "failed", "user")]
)
def test_workers_that_are_asked_to_save_get_time_to_save(
    request_: Request, outcome: str, cause: str, *, drained: bool
) -> None:
    job = formed()
    job.leader.on_request(request_, "time limit" if request_ == "drain" else "user", job.now)
    assert job.verdict is None
    assert {(order.stage, order.drain) for order in orders(job.leader.take_orders()).values()} == {("run", True)}
    job.say(0, state="succeeded", round=1, drained=drained)
    job.wait(POLICY.grace - 1)
    assert job.verdict is None
    job.say(1, state="succeeded", round=1)
    if drained:
        assert (job.verdict.outcome, job.verdict.cause) == (outcome, cause)
        assert "the workers saved and stopped" in job.verdict.reason
        assert (job.verdict.requeues, job.verdict.restarts) == (0, 0), "nothing is charged"
    else:
        assert job.verdict.outcome == "finished", "they were through before they saw the request"


def test_workers_in_place_must_save_only_for_the_end_of_the_run_and_not_for_a_new_world() -> None:
    job = formed(max_nodes=3, free_growth=True, grow_every=0.0)
    for node in (0, 1):
        job.say(node, state="running", round=1, step=5, live=True, listens=True)
    job.say(2)
    job.wait(NEWCOMER_QUIET)
    told = [orders(job.leader.take_orders())[node] for node in (0,)]
    assert [(order.stage, order.drain, order.new_world) for order in told] == [("run", True, True)]
    job.leader.on_request("drain", "time limit", job.now)
    told = list(orders(job.leader.take_orders()).values())
    assert {(order.stage, order.drain, order.new_world) for order in told} == {("run", True, False)}


def test_a_world_of_live_workers_is_not_changed_again_before_it_has_done_a_step() -> None:
    job = formed(max_nodes=3, free_growth=True, grow_every=0.0)
    for node in (0, 1):
        job.say(node, state="running", round=1, live=True, listens=True)
    job.say(2)
    job.wait(NEWCOMER_QUIET)
    assert not any(order.drain for order in orders(job.leader.take_orders()).values()), "one of them may still form it"
    job.say(0, state="running", round=1, step=1, live=True, listens=True)
    assert all(order.new_world for order in orders(job.leader.take_orders()).values())


def test_workers_that_do_not_stop_in_time_are_not_waited_for() -> None:
    job = formed()
    job.leader.on_request("drain", "preempted", job.now)
    job.wait(POLICY.grace - 0.1)
    assert job.verdict is None
    job.wait(0.2)
    assert (job.verdict.outcome, job.verdict.cause, job.verdict.requeues) == ("requeue", "preempted", 0)
    assert "did not stop within 30 s (--grace)" in job.verdict.reason
    assert {order.stage for order in orders(job.leader.take_orders()).values()} == {"gather"}, "nobody leaves yet"
    job.leader.on_saved()
    assert {order.outcome for order in orders(job.leader.take_orders()).values()} == {"requeue"}


def test_after_slurms_sigterm_there_is_less_time() -> None:
    job = formed()
    job.leader.on_request("drain", "terminated", job.now)
    job.wait(TERM_GRACE - 0.1)
    assert job.verdict is None
    job.wait(0.2)
    assert job.verdict.cause == "terminated"
    assert f"within {TERM_GRACE:g} s" in job.verdict.reason


def test_a_grace_below_what_slurm_leaves_is_kept() -> None:
    job = formed(grace=3.0)
    job.leader.on_request("drain", "terminated", job.now)
    job.wait(3.1)
    assert job.verdict.outcome == "requeue"


@pytest.mark.parametrize("lose", [True, False])
def test_a_failure_while_workers_save_does_not_start_them_again(*, lose: bool) -> None:
    job = formed(3)
    job.leader.on_request("drain", "time limit", job.now)
    if lose:
        job.lose(2, "its connection was closed")
    else:
        job.fail(2)
    assert job.verdict.outcome == "requeue"
    assert "while the workers were saving" in job.verdict.reason
    assert job.verdict.restarts == 0


def test_stop_ends_the_job_immediately_even_after_a_drain_has_begun() -> None:
    job = formed()
    job.leader.on_request("drain", "user", job.now)
    job.leader.on_request("save-and-stop", "user", job.now)
    assert job.verdict is None
    job.leader.on_request("drain", "user", job.now)
    job.leader.on_request("stop", "user", job.now)
    assert (job.verdict.outcome, job.verdict.cause, job.verdict.reason) == ("failed", "user", "stopped by the user")


def test_a_second_request_gives_no_new_grace() -> None:
    job = formed()
    job.leader.on_request("drain", "user", job.now)
    job.wait(POLICY.grace - 1)
    job.leader.on_request("save-and-stop", "user", job.now)
    job.wait(1.5)
    assert (job.verdict.outcome, job.verdict.cause) == ("failed", "user")


def test_a_drain_before_the_first_round_returns_immediately() -> None:
    job = Job()
    job.say(0)
    job.leader.on_request("drain", "preempted", job.now)
    assert (job.verdict.outcome, job.verdict.reason) == ("requeue", "preempted: no worker ran")


def test_a_drain_of_a_job_that_cannot_be_requeued_ends_it() -> None:
    job = formed(can_requeue=False)
    job.leader.on_request("drain", "time limit", job.now)
    job.wait(POLICY.grace + 1)
    assert (job.verdict.outcome, job.verdict.cause) == ("failed", "time limit")


def test_no_node_joins_while_workers_save() -> None:
    job = formed()
    job.leader.on_request("drain", "time limit", job.now)
    job.say(2)
    assert (job.leader.round, job.verdict) == (1, None)


# causes of the end


def test_too_few_nodes_lead_to_a_requeue_which_is_charged() -> None:
    job = formed()
    job.lose(1, "its connection was closed")
    job.wait(POLICY.heartbeat_timeout + 0.1)
    assert (job.verdict.outcome, job.verdict.cause, job.verdict.requeues) == ("requeue", "node lost", 1)
    assert job.verdict.round == 2


def test_a_failure_beyond_the_budget_names_the_budget_and_keeps_the_failure() -> None:
    job = formed(max_restarts=0)
    job.fail(1, failure(1, "out of memory", kind="out of memory"))
    assert (job.verdict.outcome, job.verdict.cause) == ("failed", "budget")
    assert job.verdict.failure.kind == "out of memory"
    assert "all 0 restarts (--max-restarts) are used up" in job.verdict.reason


def test_finished_means_that_all_workers_of_one_round_have_finished() -> None:
    job = formed()
    job.say(0, state="succeeded", round=1)
    assert job.verdict is None
    job.say(1, state="succeeded", round=1)
    assert (job.verdict.outcome, job.verdict.round, job.verdict.failure) == ("finished", 1, None)


# taking over


def inherited(restarts: int = 3) -> Roster:
    """The roster of the nodes of round 1 after their leader, node 9, was lost."""
    job = Job(1, min_nodes=1)
    job.ready(0)
    roster = job.leader.roster
    base = replace(roster.bases[-1], leader=9, members=(0, 1, 2, 9))
    return replace(roster, bases=(base,), hosts=tuple(map(host, (0, 1, 2, 9))), restarts=restarts)


def test_a_node_that_takes_over_decides_nothing_without_a_majority() -> None:
    job = Job(inherited=inherited())
    for node in (0, 1):
        order = orders(job.say(node, seen=1, roster=1))[node]
        assert (order.stage, order.leads, order.round) == ("gather", False, 2)
    sent = orders(job.say(2, seen=1, roster=1))
    assert sent[2].leads
    assert [event["reason"] for event in job.events("take_over")] == ["n9 lost"]
    job.wait(POLICY.heartbeat_timeout)
    job.ready(0, 1, 2)
    assert job.leader.roster.restarts == 4, "the loss of the leader is charged as any other"
    assert job.leader.roster.bases[-1].members == (0, 1, 2)


def test_a_node_that_takes_over_learns_of_a_later_round_before_it_decides() -> None:
    job = Job(inherited=inherited())
    for node in (0, 1):
        job.say(node, seen=1, roster=1)
    sent = orders(job.say(2, seen=4, roster=4))
    assert not sent[2].leads, "node 2 knows what this one does not"
    later = inherited(restarts=5)
    job.leader.on_roster(replace(later, round=4, bases=(replace(later.bases[-1], round=4),)))
    job.leader.decide(job.now)
    assert job.leader.round == 5
    assert job.leader.leads
    assert job.leader.restarts >= 5


@pytest.mark.parametrize("adopts", [False, True])
def test_a_node_that_takes_over_knows_the_nodes_that_were_lost_before(*, adopts: bool) -> None:
    first = formed(4)
    first.lose(3, "gone")
    first.ready(0, 1, 2)
    later = first.leader.roster
    assert (later.round, later.members) == (2, (0, 1, 2))
    job = Job(inherited=replace(later, round=1, hosts=later.hosts[:3]) if adopts else later)
    if adopts:
        job.leader.on_roster(later)
    for node in (0, 1):
        job.say(node, seen=2, roster=2)
    needs = job.leader.needs
    assert needs
    assert [known.name for known in needs.missing] == ["n2", "n3"], "new agents are started there"
    assert job.leader.peers.lost_names == ["n2", "n3"], "a requeue excludes them"


def test_a_node_that_takes_over_in_vain_gives_up_silently() -> None:
    job = Job(inherited=inherited())
    job.say(0, seen=1, roster=1)
    job.wait(POLICY.heartbeat_timeout + 0.1)
    assert job.leader.abdicated
    assert (job.verdict, job.events("abdicate")) == (None, [])


def test_a_leader_without_a_majority_stops_leading_and_leaves_no_verdict() -> None:
    job = formed(4)
    for node in (1, 2):
        job.lose(node, "gone")
    job.wait(POLICY.heartbeat_timeout + 0.1)
    assert not job.leader.abdicated, "half of them and the leader may go on"
    job.lose(3, "gone")
    assert not job.leader.abdicated, "they may be back in a moment"
    job.wait(POLICY.heartbeat_timeout + 0.1)
    assert job.leader.abdicated
    assert job.verdict is None
    assert len(job.events("abdicate")) == 1


def test_a_leader_whose_workers_run_without_a_majority_stops_them_immediately() -> None:
    job = formed(4, max_nodes=3)
    job.lose(1, "gone")
    job.ready(0, 2, 3)
    assert job.leader.roster.bases[-1].members == (0, 2, 3)
    for node in (0, 2, 3):
        job.say(node, state="running", round=2, seen=2, roster=2)
    job.say(2, state="succeeded", round=2)
    job.lose(2, "gone")
    job.lose(0, "gone")
    assert job.leader.abdicated


def test_the_record_shows_the_progress_of_the_workers_at_first_then_at_intervals_and_at_the_end() -> None:
    job = formed()

    def say(step: int) -> list[dict[str, Any]]:
        loss = {"loss": 1 / step} if step < 20 else {}
        job.say(0, state="running", round=1, step=step, step_at=100.0 + step, first=3, first_at=103.0, **loss)
        job.say(1, state="running", round=1, step=step, step_at=100.5 + step, first=3, first_at=103.5, loss=9.0)
        job.wait(1.0)
        return job.events("progress")

    (first,) = say(5)
    assert first == {"round": 1, "step": 5, "step_at": 105.0, "first": 3, "first_at": 103.0, "loss": 1 / 5}
    assert say(6) == say(7) == []
    job.wait(RECORD_EVERY)
    assert [event["step"] for event in job.events("progress")] == [7]
    say(21)
    job.fail(0, step=22, step_at=122.0)
    (last,) = job.events("progress")
    assert (last["step"], last["step_at"], last["loss"]) == (22, 122.0, 1 / 7)
    job.wait(RECORD_EVERY)
    assert job.events("progress") == []


def test_the_record_shows_how_many_workers_kept_their_process() -> None:
    job = formed()
    job.say(0, state="running", round=1, kept=2)
    job.wait(1.0)
    assert job.events("started") == []
    job.say(1, state="running", round=1, kept=1, warm=1, standby_mb=200.0)
    job.wait(1.0)
    (event,) = job.events("started")
    assert event == {"round": 1, "kept": 3, "warm": 1, "cold": 0, "why": [], "not_kept": [], "standby_mb": 200.0}


def test_a_store_that_cannot_be_opened_is_reported_once_retried_for_a_while_and_then_ends_the_run_with_its_reason() -> (
    None
):
    job = Job()
    job.store = lambda: None  # type: ignore[method-assign]
    job.leader._stores.ports.clear()
    job.ready(0, 1)
    for _ in range(int(STORE_TIMEOUT) - 1):
        job.wait(1.0)
        job.leader.on_store_failed(1, "no free port", job.now)
        assert job.verdict is None
    told = job.leader.take_events()
    assert [fields["reason"] for event, fields in told if event == "store_failed"] == ["no free port"]
    waiting = [fields["reason"] for event, fields in told if event == "waiting"]
    assert waiting[-1] == "the store of the next round is being opened, failed so far: no free port"
    job.wait(1.0)
    assert job.verdict
    assert (job.verdict.outcome, job.verdict.cause) == ("requeue", "store")
    assert job.verdict.reason == "the store of the next round could not be opened within 120 s: no free port"


def test_a_store_that_opens_late_is_accepted_and_the_next_one_has_the_same_time() -> None:
    job = Job()
    job.leader._stores.ports.clear()
    open_store, job.store = job.store, lambda: None  # type: ignore[method-assign]
    job.ready(0, 1)
    job.wait(STORE_TIMEOUT - 1)
    job.store = open_store  # type: ignore[method-assign]
    job.store()
    assert len(job.events("round")) == 1
    job.wait(2 * STORE_TIMEOUT)
    job.leader._stores.ports.clear()
    job.fail(0)
    job.wait(1.0)
    assert job.verdict is None


STUCK = "could not be killed within 50 s: python3 (pid 17, state D)"


@pytest.mark.parametrize("node", [0, 2])
def test_a_node_whose_workers_cannot_be_killed_is_lost_and_the_others_continue_immediately(node: int) -> None:
    """Node 0 leads, and continues to lead."""
    job = formed(3)
    others = [other for other in range(3) if other != node]
    job.fail(others[0])
    job.say(node, state="running", round=1, unfit=STUCK)
    (lost,) = job.events("lost")
    assert (lost["node"], lost["reason"]) == (f"n{node}", STUCK), "that is a strike"
    job.ready(*others)
    assert job.leader.roster.members == tuple(others)
    assert job.leader.needs
    assert job.leader.needs.missing == (), "no new agent is started there"
    assert job.leader.needs.nodes == 0 if POLICY.wanted <= 2 else job.leader.needs.nodes > 0
    job.say(node, state="running", round=1, unfit=STUCK)
    job.say(node, state="idle", round=2, unfit=STUCK)
    job.wait(120)
    assert job.events("lost") == []
    assert job.leader.leads
    for other in others:
        job.say(other, state="succeeded", round=job.leader.round)
    assert job.verdict.outcome == "finished"
    assert job.leader.peers.lost_names == [f"n{node}"], "a requeue would take the node from the job"
    job.leader.on_saved()
    sent = orders(job.leader.take_orders(beat=True))
    assert sent[node].stage == "end", "its agent leaves with the others"


def test_a_leader_that_is_alone_and_cannot_kill_its_workers_requeues_the_job() -> None:
    job = formed(2, min_nodes=2)
    job.fail(1)
    job.say(0, state="running", round=1, unfit=STUCK)
    job.ready(1)
    job.wait(POLICY.wait_for_nodes + 1)
    assert job.verdict.outcome == "requeue"
