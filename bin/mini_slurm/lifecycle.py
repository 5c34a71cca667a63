"""The subcommands `up` and `down`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

from mini_slurm import cgroups, site
from mini_slurm.cluster import USER, Cluster, Shape
from mini_slurm.daemons import start_controller, start_munged, start_slurmd, wait_usable
from mini_slurm.files import write_files
from mini_slurm.machines import start_machine, start_rack
from mini_slurm.packages import free_uid, install_packages, remove_policy
from mini_slurm.system import MiniSlurmError, check_root, say

CHECKOUT = Path(__file__).resolve().parents[2]


def up(cluster: Cluster, args: argparse.Namespace) -> int:
    started = time.time()
    check_root()
    shape = Shape(args.nodes, args.cpus_per_node, args.gpus_per_node, requested_shares(args.share), args.site)
    shape = replace(shape, slurm=installed(args.slurm))
    with cluster.lock():
        if cluster.is_up() and (saved := cluster.saved()) is not None:
            if saved[0] != shape:
                raise MiniSlurmError(f"a cluster of another shape is up, {saved[0]}: type  mini-slurm down  first")
            say(f"already up with {shape.nodes} nodes")
            return 0
        tear_down(cluster)
        if len(os.fsencode(cluster.state)) > 80:
            raise MiniSlurmError(f"--state {cluster.state}: expected at most 80 bytes, there are sockets in it")
        try:
            bring_up(cluster, shape)
        except BaseException:
            tear_down(cluster)
            raise
    say(f"up: {shape.nodes} nodes idle after {time.time() - started:.1f} s; try  mini-slurm exec -- sinfo")
    return 0


def requested_shares(paths: list[str] | None) -> tuple[str, ...]:
    shares = {os.path.realpath(path) for path in paths or [str(CHECKOUT)]}
    for path in sorted(shares):
        if not os.path.isdir(path):
            raise MiniSlurmError(f"--share {path}: no such directory")
        if os.stat(path).st_mode & 0o005 != 0o005:
            if paths:
                raise MiniSlurmError(f"--share {path}: {USER} may not enter it: type  chmod o+rx {path}")
            say(f"{path} is not shared, {USER} may not enter it: type  chmod o+rx {path}  if jobs need it")
            shares.remove(path)
    return tuple(sorted(shares))


def installed(prefix: str) -> str:
    """``prefix`` as an absolute path; empty for the packages' Slurm. Raises MiniSlurmError if no Slurm is there."""
    if not prefix:
        return ""
    for name in ("sbin/slurmctld", "sbin/slurmd", "bin/srun"):
        if not os.access(os.path.join(prefix, name), os.X_OK):
            raise MiniSlurmError(
                f"--slurm {prefix}: expected the prefix of an installed Slurm, but {name} is not there"
            )
    return os.path.realpath(prefix)


def bring_up(cluster: Cluster, shape: Shape) -> None:
    state, started = cluster.state, time.time()
    state.mkdir(mode=0o755)
    cluster.marker.touch()
    if shape.slurm:
        cluster.slurm_link.symlink_to(shape.slurm)
    install_packages(cluster, site=shape.site)
    uid = free_uid(state)
    write_files(cluster, shape, uid)
    if shape.site:
        site.write_files(state, shape)
    start_rack(cluster)
    start_machine(cluster, shape, "login")
    start_munged(cluster, "login")
    if shape.site:
        site.start_accounting(cluster)
    start_controller(cluster)
    for node in shape.names:
        start_machine(cluster, shape, node)
        start_slurmd(cluster, node)
    wait_usable(cluster, shape.names, started)
    (state / "state.new").write_text(json.dumps({"shape": asdict(shape), "uid": uid}))
    (state / "state.new").replace(cluster.marker)


def down(cluster: Cluster, _: argparse.Namespace) -> int:
    with cluster.lock():
        say(f"removed {cluster.state}" if tear_down(cluster) else "nothing to remove")
    return 0


def tear_down(cluster: Cluster) -> bool:
    """Remove everything that `up` made, even if it failed half way. Returns False if there was nothing."""
    if not cluster.state.exists():
        return False
    if not cluster.marker.exists() and any(cluster.state.iterdir()):
        raise MiniSlurmError(f"{cluster.state} is not mini-slurm's: name another directory with --state")
    cluster.power_off("rack")
    cgroups.remove(cluster.state)
    remove_policy()
    for entry in set(cluster.state.iterdir()) - {cluster.marker}:
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    cluster.marker.unlink(missing_ok=True)
    cluster.state.rmdir()
    return True
