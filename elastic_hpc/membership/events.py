"""The events of a job: each event with its fields, and a sentence for a person. Pure.

Every event has ``time``, seconds since the epoch on the leader's node, and ``event``, its name. A reader must accept
fields and events that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROUND = "number of the round"
_NODE = "Slurm's name of the node"
_WHY = "why, in a sentence"
_JOBS = "ids of one-node jobs"

EVENTS: dict[str, tuple[str, dict[str, str]]] = {
    "start": (
        "a run begins: the first leader has come up; with the limits that the user has set",
        {
            "version": "of elastic_hpc",
            "run": "how often the job has started before",
            "job": "what scontrol calls it",
            "granted": "number of the job's own nodes",
            "nproc_per_node": "workers on each node",
            "min_nodes, max_nodes, sizes, spares, grow, ...": "what was asked for; times in seconds",
        },
    ),
    "allocation": (
        "what Slurm says of the run, in seconds since the epoch; null for what it does not say",
        {
            "run": "which one",
            "submitted": "when the job was put into the queue",
            "started": "when it got its nodes",
            "ends": "its time limit",
        },
    ),
    "join": (
        "an agent is in touch",
        {"node": _NODE, "addr": "address it comes from", "joiner": "whether a job of its own brought it"},
    ),
    "lost": (
        "an agent is gone",
        {"node": _NODE, "reason": _WHY, "round": _ROUND, "silent": "seconds since it was heard of last"},
    ),
    "left": ("an agent has gone that had to", {"node": _NODE, "reason": _WHY, "round": _ROUND, "silent": "the same"}),
    "release": ("a node is let go", {"node": _NODE, "reason": _WHY}),
    "absent": (
        "the job goes on without a granted node, whose agent was never in touch",
        {"node": _NODE, "reason": _WHY},
    ),
    "unfit": ("a node's preflight says that it should not take part", {"node": _NODE, "reason": _WHY}),
    "refused": ("an agent may not take part", {"node": _NODE, "reason": _WHY}),
    "stranger": (
        "a connection was refused: the peer has not proved to be an agent of this run, or somebody else spoke on it",
        {"addr": "where from", "reason": _WHY},
    ),
    "waiting": ("the next round cannot be formed yet", {"round": _ROUND, "reason": "what is waited for"}),
    "round": (
        "a world was formed",
        {
            "round": _ROUND,
            "nodes": "its nodes, in rank order",
            "world_size": "number of workers",
            "restarts": "restarts charged so far",
            "leader": "name of the leader's node",
        },
    ),
    "started": (
        "how the workers of a round were started, when all have been",
        {
            "round": _ROUND,
            "warm": "number of workers that were standbys: their interpreter and imports were ready",
            "cold": "number of those that were not",
            "why": "why those were not: a list, one entry for each reason",
            "standby_mb": "memory of one standby that it shares with no other process, in MiB; the largest",
        },
    ),
    "progress": (
        "how far the workers are: at their first step, then every 10 s, and at the end of the round",
        {
            "round": _ROUND,
            "step": "last step that was reported",
            "step_at": "when",
            "first": "first step that was reported in this round",
            "first_at": "when",
            "loss": "what was reported with it, if anything",
        },
    ),
    "failure": (
        "a worker has failed",
        {
            "round": _ROUND,
            "first": "whether it is the cause, as far as is known yet",
            "kind": "exception, out of memory, signal, exit, hang or stopped",
            "node": _NODE,
            "rank": "of the worker",
            "local_rank": "of the worker",
            "exitcode": "minus the signal if one killed it",
            "message": "type and text of the exception, or what else is known",
            "traceback": "its last Python traceback",
            "collateral": "whether it looks like the echo of another rank's death",
        },
    ),
    "barred": (
        "a node gets no workers any more, and is excluded at the requeue: they fail there again and again",
        {
            "node": _NODE,
            "reason": _WHY,
            "signature": "the failure without its numbers and names",
            "step": "last step before it, or -1",
        },
    ),
    "request": ("somebody asks for a drain or the end", {"request": "drain, save-and-stop or stop", "reason": _WHY}),
    "drain": ("the workers are asked to save and stop, for a new world", {"round": _ROUND, "reason": _WHY}),
    "restart": (
        "the workers are stopped, the next round is formed",
        {"round": "number of the next round", "restarts": "restarts charged so far", "reason": _WHY},
    ),
    "take_over": ("another agent leads now", {"round": "number of the next round", "reason": _WHY}),
    "abdicate": ("a leader is without its majority", {"round": _ROUND, "reason": _WHY}),
    "joiners": ("Slurm was asked for more nodes", {"jobs": _JOBS, "wanted": "nodes that could be used"}),
    "joiners_cancelled": ("they are not needed any more", {"jobs": _JOBS}),
    "agent_restart": ("an agent is started anew on its node", {"node": _NODE}),
    "growth_problem": ("nodes cannot be asked for", {"reason": _WHY}),
    "store_failed": ("the store of a round could not be opened, and is tried again", {"round": _ROUND, "reason": _WHY}),
    "verdict": (
        "how the run ends",
        {
            "outcome": "finished, failed or requeue",
            "cause": "one word or two: budget, user, time limit, node lost, ...",
            "reason": _WHY,
            "failure": "the first failure, with the fields of that event, or null",
            "restarts": "restarts charged in all",
            "requeues": "requeues charged in all",
            "round": "number of the last round",
        },
    ),
}
"""By name: what it means, and what its fields mean."""


def sentence(name: str, fields: Mapping[str, Any]) -> str:
    """One line for a person; the full record is in the run directory."""
    match name:
        case "join":
            return f"{fields['node']} joined"
        case "left" | "release":
            return f"{fields['node']} leaves: {fields['reason']}"
        case "joiners":
            return f"asked Slurm for {len(fields['jobs'])} more node(s): job(s) {', '.join(fields['jobs'])}"
        case "joiners_cancelled":
            return f"not needed any more: job(s) {', '.join(fields['jobs'])}"
        case "agent_restart":
            return f"the agent on {fields['node']} is started anew"
        case "growth_problem":
            return f"the job does not grow: {fields['reason']}"
        case "absent":
            return f"{fields['node']} never joined: {fields['reason']}"
        case "unfit" | "barred":
            return f"{fields['node']} stays out: {fields['reason']}"
        case "refused":
            return f"{fields['node']} was refused: {fields['reason']}"
        case "request":
            return f"{fields['request']} was asked for: {fields['reason']}"
        case "waiting":
            return f"waiting: {fields['reason']}"
        case "store_failed":
            return f"the store of round {fields['round']} could not be opened: {fields['reason']}"
        case "stranger":
            return f"a connection from {fields['addr']} was refused: {fields['reason']}"
        case "drain":
            return f"the workers are asked to save and stop: {fields['reason']}"
        case "lost":
            return f"{fields['node']} is lost: {fields['reason']}"
        case "round":
            nodes = fields["nodes"]
            shown = ", ".join(nodes[:8]) + (", ..." if len(nodes) > 8 else "")
            return (
                f"round {fields['round']}: {len(nodes)} nodes ({shown}), "
                f"{fields['world_size']} workers, restart {fields['restarts']}"
            )
        case "started":
            size = f", of {fields['standby_mb']:.0f} MiB each" if fields["standby_mb"] else ""
            started = f"{fields['warm']} of {fields['warm'] + fields['cold']} workers were standbys{size}"
            return "; ".join([started, *fields["why"]])
        case "failure":
            first = "failed" if fields["first"] else "failed too"
            return f"rank {fields['rank']} on {fields['node']} {first}: {fields['message']}"
        case "restart":
            return f"restart {fields['restarts']}: {fields['reason']}"
        case "verdict":
            return f"{fields['outcome']}: {fields['reason']}"
        case "take_over":
            return f"this node leads now: {fields['reason']}"
        case "abdicate":
            return f"this node leads no more: {fields['reason']}"
        case _:
            others = {key: value for key, value in fields.items() if key not in {"time", "event"}}
            return f"{name}: " + ", ".join(f"{key} {value}" for key, value in others.items())
