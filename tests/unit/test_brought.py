"""Gains and losses of growth: from the events of a job to the pages of why and timeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import records

from elastic_hpc.cli.hpc import main
from elastic_hpc.view.brought import Brought, brought
from elastic_hpc.view.story_builder import story_of

NODES = ("n1", "n2", "n3", "n4")


def event(time: float, name: str, **fields: Any) -> dict[str, Any]:
    return {"time": 1_800_000_000.0 + time, "event": name, **fields}


def world(round: int, formed: float, steps: range, *nodes: str, until: float) -> list[dict[str, Any]]:
    """A round that does ``steps``, the first one 5 s after the round was formed, the last one at ``until``."""
    first_at, at = 1_800_000_000.0 + formed + 5, 1_800_000_000.0 + until
    done = {"round": round, "first": steps[0], "first_at": first_at, "step": steps[-1], "step_at": at}
    formation = {"round": round, "nodes": nodes, "world_size": len(nodes), "restarts": round - 1, "leader": "n1"}
    return [event(formed, "round", **formation), event(until, "progress", **done)]


def joined(time: float, *nodes: str, joiner: bool = True) -> list[dict[str, Any]]:
    return [event(time, "join", node=node, addr="", joiner=joiner) for node in nodes]


def job(leave: str, reason: str, repeated: int) -> list[dict[str, Any]]:
    """A job with two nodes of its own; n3 and n4 join, n4 leaves with ``leave`` and ``reason``, and joins again."""
    gone = event(201, leave, node="n4", reason=reason, round=2, silent=0.0)
    return [
        event(0, "start", run=0, job="1", granted=2, max_restarts=9),
        *joined(0, "n1", "n2", joiner=False),
        *world(1, 0, range(100), "n1", "n2", until=90),
        *joined(90, "n3", "n4"),
        event(91, "restart", round=2, restarts=1, reason="2 more node(s) joined"),
        *world(2, 95, range(100, 300), *NODES, until=200),
        event(200.5, "restart", round=3, restarts=2, reason="1 node(s) must leave"),
        gone,
        *world(3, 202, range(300 - repeated, 450), "n1", "n2", "n3", until=300),
        *joined(300, "n4"),
        event(301, "restart", round=4, restarts=3, reason="1 more node(s) joined"),
        *world(4, 302, range(450, 550), *NODES, until=400),
        event(400, "verdict", outcome="finished", cause="", reason="all workers finished", restarts=3, requeues=0),
    ]


@pytest.mark.parametrize(
    ("leave", "reason", "taken"),
    [
        ("release", "preempted", True),
        ("left", "terminated", True),
        ("lost", "no heartbeat for 5 s", True),
        ("release", "time limit", False),
        ("release", "MAX is 3 now", False),
    ],
)
def test_nodes_taken_by_others_are_distinguished_from_nodes_that_leave_as_planned(
    leave: str, reason: str, *, taken: bool
) -> None:
    won = brought(story_of(job(leave, reason, 0)))
    assert won == Brought(
        joiners=3,
        node_seconds=310 + 111 + 100,  # n3 until the end, n4 until it leaves, n4 again until the end
        steps=200 / 2 + 150 / 3 + 100 / 2,
        came=2,
        standstill=10 + 7,
        taken=int(taken),
        taken_standstill=7 if taken else 0,
        taken_repeated=0,
    )


def test_repeated_steps_after_a_preemption_are_a_cost_of_growth() -> None:
    won = brought(story_of(job("release", "preempted", 20)))
    assert (won.taken_repeated, won.steps) == (20, 180 / 2 + 170 / 3 + 100 / 2)


def test_the_pages_show_what_growth_has_gained_and_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = records.copy("grown", tmp_path)
    records.write(folder, job("release", "preempted", 20))
    assert main(["why", str(folder)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for sentence in (
        "what growth gained and cost 3 joiners, 8 min 41 s of node time in total",
        "their share of the kept steps: 197 of 550",
        "their arrival: 17 s without a step, in 2 changes",
        "preempted, cancelled or lost: 1; cost: 7.0 s without a step, 20 steps repeated",
    ):
        assert sentence in told, told
    assert main(["timeline", str(folder), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<b>197</b><span>steps by growth</span>" in page
    assert "<b>1</b><span>joiners taken: 7.0 s, 20 steps repeated</span>" in page


def test_the_page_of_a_job_that_did_not_grow_says_nothing_about_growth(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", str(records.FOLDER / "faults")]) == 0
    assert "growth" not in capsys.readouterr().out
