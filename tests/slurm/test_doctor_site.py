"""elastic-hpc doctor on a real site, as its unprivileged user."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import Cluster, wait_for

HPC = str(Path(sys.executable).with_name("elastic-hpc"))


def doctor(cluster: Cluster, folder: Path, *options: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """The findings by topic."""
    done = cluster.exec([HPC, "doctor", "--json", *options], cwd=folder, timeout=150, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    body = json.loads(done.stdout)
    return {finding["about"]: finding for finding in body["findings"]}


def assert_nothing_is_left(cluster: Cluster, folder: Path) -> None:
    assert not list(folder.iterdir())
    wait_for("an empty queue", lambda: not cluster.exec(["squeue", "--noheader"]).stdout.strip())


def test_healthy_nodes_are_reported_as_healthy_and_nothing_is_left_behind(fresh: Cluster, folder: Path) -> None:
    found = doctor(fresh, folder, "--run", "--nodes", "4")
    well = ("requeue", "nodes", "ports", "names", "file system", "clocks", "software", "KillWait", "preemption")
    assert [found[about]["level"] for about in well] == ["ok"] * len(well), found
    assert found["nodes"]["found"] == "n1, n2, n3, n4 reported"
    assert found["GPUs"]["level"] == "note"
    assert_nothing_is_left(fresh, folder)


def test_a_port_that_is_closed_on_one_node_is_reported_with_the_node(fresh: Cluster, folder: Path) -> None:
    closed = ["ipproto", "tcp", "dport", "29400-29499", "prohibit"]
    fresh.mini("exec", "--root", "--node", "n3", "--", "ip", "rule", "add", *closed)
    try:
        found = doctor(fresh, folder, "--run", "--nodes", "3", "--", "--nodelist=n1,n2,n3", code=1)
    finally:
        fresh.mini("exec", "--root", "--node", "n3", "--", "ip", "rule", "del", *closed)
    assert found["ports"]["level"] == "bad"
    assert re.match(r"n3 cannot reach n1 \(10\.213\.0\.1:29400 Permission denied", found["ports"]["found"])
    assert "n1 cannot" not in found["ports"]["found"]
    assert found["nodes"]["level"] == "ok"
    assert_nothing_is_left(fresh, folder)


def test_with_one_open_and_one_closed_network_the_site_file_gets_the_open_interface(
    fresh: Cluster, folder: Path
) -> None:
    for node in ("n1", "n2"):
        closed = ["to", "10.213.0.1" if node == "n2" else "10.213.0.2", "ipproto", "tcp", "dport", "29400-29499"]
        fresh.mini("exec", "--root", "--node", node, "--", "ip", "rule", "add", *closed, "prohibit")
    try:
        found = doctor(
            fresh, folder, "--run", "--partition", "low", "--write-site", "site.toml", "--", "--nodelist=n1,n2"
        )
    finally:
        for node in ("n1", "n2"):
            fresh.mini("exec", "--root", "--node", node, "--", "ip", "rule", "del", "ipproto", "tcp", "prohibit")
    assert found["addresses"]["config"] == {"interface": "ib0"}
    written = (folder / "site.toml").read_text()
    assert 'interface = "ib0"' in written
    assert 'partition = "low"' in written
    job = fresh.exec(
        ["env", "ELASTIC_HPC_CONFIG=site.toml", HPC.replace("elastic-hpc", "elastic-sbatch"), "--dry-run", "--nodes=2",
         "-m", "json.tool"],
        cwd=folder,
    )  # fmt: skip
    assert "--interface ib0" in job.stdout


def test_a_folder_that_a_node_lacks_is_reported_with_the_nodes_last_output(fresh: Cluster, folder: Path) -> None:
    fresh.mini("exec", "--root", "--node", "n2", "--", "mount", "-t", "tmpfs", "tmpfs", str(folder))
    try:
        found = doctor(fresh, folder, "--run", "--", "--nodelist=n1,n2", code=1)
    finally:
        fresh.mini("exec", "--root", "--node", "n2", "--", "umount", str(folder))
    assert found["nodes"]["level"] == "bad"
    assert re.match(r"n2 never reported: .*elastic-logs/doctor\.0 is not there", found["nodes"]["found"])
    assert_nothing_is_left(fresh, folder)


def test_ctrl_c_while_the_job_waits_for_a_node_cancels_the_job_and_leaves_nothing(fresh: Cluster, folder: Path) -> None:
    fresh.mini("exec", "--root", "--", "scontrol", "update", "NodeName=n4", "State=DRAIN", "Reason=test")
    try:
        command = fresh.command([HPC, "doctor", "--run", "--nodes", "4"], cwd=folder)
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as waits:
            assert waits.stderr
            output = ""
            while not re.search(r"job \d+ waits in the queue: \w+", output):
                line = waits.stderr.readline()
                assert line, output
                output += line
            waits.send_signal(signal.SIGINT)
            assert waits.wait(60) == 130
    finally:
        fresh.mini("exec", "--root", "--", "scontrol", "update", "NodeName=n4", "State=RESUME")
    assert_nothing_is_left(fresh, folder)


def test_more_nodes_than_the_partition_has_are_refused_immediately(fresh: Cluster, folder: Path) -> None:
    found = doctor(fresh, folder, "--run", "--nodes", "5", code=1)
    queued = "--nodes 5: the job would never start (PartitionNodeLimit)"  # Slurm 22.05 accepts the job
    refused = "Slurm refused the job: Batch job submission failed: Requested node configuration is not available"
    assert any(text in found["nodes"]["found"] for text in (queued, refused))
    assert_nothing_is_left(fresh, folder)
