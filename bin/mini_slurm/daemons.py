"""The daemons munged, slurmctld and slurmd, and what Slurm says of its nodes."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from mini_slurm import cgroups
from mini_slurm.cluster import Cluster
from mini_slurm.system import MiniSlurmError, say

DEADLINE_S = 90.0


def start_munged(cluster: Cluster, machine: str) -> None:
    """Each machine has a munged of its own. A munged accepts a credential only once. Several slurmd can share
    a munged only if they were built with multiple-slurmd, as Debian's is.
    """
    if daemon_runs(cluster, machine, "munged"):
        return
    munge = {"key-file": "munge.key", "socket": "run/munge/socket", "pid-file": f"run/munged-{machine}.pid"}
    munge |= {"log-file": f"log/munged-{machine}.log", "seed-file": f"munge/{machine}/seed"}
    options = [f"--{option}={cluster.state / path}" for option, path in munge.items()]
    cluster.inside(machine, "munged", "--force", *options)


def start_controller(cluster: Cluster) -> None:
    cluster.inside("login", "slurmctld", "-f", str(cluster.conf))


def start_slurmd(cluster: Cluster, node: str) -> None:
    start_munged(cluster, node)
    join = cgroups.joining(cluster.state, node)
    cluster.inside(node, *join, "slurmd", "-N", node, "-f", str(cluster.conf))


def daemon_runs(cluster: Cluster, machine: str, daemon: str) -> bool:
    try:
        pid = int((cluster.state / "run" / f"{daemon}-{machine}.pid").read_text())
        return Path(f"/proc/{cluster.init_of(machine)}/root/proc/{pid}/comm").read_text().strip() == daemon
    except (OSError, ValueError):
        return False


def update_node(cluster: Cluster, node: str, *settings: str, check: bool = True) -> None:
    cluster.slurm("scontrol", "update", f"NodeName={node}", *settings, check=check)


def node_states(cluster: Cluster) -> dict[str, tuple[str, int]]:
    """State in Slurm's words and start time of slurmd (epoch seconds, 0 before it registers), by node.

    Not from sinfo: in 22.05 that keeps showing a node that ran a job as mixed* after Slurm has set it DOWN.
    """
    text = cluster.slurm("scontrol", "--oneliner", "show", "nodes", check=False)
    nodes = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in text.splitlines()]
    starts = [int(node["SlurmdStartTime"]) if node.get("SlurmdStartTime", "").isdecimal() else 0 for node in nodes]
    return {node["NodeName"]: (node["State"], start) for node, start in zip(nodes, starts, strict=True) if node}


def wait_usable(cluster: Cluster, nodes: Sequence[str], registered_since_s: float = 0.0) -> None:
    """Wait until jobs can run on all `nodes`, whose slurmd's registered at or after `registered_since_s` (epoch).

    A returning node may drain itself only then, because it could not report the end of a task.
    """
    deadline, shown = time.monotonic() + DEADLINE_S, ""
    while True:
        all_states = node_states(cluster)
        states = {node: all_states.get(node, ("unknown", 0)) for node in nodes}
        words = [state if start >= int(registered_since_s) else "unregistered" for state, start in states.values()]
        if all(word in {"IDLE", "MIXED", "ALLOCATED"} for word in words):
            return
        text = " ".join(f"{node}={word}" for node, word in zip(nodes, words, strict=True))
        if text != shown:
            say(f"waiting for the nodes: {text}")
            shown = text
        for node, (state, _) in states.items():
            if "DRAIN" in state:
                update_node(cluster, node, "State=RESUME", check=False)
        if time.monotonic() > deadline:
            raise MiniSlurmError(f"after {DEADLINE_S:.0f} s: {text}; the logs say:\n{cluster.log_tail()}")
        time.sleep(0.1)
