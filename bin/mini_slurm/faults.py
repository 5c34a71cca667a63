"""The subcommands `kill`, `cut` and `heal`, which break and repair nodes, and `status`."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

from mini_slurm.cluster import USER, Cluster
from mini_slurm.daemons import daemon_runs, node_states, start_slurmd, update_node, wait_usable
from mini_slurm.machines import has_links, set_links, start_machine


def links_down(cluster: Cluster, args: argparse.Namespace) -> int:
    """`cut`, and the first half of `kill`."""
    cluster.require_node(args.node)
    set_links(cluster, args.node, "down")
    moment = time.time()
    if args.command_name == "kill":
        cluster.power_off(args.node)
    print(f"{moment:.6f} {args.node} {args.command_name}", flush=True)
    return 0


def heal(cluster: Cluster, args: argparse.Namespace) -> int:
    node, started = args.node, 0.0
    shape = cluster.require_node(node, powered=False)
    with cluster.lock():
        if cluster.init_of(node) is None:
            # Slurm gives up a node's jobs when the node's uptime shows a reboot. Our nodes share the uptime of this
            # machine, so we set the node DOWN.
            update_node(cluster, node, "State=DOWN", "Reason=lost power")
            start_machine(cluster, shape, node)
        set_links(cluster, node, "up")
        if not daemon_runs(cluster, node, "slurmd"):
            started = time.time()
            start_slurmd(cluster, node)
        state, _ = node_states(cluster).get(node, ("", 0))
        if "DOWN" in state or "FAIL" in state:
            update_node(cluster, node, "State=RESUME", check=False)
        wait_usable(cluster, [node], started)
    print(f"{time.time():.6f} {node} heal", flush=True)
    return 0


def status(cluster: Cluster, args: argparse.Namespace) -> int:
    saved = cluster.saved() if cluster.is_up() else None
    report: dict[str, object] = {"up": saved is not None, "state": str(cluster.state)}
    if saved is not None:
        states, ports = node_states(cluster), cluster.ports()
        names = ("munged", "slurmctld", *(("slurmdbd", "mariadbd") if saved[0].site else ()))
        daemons = {name: daemon_runs(cluster, "login", name) for name in names}
        nodes = {
            node: {
                "slurm": states.get(node, ("unknown", 0))[0],
                "power": cluster.init_of(node) is not None,
                "links": has_links(node, ports),
                "slurmd": daemon_runs(cluster, node, "slurmd"),
                "init_pid": cluster.init_of(node),
            }
            for node in saved[0].names
        }
        jobs = cluster.slurm("squeue", "-h", "-o", "%i %T %j %N", check=False).splitlines()
        report |= {"user": USER, "uid": saved[1], "home": str(cluster.home), "slurm_conf": str(cluster.conf)}
        report |= {"shape": asdict(saved[0]), "daemons": daemons, "nodes": nodes, "jobs": jobs}
    if args.json:
        print(json.dumps(report, indent=1))
    elif saved is None:
        print(f"not up: {cluster.state}" + (" has leftovers: mini-slurm down" if cluster.state.exists() else ""))
    else:
        print(f"up: {cluster.state}, user {USER}, home {cluster.home}")
        print("login:", ", ".join(f"{name} {'runs' if runs else 'DEAD'}" for name, runs in daemons.items()))
        for node, facts in nodes.items():
            words = [f"{what} {'yes' if facts[what] else 'NO'}" for what in ("power", "links", "slurmd")]
            print(f"{node}: {facts['slurm']}, {', '.join(words)}, init {facts['init_pid']}")
        print("\n".join(f"job {line}" for line in jobs) or "no jobs")
    return 0 if saved is not None else 3
