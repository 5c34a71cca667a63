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
_JOBS = "IDs of one-node jobs"

EVENTS: dict[str, tuple[str, dict[str, str]]] = {
    "start": (
        "a run begins: the first leader has come up; with the limits that the user has set",
        {
            "version": "of elastic_hpc",
            "run": "how often the job has started before",
            "job": "what scontrol calls it",
            "granted": "number of the job's own nodes",
            "nproc_per_node": "workers on each node",
            "min_nodes, max_nodes, sizes, spares, grow, ...": "the job's options; times in seconds",
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
        "an agent has connected to the leader",
        {"node": _NODE, "addr": "the agent's address", "joiner": "whether a one-node job of --grow brought the node"},
    ),
    "lost": (
        "the leader has declared an agent lost",
        {"node": _NODE, "reason": _WHY, "round": _ROUND, "silent": "seconds since the last message of the agent"},
    ),
    "left": (
        "an agent that had to leave is gone",
        {"node": _NODE, "reason": _WHY, "round": _ROUND, "silent": "the same"},
    ),
    "resize": (
        "MIN and MAX of the job have changed",
        {"min_nodes, max_nodes": "of a world", "sizes": "the numbers between, as 2-6 or 4,8", "reason": _WHY},
    ),
    "cap": (
        "the job temporarily holds fewer nodes than MAX",
        {"nodes": "maximum number, or null when the limit ends", "reason": _WHY},
    ),
    "leave": (
        "a node must leave, at a step boundary",
        {"node": _NODE, "reason": _WHY, "exclude": "whether the job avoids the node from then on"},
    ),
    "stay": ("a node no longer has to leave", {"node": _NODE, "reason": "why the node had to leave"}),
    "stays": (
        "a node that must leave stays until the job can continue without the node",
        {"node": _NODE, "reason": "why the node must leave", "why": "why the node stays"},
    ),
    "not_given_back": (
        "Slurm did not take back nodes that the job released; the job tries again",
        {"nodes": "Slurm's names of the nodes", "reason": _WHY},
    ),
    "given_back": ("the job has returned nodes to Slurm", {"nodes": "Slurm's names of the nodes", "reason": _WHY}),
    "release": ("the leader releases a node", {"node": _NODE, "reason": _WHY}),
    "absent": (
        "the job continues without an allocated node whose agent never connected",
        {"node": _NODE, "reason": _WHY},
    ),
    "unfit": ("a node has failed its preflight check", {"node": _NODE, "reason": _WHY}),
    "refused": ("the leader has refused an agent", {"node": _NODE, "reason": _WHY}),
    "stranger": (
        "the leader has refused a connection: the peer did not prove that it is an agent of this run",
        {"addr": "address of the peer", "reason": _WHY},
    ),
    "waiting": ("the next round cannot be formed yet", {"round": _ROUND, "reason": "what the leader waits for"}),
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
            "kept": "number of workers that kept their process from the round before: in place",
            "warm": "number of workers that were standbys: their interpreter and imports were ready",
            "cold": "number of workers that were started as new processes",
            "why": "why they were started as new processes, or could not be kept: a list, one entry for each reason",
            "not_kept": "why workers whose script calls live could not be kept: a list",
            "standby_mb": "unshared memory of the largest standby, in MiB",
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
            "loss": "the loss reported with that step, if any",
        },
    ),
    "failure": (
        "a worker has failed",
        {
            "round": _ROUND,
            "first": "whether this failure is the cause, as far as is known yet",
            "kind": "exception, out of memory, signal, exit, hang or stopped",
            "node": _NODE,
            "rank": "of the worker",
            "local_rank": "of the worker",
            "exitcode": "minus the signal if one killed it",
            "message": "type and text of the exception, or what else is known",
            "traceback": "the worker's last Python traceback",
            "collateral": "whether the failure looks like a consequence of another rank's death",
            "known": "its name in the table of known causes, or empty",
        },
    ),
    "hang_timeout": (
        "the job has learned a new timeout for silent workers (--hang-timeout auto)",
        {
            "seconds": "without a step or output, in which the workers neither compute, nor read or write",
            "reason": _WHY,
        },
    ),
    "apart": (
        "nodes of a round that has failed do not reach each other, though their agents reach the leader",
        {"round": _ROUND, "pairs": "Slurm's names of the two nodes of each pair, 100 pairs at most", "reason": _WHY},
    ),
    "slow": (
        "a node is slower than the others (--slow-node)",
        {
            "round": _ROUND,
            "node": _NODE,
            "seconds": "what its slowest worker takes in a step before its first collective",
            "others": "the median of that on the other nodes",
            "times": "seconds as a multiple of others",
            "reason": _WHY,
        },
    ),
    "slow_over": ("a node is no longer slower than the others", {"round": _ROUND, "node": _NODE}),
    "barred": (
        "workers failed repeatedly on a node: the node gets no workers any more, and a requeue excludes the node",
        {
            "node": _NODE,
            "reason": _WHY,
            "signature": "the failure without its numbers and names",
            "step": "last step before the failure, or -1",
        },
    ),
    "request": (
        "the user, Slurm or a worker has requested a drain or the end of the job",
        {"request": "drain, save-and-stop or stop", "reason": _WHY},
    ),
    "drain": ("the leader asks the workers to save and stop, for a new world", {"round": _ROUND, "reason": _WHY}),
    "restart": (
        "the agents stop the workers; the leader forms the next round",
        {"round": "number of the next round", "restarts": "restarts charged so far", "reason": _WHY},
    ),
    "take_over": ("another agent leads now", {"round": "number of the next round", "reason": _WHY}),
    "abdicate": ("a leader has lost its majority", {"round": _ROUND, "reason": _WHY}),
    "joiners": (
        "the job has submitted one-node jobs to get more nodes",
        {"jobs": _JOBS, "wanted": "number of nodes that the job could use"},
    ),
    "joiners_cancelled": ("the job has cancelled one-node jobs that it no longer needs", {"jobs": _JOBS}),
    "agent_restart": ("the job restarts an agent on its node", {"node": _NODE}),
    "growth_problem": ("the job cannot request more nodes", {"reason": _WHY}),
    "yield": (
        "the job releases nodes for another, pending job (--yield-to)",
        {
            "job": "ID of the other job, as squeue shows it",
            "user": "owner of the other job",
            "given": "number of released nodes",
            "kept": "number of nodes kept",
            "reason": _WHY,
        },
    ),
    "yielded": (
        "what happened to nodes that the job released for another job",
        {
            "job": "ID of the other job",
            "started": "whether the other job has started; null if unknown",
            "reason": _WHY,
        },
    ),
    "unseen": (
        "the leader could not read what it reads regularly; the leader tries again, and records the failure once",
        {"what": "what the leader reads", "reason": _WHY},
    ),
    "store_failed": ("the store of a round did not open; the leader tries again", {"round": _ROUND, "reason": _WHY}),
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
    "withdrawn": (
        "the run continues: a leader has withdrawn the verdict of an agent that had found no leader",
        {"node": "the node of that agent", "reason": "the reason of that verdict"},
    ),
}
"""By name: the meaning of the event, and of its fields."""


