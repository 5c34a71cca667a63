"""The cluster of ``mini-slurm up --site`` behaves as documented."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import Cluster, started, wait_for
from on_demand import ON_DEMAND

CONFINED = """\
echo cores $(sed -n 's/Cpus_allowed_list:[[:space:]]*//p' /proc/self/status)
head -c 1 {gpu} 2>&1
head -c 1 /dev/zero | wc -c
"""
# Runs until it is killed: a job that ends on its own after its grace may be TIMEOUT, as Slurm has moved its end there.
WAITS = """\
#!/bin/bash
note() { echo "$1" >>"waits.sh.$SLURM_JOB_ID"; }
trap 'note TERM' TERM
trap 'note USR1' USR1
trap 'kill %1' EXIT
note start
sleep 300 &
while :; do wait; done
"""


@pytest.fixture(scope="module")
def cluster(site: Cluster) -> Cluster:
    return site


def root(cluster: Cluster, *argv: str) -> str:
    return cluster.mini("exec", "--root", "--", *argv).stdout


def ended(cluster: Cluster, job: str) -> list[str]:
    """State and exit code of each of the job's accounting records, as soon as the job's end is recorded."""

    def look() -> list[str] | None:
        show = ["sacct", "-X", "-n", "-P", "--duplicates", "--jobs", job, "--format=state,exitcode,end"]
        records = cluster.exec(show).stdout.splitlines()
        known = records and not any(record.endswith("Unknown") for record in records)
        return [record.rpartition("|")[0] for record in records] if known else None

    return wait_for(f"the end of job {job} in the accounting", look)


def forbids_shrinking(cluster: Cluster, **settings: str) -> contextlib.AbstractContextManager[None]:
    """``configured`` with ``disable_job_shrink`` added."""
    before = re.search(r"^SchedulerParameters=(.*)", (cluster.state / "etc/slurm/slurm.conf").read_text(), re.MULTILINE)
    assert before
    return configured(cluster, SchedulerParameters=f"{before[1]},disable_job_shrink", **settings)


@contextlib.contextmanager
def configured(cluster: Cluster, **settings: str) -> Iterator[None]:
    """slurm.conf with other settings, within the block."""
    conf = cluster.state / "etc/slurm/slurm.conf"
    before = after = conf.read_text()
    for name, value in settings.items():
        after = f"{name}={value}\n" + re.sub(rf"^{name}=.*\n", "", after, flags=re.MULTILINE)
    try:
        for text in (after, before):
            cluster.slurmctld("stop")
            conf.write_text(text)
            cluster.slurmctld("start")
            root(cluster, "scontrol", "reconfigure")  # slurmd too
            if text is after:
                yield
    finally:
        conf.write_text(before)


def test_slurm_runs_with_the_settings_of_a_site(fresh: Cluster) -> None:
    shown = dict(re.findall(r"^(\w+) += (.*?) *$", root(fresh, "scontrol", "show", "config"), re.MULTILINE))
    expected = {
        "ProctrackType": "proctrack/cgroup",
        "TaskPlugin": "task/cgroup,task/affinity",
        "JobAcctGatherType": "jobacct_gather/cgroup",
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageEnforce": "associations,limits,qos",
        "SlurmdTimeout": "300 sec",
        "KillWait": "30 sec",
        "PrologFlags": "Alloc,Contain",
        "PrivateData": "jobs,nodes",
        "LaunchParameters": "use_interactive_step",
    }
    assert {name: shown[name] for name in expected} == expected


def test_a_job_is_confined_to_its_cores_devices_and_memory(fresh: Cluster) -> None:
    script = CONFINED.format(gpu=fresh.state / "gpus/gpu0")
    without, granted = (
        fresh.exec(["srun", "-N1", "-t1", "-c1", *gpus, "sh", "-c", script]).stdout for gpus in ([], ["--gres=gpu:1"])
    )
    assert re.search(r"^cores \d\n.*Operation not permitted\n1\n$", without, re.DOTALL), without
    assert re.search(r"^cores \d\n.*No such device or address\n1\n$", granted, re.DOTALL), granted  # it has no driver
    eats = ["srun", "-N1", "-t1", "--mem=100", "/usr/bin/python3", "-c", "bytearray(300 << 20)"]
    assert "Out Of Memory" in fresh.exec(eats, check=False).stderr


def ran_at(cluster: Cluster, name: str, job: str) -> int | None:
    """When the prolog or epilog of a job had waited, as the script has recorded, in seconds since the epoch."""
    log = cluster.state / f"log/{name}.log"
    found = re.search(rf"^(\d+) n\d {job}$", log.read_text() if log.exists() else "", re.MULTILINE)
    return int(found[1]) if found else None


def test_prolog_epilog_and_task_prolog_wait_as_long_as_a_test_sets(fresh: Cluster) -> None:
    seconds = {"prolog": 2, "task_prolog": 1, "epilog": 3}
    for name, delay in seconds.items():
        (fresh.state / f"site/{name}_delay").write_text(str(delay))
    try:
        job = fresh.exec(
            [
                "sbatch",
                "-t1",
                "-o",
                "/dev/null",
                "--parsable",
                "--wrap",
                "srun printenv SITE_SCRATCH >scratch; date +%s",
            ],
            cwd=fresh.home,
        ).stdout.strip()
        assert ended(fresh, job) == ["COMPLETED|0:0"]
        times = {name: wait_for(f"the {name}", partial(ran_at, fresh, name, job)) for name in ("prolog", "epilog")}
    finally:
        for name in seconds:
            (fresh.state / f"site/{name}_delay").unlink()
    assert (fresh.home / "scratch").read_text() == f"/tmp/{job}\n"
    assert times["epilog"] - times["prolog"] >= seconds["task_prolog"] + seconds["epilog"]


def test_requests_that_the_site_forbids_are_refused(fresh: Cluster) -> None:
    def refused(*options: str) -> str:
        done = fresh.exec(["srun", *options, "true"], check=False)
        assert done.returncode != 0
        return done.stderr

    assert "site: jobs run for a week at most" in refused("--time=8-0")
    assert "QOSMaxNodePerJobLimit" in refused("--time=1", "--qos=small", "--nodes=3")
    assert "Invalid account" in refused("--time=1", "--account=nobodys")
    assert fresh.mini("exec", "--root", "--", "srun", "--time=1", "true", check=False).returncode != 0
    rewritten = fresh.exec(["srun", "sh", "-c", "squeue -h -o %l -j $SLURM_JOB_ID"])
    assert rewritten.stdout == "1:00:00\n"
    assert "set to one hour" in rewritten.stderr


def test_a_limit_of_the_association_keeps_a_job_waiting(fresh: Cluster) -> None:
    limit = ["sacctmgr", "--immediate", "modify", "user", "minislurm", "set"]
    root(fresh, *limit, "MaxJobs=1")
    try:
        first, second = (
            fresh.exec(["sbatch", "-t1", "-o", "/dev/null", "--parsable", "--wrap", "sleep 60"]).stdout.strip()
            for _ in range(2)
        )
        wait_for("the limit as reason", lambda: fresh.job_field(second, "Reason") == "AssocMaxJobsLimit")
        assert fresh.job_field(first, "JobState") == "RUNNING"
    finally:
        root(fresh, *limit, "MaxJobs=-1")


def test_nodes_and_the_jobs_of_others_are_private(fresh: Cluster) -> None:
    refused = fresh.exec(["scontrol", "show", "node", "n1"], check=False)
    assert (refused.returncode, "denied" in refused.stdout + refused.stderr) == (1, True)
    job = fresh.exec(["sbatch", "-t1", "-o", "/dev/null", "--parsable", "--wrap", "sleep 60"]).stdout.strip()
    assert fresh.exec(["squeue", "-h", "-o", "%i"]).stdout.split() == [job]
    assert root(fresh, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "squeue", "-h") == ""


@pytest.mark.parametrize("by", ["partition", pytest.param("qos", marks=ON_DEMAND)])
def test_preemption_warns_waits_and_requeues_or_cancels(fresh: Cluster, folder: Path, by: str) -> None:
    """For partitions without preempt_send_user_signal, for QOS with it."""
    script = folder / "waits.sh"
    script.write_text(WAITS)
    script.chmod(0o755)
    sends = ["-t5", "--exclusive", "-o", "/dev/null", "--parsable", "--signal=B:USR1@60"]
    low = {}
    with contextlib.ExitStack() as stack:
        qos = {"PreemptType": "preempt/qos", "SlurmctldParameters": "preempt_send_user_signal"}
        stack.enter_context(configured(fresh, KillWait="2", **(qos if by == "qos" else {})))
        for node, name in (("n1", "low"), ("n2", "lowcancel")):
            grace = "GraceTime={}"
            change = {
                "partition": ["scontrol", "update", f"PartitionName={name}", grace],
                "qos": ["sacctmgr", "--immediate", "modify", "qos", name, "set", grace],
            }[by]
            stack.callback(root, fresh, *(word.format(10) for word in change))
            root(fresh, *(word.format(2) for word in change))
            low[name] = fresh.exec(
                ["sbatch", *sends, "-w", node, f"--{by}={name}", str(script)], cwd=folder
            ).stdout.strip()
        notes = {name: folder / f"waits.sh.{job}" for name, job in low.items()}
        wait_for("both to run", lambda: all(path.exists() for path in notes.values()))
        fresh.exec(["srun", "-t1", "--exclusive", "-w", "n[1-2]", f"--{by}=high", "true"])
        assert ended(fresh, low["lowcancel"])[-1].startswith("PREEMPTED")
        wait_for("the requeue", lambda: fresh.job_field(low["low"], "Restarts") == "1")
        first = "USR1" if by == "qos" else "TERM"
        assert {path.read_text().split()[1] for path in notes.values()} == {first}
        fresh.reset()


def test_the_health_check_drains_a_sick_node_and_brings_it_back(fresh: Cluster) -> None:
    def reason() -> str:
        return root(fresh, "sinfo", "-h", "-N", "-n", "n4", "-p", "main", "-o", "%T %E").strip()

    (fresh.state / "site/sick-n4").touch()
    try:
        wait_for("n4 to be drained", lambda: reason() == "drained health check: sick")
    finally:
        (fresh.state / "site/sick-n4").unlink()
    wait_for("n4 to be back", lambda: reason() == "idle none")


def test_salloc_gives_a_shell_on_the_first_node(fresh: Cluster) -> None:
    typed = "echo 'hostname; exit' | script -qec 'salloc -t1 -w n3' /dev/null"
    assert re.search(r"^n3\r?$|l\r?n3\r?$", fresh.exec(["sh", "-c", typed]).stdout, re.MULTILINE)


def test_down_leaves_no_process_file_or_control_group() -> None:
    directory = tempfile.mkdtemp(prefix="mini-")
    state = Path(directory) / "state"
    own = f"mini-slurm-{zlib.crc32(os.fsencode(state)):08x}"  # other tests have clusters of their own

    def groups() -> list[Path]:
        return list(Path("/sys/fs/cgroup").glob(f"*/{own}"))

    def processes() -> list[str]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found += [entry.parent.name] if os.fsencode(directory) in entry.read_bytes() else []
        return found

    try:
        with started(state, "--site", "--nodes", "1") as made:
            made.exec(["sbatch", "-t1", "-o", "/dev/null", "--wrap", "srun sleep 60"])
            wait_for("its groups", lambda: list(Path("/sys/fs/cgroup/freezer").glob(f"{own}/n1/slurm*/uid*/job*")))
            assert groups()
            assert processes()
        assert not groups()
        assert not os.listdir(directory)
        wait_for("the end of its processes", lambda: not processes())
    finally:
        shutil.rmtree(directory)
