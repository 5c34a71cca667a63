"""The assumptions of ``elastic_hpc.slurm`` about Slurm when a job grows or restarts an agent."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path

from conftest import Cluster, wait_for
from test_requeue import PUPPET, Puppets

SCRIPT = """\
#!/bin/bash
#SBATCH --no-kill --open-mode=append --output={folder}/out --time=10 # all of it
#SBATCH --nodes={nodes} --nodelist={nodelist} -x n4 --gpus-per-node=2
#SBATCH --array=3 --dependency=singleton -J "the parent" --mail-type=END,FAIL --mail-user=nobody
if [ -n "$ELASTIC_HPC_JOIN" ]; then
  env > {folder}/joined.tmp; mv {folder}/joined.tmp {folder}/joined
else
  srun --nodes=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --gpus-per-node=2 --no-kill --kill-on-bad-exit=0 --wait=0 \\
    {python} {folder}/puppet.py {folder}
  touch {folder}/srun_ended
fi
until [ -e {folder}/end ]; do sleep 0.1; done
"""


def start(cluster: Cluster, folder: Path, nodes: int, nodelist: str) -> Puppets:
    (folder / "puppet.py").write_text(PUPPET)
    script = SCRIPT.format(folder=folder, python=shlex.quote(sys.executable), nodes=nodes, nodelist=nodelist)
    (folder / "job.sh").write_text(script)
    os.chmod(folder, 0o777)
    id = cluster.exec(["sbatch", "--parsable", str(folder / "job.sh")], cwd=folder).stdout.strip()
    job = Puppets(cluster, f"{id}_3", folder)
    for node in ("n1", "n2")[:nodes]:
        job.answer("up", node)
    return job


def environ(path: Path) -> dict[str, str]:
    wait_for(path.name, path.exists)
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)


def test_a_job_grows_by_a_joiner_that_has_the_jobs_directives_for_one_node(fresh: Cluster, folder: Path):
    job = start(fresh, folder, 1, "n1")
    job.order(
        """\
        from elastic_hpc.errors import UsageError

        script = (folder / "job.sh").read_bytes()
        given = dict(environ={**os.environ, "HELLO": "a, b=c"}, run_dir=folder, log=folder / "join-%j", exclude=["n3"])
        def joiner(id):
            return next((joiner for joiner in slurm.joiners(job) if joiner.id == id), None)

        first, second = [slurm.submit_joiner(job, script, **given) for _ in range(2)]
        while (shown := joiner(first)) and shown.state == "PENDING":
            time.sleep(0.1)
        tell("first", [first, shown.state, shown.node])
        slurm.change_time_limit(second, timedelta(minutes=2))
        shown = joiner(second)
        tell("second", [shown.state, shown.node, shown.reason, shown.excluded, shown.time_limit.seconds])
        try: slurm.submit_joiner(job, script.replace(b"per-node=2", b"per-node=9"), **given)
        except UsageError as error: tell("refused", str(error))
        while not (folder / "seen").exists():
            time.sleep(0.05)
        for _ in range(2):
            slurm.cancel(first, second)
        while slurm.joiners(job):
            time.sleep(0.1)
        tell("cancelled", slurm.job_state(job))
        """,
        "n1",
    )
    id, state, node = job.answer("first", "n1")
    assert (state, node) == ("RUNNING", "n2")  # n1's GPUs are the parent's
    *waits, reason, excluded, seconds = job.answer("second", "n1")
    assert (waits, excluded, seconds) == (["PENDING", ""], "n[3-4]", 120)
    assert reason in {"Resources", "Priority", "None"}
    assert "node configuration is not available" in job.answer("refused", "n1")

    env = environ(folder / "joined")
    assert (env["ELASTIC_HPC_JOIN"], env["HELLO"]) == (str(folder), "a, b=c")
    assert (env["SLURM_JOB_NUM_NODES"], env["SLURM_GPUS_ON_NODE"], env["CUDA_VISIBLE_DEVICES"]) == ("1", "2", "0,1")
    assert "SLURM_ARRAY_TASK_ID" not in env
    shown = {name: fresh.job_field(id, name) for name in ("JobName", "Requeue", "Dependency", "WorkDir")}
    assert shown == {
        "JobName": f"join-{job.id}",
        "Requeue": "0",
        "Dependency": "(null)",
        "WorkDir": str(folder),
    }
    assert fresh.job_field(id, "TimeLimit") in {
        "00:10:00",
        "00:09:00",
    }  # the parent may have run for less than a second
    assert (folder / f"join-{id}").exists()
    (folder / "seen").touch()
    assert job.answer("cancelled", "n1") == "RUNNING"
    (folder / "end").touch()


def test_an_agent_is_restarted_on_its_node_with_its_gpus_but_never_after_it_was_given_up(fresh: Cluster, folder: Path):
    job = start(fresh, folder, 2, "n[1-2]")
    job.order("", "n2")
    job.order(
        """\
        from elastic_hpc.slurm import client
        code = "tell('again', dict(os.environ))\\nwhile not (folder / 'end').exists(): time.sleep(0.05)"
        raw, log = slurm.show_job(job).id, folder / "again.log"
        again = [sys.executable, str(folder / "puppet.py"), str(folder), code]
        slurm.start_agent(raw, "n2", again, {**os.environ, "HELLO": "a, b=c", "SLURM_RESTART_COUNT": "0"}, log)
        tell("started", time.time())
        while not (folder / "stopped").exists():
            time.sleep(0.05)
        client.SECONDS = 1
        try: slurm.start_agent(raw, "n2", ["touch", str(folder / "late")], os.environ, log)
        except SlurmError as error: tell("error", str(error))
        """,
        "n1",
    )
    job.answer("started", "n1")
    env = job.answer("again", "n2")
    gpus = [env[name] for name in ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "CUDA_VISIBLE_DEVICES")]
    assert gpus == ["2", "0,1", "0,1"]
    assert [env[name] for name in ("HELLO", "SLURM_RESTART_COUNT", "SLURMD_NODENAME")] == ["a, b=c", "0", "n2"]
    assert f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}" == job.id
    assert [env[name] for name in ("SLURM_NODEID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS")] == ["0", "1", "1"]

    (slurmd,) = fresh.processes("slurmd", "n2")
    os.kill(slurmd, signal.SIGSTOP)
    (folder / "stopped").touch()
    assert "not started in 1 s" in job.answer("error", "n1")
    os.kill(slurmd, signal.SIGCONT)
    steps = ["squeue", "--noheader", "--steps", f"--jobs={job.id}", "--format=%j"]
    left = {"elastic-agent", "batch"}  # on a site "extern" too
    wait_for("the end of the other steps", lambda: set(fresh.exec(steps).stdout.split()) - {"extern"} == left)
    assert not (folder / "late").exists()

    wait_for("the end of srun", (folder / "srun_ended").exists)  # the agent continues
    assert job.state() == "RUNNING"
    (folder / "end").touch()
    assert job.ends() == "COMPLETED"