def sentence(name: str, fields: Mapping[str, Any]) -> str:
    """One line for a person; the full record is in the run directory."""
    match name:
        case "start":
            nodes = f"MIN {fields['min_nodes']}, MAX {fields['max_nodes']}, {fields['granted']} node(s) granted"
            return (
                f"job {fields['job']}, run {fields['run'] + 1}: {nodes}, {fields['nproc_per_node']} worker(s) on each"
            )
        case "join":
            return f"{fields['node']} joined"
        case "left" | "release":
            return f"{fields['node']} leaves: {fields['reason']}"
        case "resize":
            return f"the world may have {fields['min_nodes']} to {fields['max_nodes']} nodes from now on"
        case "cap":
            most = "MAX nodes again" if fields["nodes"] is None else f"at most {fields['nodes']} node(s)"
            return f"the job may hold {most}: {fields['reason']}"
        case "leave":
            return f"{fields['node']} must leave: {fields['reason']}"
        case "stay":
            return f"{fields['node']} no longer has to leave: {fields['reason']}"
        case "stays":
            return f"{fields['node']} must leave ({fields['reason']}), but stays for now: {fields['why']}"
        case "not_given_back":
            return f"Slurm did not take back {', '.join(fields['nodes'])}: {fields['reason']}"
        case "given_back":
            return f"returned {', '.join(fields['nodes'])} to Slurm: {fields['reason']}"
        case "joiners":
            return f"requested {len(fields['jobs'])} more node(s) from Slurm: job(s) {', '.join(fields['jobs'])}"
        case "joiners_cancelled":
            return f"cancelled job(s) {', '.join(fields['jobs'])}, which are no longer needed"
        case "agent_restart":
            return f"restarting the agent on {fields['node']}"
        case "growth_problem":
            return f"the job cannot grow: {fields['reason']}"
        case "absent":
            return f"{fields['node']} never joined: {fields['reason']}"
        case "unfit" | "barred":
            return f"{fields['node']} stays out: {fields['reason']}"
        case "apart":
            return str(fields["reason"])
        case "slow":
            return f"{fields['node']}: {fields['reason']}"
        case "slow_over":
            return f"{fields['node']} is no longer slower than the others"
        case "refused":
            return f"{fields['node']} was refused: {fields['reason']}"
        case "request":
            return f"{fields['request']} requested: {fields['reason']}"
        case "hang_timeout":
            return f"hang timeout: {fields['seconds']:.0f} s without a step or output ({fields['reason']})"
        case "waiting":
            return f"waiting: {fields['reason']}"
        case "yield":
            return f"releases {fields['given']} node(s): {fields['reason']}"
        case "yielded":
            how = {True: "has started", False: "has not started", None: "is gone"}[fields["started"]]
            return f"job {fields['job']}, for which this job released nodes, {how}: {fields['reason']}"
        case "unseen":
            return f"cannot read {fields['what']}: {fields['reason']}"
        case "store_failed":
            return f"the store of round {fields['round']} could not be opened: {fields['reason']}"
        case "stranger":
            return f"a connection from {fields['addr']} was refused: {fields['reason']}"
        case "drain":
            return f"asking the workers to save and stop: {fields['reason']}"
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
            kept, new = int(fields.get("kept", 0)), fields["warm"] + fields["cold"]
            started = [f"in place: {kept} of {kept + new} workers kept their process"] if kept else []
            if new:
                started.append(f"{fields['warm']} of {new} {'other ' * bool(kept)}workers were standbys{size}")
            return "; ".join([*started, *fields["why"]])
        case "failure":
            first = "failed" if fields["first"] else "failed too"
            return f"rank {fields['rank']} on {fields['node']} {first}: {fields['message']}"
        case "restart":
            return f"restart {fields['restarts']}: {fields['reason']}"
        case "verdict":
            return f"{fields['outcome']}: {fields['reason']}"
        case "withdrawn":
            return f"the verdict of {fields['node']} is withdrawn, as the run continues; it was: {fields['reason']}"
        case "take_over":
            return f"this node leads now: {fields['reason']}"
        case "abdicate":
            return f"this node no longer leads: {fields['reason']}"
        case _:
            others = {key: value for key, value in fields.items() if key not in {"time", "event"}}
            return f"{name}: " + ", ".join(f"{key} {value}" for key, value in others.items())
