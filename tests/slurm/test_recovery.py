"""Training survives real losses on a real Slurm, within the allocation or by a requeue."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import COUNTS, ROOT, Cluster, Job, wait_for
from on_demand import ON_DEMAND

Submit = Callable[..., Job]
EVERY = 10
AUDITED = ROOT / "tests" / "unit" / "audited"


def finish(job: Job, deadline: float = 150, lost: Sequence[str] = ()) -> None:
    """Wait until the job is completed; its training must have done all steps. The job completes only when Slurm has
    noticed the loss of the nodes ``lost``.
    """
    (job.folder / "hold").unlink(missing_ok=True)
    if lost:
        job.wait_event("verdict")
        job.cluster.wait_noticed(*lost)
    assert job.wait_state("COMPLETED", "FAILED", "CANCELLED", deadline=deadline) == "COMPLETED", job.output()[-3000:]
    job.assert_steps_contiguous(EVERY)
    assert job.verdict()["outcome"] == "finished"


@pytest.fixture
def counts(submit: Submit, folder: Path) -> Submit:
    """Submit counts.py, which runs until ``finish``."""

    def do(*options: str) -> Job:
        (folder / "hold").touch()
        return submit(*options, script=COUNTS)

    return do


@ON_DEMAND
def test_a_node_that_cannot_reach_the_leader_is_excluded_and_avoided_in_the_next_run(
    counts: Submit, fresh: Cluster
) -> None:
    blocked = ["ipproto", "tcp", "dport", "29432", "prohibit"]
    fresh.mini("exec", "--root", "--node", "n3", "--", "ip", "rule", "add", *blocked)
    try:
        job = counts("--nodes", "2:3", "--rdzv-conf", "last_call_timeout=3", "--grace", "5")
        assert job.wait_event("round")["nodes"] == ["n1", "n2"]
        wait_for("n3 to say so", (job.run_dir / "unfit.n3.json").exists)
        wait_for("the user to be told", lambda: "n3]: the leader cannot be reached: n1 at 10.213.0.1" in job.output())
        fresh.exec([str(Path(sys.executable).with_name("elastic-hpc")), "drain", str(job.run_dir)])
        wait_for("a start without n3", lambda: job.events("start")[1:])
        assert fresh.job_field(job.id, "ExcNodeList") == "n3"
        finish(job)
    finally:
        fresh.mini("exec", "--root", "--node", "n3", "--", "ip", "rule", "del", *blocked)
    assert job.events("round")[-1]["nodes"] == ["n1", "n2", "n4"]


def test_the_world_has_all_granted_nodes_and_every_rank_sees_the_same_restart_count(
    submit: Submit, folder: Path
) -> None:
    script = folder / "report.py"
    script.write_text(
        "import json, os, pathlib, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "keep = 'RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR TORCHELASTIC_RESTART_COUNT OMP_NUM_THREADS SLURMD_NODENAME'\n"
        "seen = {k: os.environ[k] for k in keep.split()}\n"
        "seen['hidden'] = [k for k in ('SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID') if k in os.environ]\n"
        "run = pathlib.Path(os.environ['ELASTIC_HPC_RUN_DIR'])\n"
        "(run / f\"seen.{os.environ['ELASTIC_HPC_ROUND']}.{os.environ['RANK']}\").write_text(json.dumps(seen))\n"
        "dist.barrier()\n"
        "if os.environ['ELASTIC_HPC_ROUND'] == '1': os._exit(3 if os.environ['RANK'] == '1' else 0)\n"
    )
    job = submit("--nodes", "2:4", "--nproc-per-node", "2", script=script)
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    for round, restarts in ((1, "0"), (2, "1")):
        seen = [json.loads(path.read_text()) for path in job.run_dir.glob(f"seen.{round}.*")]
        assert sorted(int(rank["RANK"]) for rank in seen) == list(range(8))
        assert {(rank["WORLD_SIZE"], rank["TORCHELASTIC_RESTART_COUNT"], rank["MASTER_ADDR"]) for rank in seen} == {
            ("8", restarts, "10.213.0.1")
        }
        assert all(rank["hidden"] == [] for rank in seen)
        assert {rank["OMP_NUM_THREADS"] for rank in seen} == {"1"}
        assert [rank["SLURMD_NODENAME"] for rank in sorted(seen, key=lambda rank: int(rank["RANK"]))] == [
            "n1",
            "n1",
            "n2",
            "n2",
            "n3",
            "n3",
            "n4",
            "n4",
        ]
    assert job.events("failure")[0]["message"] == "exit code 3"


def test_a_job_starts_with_min_nodes_if_the_others_are_busy(submit: Submit, fresh: Cluster, folder: Path) -> None:
    fresh.exec(["sbatch", "--nodes=2", "--exclusive", "--nodelist=n[3-4]", "--wrap=srun sleep 600"], cwd=folder)
    wait_for("the other job", lambda: "RUNNING" in fresh.exec(["squeue", "--format=%T"]).stdout)
    job = submit("--nodes", "2:4", script=COUNTS)
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    assert job.worlds() == [2]


SETUP = "touch set_up; until [ -e go ]; do sleep 0.1; done"


@ON_DEMAND
def test_a_job_starts_with_the_remaining_nodes_when_slurm_takes_a_node_from_it_before_the_agents_start(
    counts: Submit, fresh: Cluster, folder: Path
) -> None:
    """For example during a long --setup."""
    job = counts("--nodes", "2:4", "--setup", SETUP)
    wait_for("the setup", (folder / "set_up").exists)
    fresh.mini("kill", "n4")
    fresh.wait_noticed("n4")
    (folder / "go").touch()
    job.wait_steps(20)
    finish(job)
    assert job.worlds() == [3]


@ON_DEMAND
def test_a_job_is_requeued_without_a_node_that_srun_cannot_reach(counts: Submit, fresh: Cluster, folder: Path) -> None:
    """Slurm believes that the node is alive, and srun ends the agents on the other nodes."""
    job = counts("--nodes", "2:4", "--setup", SETUP)
    wait_for("the setup", (folder / "set_up").exists)
    fresh.mini("kill", "n4")
    (folder / "go").touch()
    wait_for("the requeue", lambda: fresh.job_field(job.id, "Restarts") == "1")
    assert "requeue: srun could not start an agent on n4, and has ended the agents on the other nodes" in job.output()
    job.wait_steps(20)
    finish(job)
    assert job.worlds() == [3]
    assert (job.verdict()["run"], job.verdict()["requeues"]) == (1, 1)


def test_training_continues_from_its_checkpoint_when_a_worker_crashes_and_then_a_node_loses_power(
    submit: Submit, fresh: Cluster
) -> None:
    job = submit("--nodes", "2:4", args=["--checkpoint-every", str(EVERY), "--epochs", "6"])
    job.wait_steps(25)
    os.kill(fresh.running("train_digits.py", "n2")[0], signal.SIGKILL)
    job.wait_steps(15, round=2)
    fresh.mini("kill", "n4")
    finish(job)
    assert float(job.worker_output().rpartition("accuracy ")[2].split()[0]) > 0.9
    assert job.worlds() == [4, 4, 3]
    assert "killed by SIGKILL" in job.events("failure")[0]["message"]
    assert job.events("lost")[0]["node"] == "n4"


def test_below_min_the_job_is_requeued_keeps_its_counters_and_finishes(counts: Submit, fresh: Cluster) -> None:
    job = counts("--nodes", "3:4")
    job.wait_steps(25)
    for node in ("n3", "n4"):
        fresh.mini("cut", node)
    assert job.wait_event("verdict")["outcome"] == "requeue"
    for node in ("n3", "n4"):  # before Slurm restarts the job on both nodes, as it has not noticed the cut
        fresh.mini("heal", node)
    wait_for("the requeue", lambda: fresh.job_field(job.id, "Restarts") == "1")
    finish(job)
    assert job.worlds() == [4, 4]
    last = job.verdict()
    assert (last["run"], last["requeues"], last["restarts"]) == (1, 1, 1)
    assert [step["restart"] for step in job.steps()][-1] == 1
    assert [event["run"] for event in job.events("start")] == [0, 1]


def test_when_the_restarts_are_used_up_the_job_ends_with_a_reason(submit: Submit, folder: Path) -> None:
    script = folder / "broken.py"
    script.write_text("import os\nos.kill(os.getpid(), 9)\n")
    job = submit("--nodes", "2", "--max-restarts", "2", script=script)
    assert job.wait_state("COMPLETED", "FAILED") == "FAILED"
    assert len(job.events("round")) == 3
    assert "killed by SIGKILL; all 2 restarts (--max-restarts) are used up" in job.verdict()["reason"]
    assert job.verdict()["cause"] == "budget"
    assert "all 2 restarts (--max-restarts) are used up" in job.output()


def test_the_same_failure_without_progress_ends_the_job_with_its_traceback(submit: Submit, folder: Path) -> None:
    script = folder / "broken.py"
    script.write_text("def load():\n    raise ValueError('no such data set')\nload()\n")
    job = submit("--nodes", "2", script=script)
    assert job.wait_state("COMPLETED", "FAILED") == "FAILED"
    assert len(job.events("round")) == 2
    verdict = job.verdict()
    assert "ValueError: no such data set; the same failure as before, without progress" in verdict["reason"]
    assert verdict["cause"] == "exception"
    assert "in load\n" in verdict["failure"]["traceback"]
    assert "in load\n" in job.output()


def test_a_node_that_is_the_only_one_on_which_the_script_fails_is_excluded_and_the_job_completes_elsewhere(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    script = folder / "train.py"
    script.write_text(
        "import os, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "if os.environ['SLURMD_NODENAME'] == 'n2':\n"
        "    raise RuntimeError('CUDA error: unspecified launch failure')\n"
        "dist.all_reduce(torch.ones(1))\n"
        "dist.destroy_process_group()\n"
    )
    job = submit("--nodes", "2", script=script)
    assert job.wait_state("COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", job.output()[-3000:]
    *before, last = [event["nodes"] for event in job.events("round")]
    assert before == [["n1", "n2"]] * 2
    assert "n2" not in last
    assert [event["node"] for event in job.events("barred")] == ["n2"]
    assert fresh.job_field(job.id, "ExcNodeList") == "n2"
    assert "nodes that failed are avoided: n2" in job.output()


def test_the_next_node_takes_over_when_the_head_loses_power_and_the_job_completes(
    counts: Submit, fresh: Cluster, folder: Path
) -> None:
    audit, audited = folder / "audit", Path(shutil.copytree(AUDITED, folder / "audited"))
    for path in (audited, *audited.iterdir()):  # the job's user can read them, whatever the umask
        path.chmod(0o755)
    job = counts("--nodes", "2:4", "--setup", f"export PYTHONPATH={audited} AUDIT_LOG={audit}")
    after = fresh.exec(
        ["sbatch", "--parsable", f"--dependency=afterok:{job.id}", "--wrap=true"], cwd=folder
    ).stdout.strip()
    job.wait_steps(25)
    fresh.mini("kill", "n1")
    finish(job, deadline=240, lost=["n1"])
    assert job.worlds() == [4, 3]
    assert fresh.job_field(job.id, "Restarts") == "1"  # only for Slurm's record
    (taken,) = job.events("take_over")
    assert taken["reason"] == "n1 lost: no heartbeat for 5 s"
    assert [event["leader"] for event in job.events("round")] == ["n1", "n2"]
    wait_for("the dependent job", lambda: fresh.job_field(after, "JobState") == "COMPLETED", 60)
    assert "this node leads now" in (job.run_dir / "logs" / "0.agent-n2.log").read_text()
    assert set(audit.read_text().splitlines()) == {"an event loop began"}, "no control thread touches a file"


@ON_DEMAND
def test_nothing_keeps_the_allocation_when_the_node_that_ends_the_job_is_lost_too(
    counts: Submit, fresh: Cluster
) -> None:
    job = counts("--nodes", "2:4")
    job.wait_steps(15)
    fresh.mini("kill", "n1")
    (job.folder / "hold").unlink()
    job.wait_event("verdict")
    wait_for("the deputy", lambda: fresh.processes("--deputy-of", "n3"))
    fresh.mini("kill", "n2")
    fresh.wait_noticed("n1", "n2")
    job.wait_state("PENDING")
    # the deputy's step lingers, because its srun is lost too, so Slurm refuses the early start: do not wait for it
    fresh.mini("exec", "--root", "--", "scontrol", "update", f"JobId={job.id}", "StartTime=now")
    finish(job)


@pytest.mark.parametrize(("nodes", "lost"), [(2, ["n1"]), pytest.param(4, ["n1", "n2"], marks=ON_DEMAND)])
def test_when_half_of_the_nodes_lose_power_one_survivor_requeues_the_job(
    counts: Submit, fresh: Cluster, nodes: int, lost: list[str]
) -> None:
    job = counts("--nodes", f"1:{nodes}")
    job.wait_steps(25)
    for node in lost:
        fresh.mini("kill", node)
    wait_for("one of them to act", lambda: list(job.run_dir.glob("turn.0.*")))
    fresh.wait_noticed(*lost)
    wait_for("the requeue", lambda: fresh.job_field(job.id, "Restarts") == "1", 120)
    finish(job, deadline=240)
    assert [event["run"] for event in job.events("start")] == [0, 1]
    assert not set(lost) & set(job.events("round")[-1]["nodes"])
    assert len(list(job.run_dir.glob("turn.0.*"))) == 1


def test_a_cancelled_job_stays_cancelled_and_leaves_no_process(counts: Submit, fresh: Cluster) -> None:
    job = counts("--nodes", "2:4")
    job.wait_steps(5)
    fresh.exec(["scancel", job.id])
    job.wait_state("CANCELLED")
    for node in ("n1", "n2", "n3", "n4"):
        wait_for(
            f"no process on {node}",
            lambda node=node: not fresh.in_jobs(node),
            60,
        )
    assert fresh.job_field(job.id, "Restarts") == "0"


def test_two_jobs_on_the_same_nodes_never_share_a_port(counts: Submit) -> None:
    jobs = [counts("--nodes", "4", "--cpus-per-task", "1") for _ in range(2)]
    rounds = [job.wait_event("round") for job in jobs]
    assert [len(event["nodes"]) for event in rounds] == [4, 4]
    for job in jobs:
        finish(job)
        assert job.verdict()["restarts"] == 0
    ports = {json.loads((job.run_dir / "endpoint.json").read_text())["port"] for job in jobs}
    assert len(ports) == 2


@pytest.mark.parametrize(
    "options", [["--interface", "ib0"], pytest.param(["--rdzv-endpoint", "n2.mini.cluster:29500"], marks=ON_DEMAND)]
)
def test_node_names_with_a_domain_and_a_second_network_are_supported(submit: Submit, options: list[str]) -> None:
    job = submit("--nodes", "2:4", *options, script=COUNTS)
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
    endpoint = json.loads((job.run_dir / "endpoint.json").read_text())
    if "--interface" in options:
        assert endpoint["addresses"] == ["10.214.0.1"]
    else:
        assert (endpoint["host"], endpoint["port"]) == ("n2", 29532)  # 32 ports for the stores, then the agents'


def test_each_task_of_an_array_has_its_own_run_and_is_requeued_alone(counts: Submit, fresh: Cluster) -> None:
    array = counts("--nodes", "2", "--array", "0-1", "--grace", "1")
    tasks = [Job(fresh, f"{array.id}_{index}", array.folder) for index in (0, 1)]
    for task in tasks:
        task.wait_steps(15)
    fresh.exec(["scancel", "--batch", "--signal=URG", tasks[0].id])
    for task in tasks:
        finish(task)
    assert [task.verdict()["run"] for task in tasks] == [1, 0]
