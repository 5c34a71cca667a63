"""What happened to a job and why, for programs: what ``why.page`` shows, as one object. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elastic_hpc.membership.events import sentence
from elastic_hpc.membership.known import BY_NAME
from elastic_hpc.view.job import SCHEMA, JobView
from elastic_hpc.view.story import Fault, Round, Run, Story
from elastic_hpc.view.why import SHOWN, advice


def as_json(
    view: JobView, story: Story, events: Sequence[Mapping[str, Any]], now: float, problem: str
) -> dict[str, Any]:
    """What ``--json`` prints. ``slurm`` says why Slurm did not answer; null if it did."""
    return {
        "schema": SCHEMA,
        "time": now,
        "slurm": problem or None,
        "job": vars(view),
        "runs": [_run(run) for run in story.runs],
        "rounds": [_round(round, story) for round in story.rounds],
        "events": [
            {"time": event["time"], "event": event["event"], "text": sentence(event["event"], event)}
            for event in events
            if event["event"] in SHOWN
        ],
        "advice": advice(view, story),
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        "number": run.number + 1,
        "job": run.job,
        "nodes": run.granted,
        "submitted": run.submitted,
        "started": run.started,
        "ended": run.ended,
        "outcome": run.outcome,
        "reason": run.reason,
        "charged": run.charged,
    }


def _round(round: Round, story: Story) -> dict[str, Any]:
    return {
        "number": round.number,
        "run": round.run + 1,
        "nodes": round.nodes,
        "world_size": round.world_size,
        "workers_kept": round.workers_kept,
        "leader": round.leader,
        "formed": round.formed,
        "gap": round.gap,
        "ended": round.ended,
        "cause": round.cause,
        "charged": round.charged,
        "first_step": round.first,
        "last_step": round.last,
        "repeated_steps": story.repeated(round),
        "faults": [_fault(fault) for fault in round.faults],
    }


def _fault(fault: Fault) -> dict[str, Any]:
    known = BY_NAME.get(fault.known)
    return {
        "time": fault.time,
        "node": fault.node,
        "rank": fault.rank,
        "kind": fault.kind,
        "message": fault.message,
        "traceback": fault.traceback,
        "known": {"name": known.name, "party": known.party, "what": known.what} if known else None,
    }
