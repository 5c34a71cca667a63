"""Functions as elastic jobs, through submitit's interface, on a real Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cluster, Job, wait_for
from on_demand import ON_DEMAND

HEAD = """
import json, os, sys, time
import submitit

def say(**fields):
    print(json.dumps(fields), flush=True)

executor = submitit.AutoExecutor("jobs", cluster="elastic")
"""


class Client:
    """A user's script that calls submitit, and the lines that it prints."""

    def __init__(self, cluster: Cluster, folder: Path, code: str) -> None:
        self._cluster, self._folder = cluster, folder
        script = folder / "client.py"
        script.write_text(HEAD + code)
        command = cluster.command([sys.executable, "-u", str(script)], cwd=folder)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def read_line(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the script has ended; its complaint stands above"
        found: dict[str, Any] = json.loads(line)
        return found

    def job(self) -> Job:
        """The job that the script has submitted."""
        job = Job(self._cluster, self.read_line()["job"], self._folder)
        job.log_dir = self._folder / "jobs" / "elastic"
        return job


@pytest.fixture
def client(fresh: Cluster, folder: Path) -> Iterator[Callable[[str], Client]]:
    started: list[Client] = []

    def start(code: str) -> Client:
        started.append(Client(fresh, folder, code))
        return started[-1]

    yield start
    for script in started:
        script.process.kill()
        script.process.communicate()


def test_every_rank_returns_its_result_and_arrays_commands_and_exceptions_work_as_with_any_executor(
    client: Callable[[str], Client],
) -> None:
    script = client("""
def where():
    env = submitit.JobEnvironment()
    print("printed by", env.global_rank)
    return [env.global_rank, env.num_tasks, env.local_rank, env.node, env.num_nodes, env.hostnames, env.job_id]

def halves(number):
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number // 2

executor.update_parameters(nodes="2:2", tasks_per_node=2, timeout_min=5, name="functions", slurm_comment="mine")
job = executor.submit(where)
executor.update_parameters(nodes=1, tasks_per_node=1, elastic_max_restarts=0)
two, three = executor.map_array(halves, [2, 3])
with executor.batch():
    command = executor.submit(submitit.helpers.CommandFunction([sys.executable, "-c", "print(21 * 2)"]))
say(results=job.results(), id=job.job_id, state=job.state, task=job.task(3).result()[0])
say(out=job.task(3).stdout(), two=two.result(), ids=[two.job_id, three.job_id], command=command.result())
say(error=str(three.exception()), state=three.state, kind=type(three.exception()).__name__)
try:
    three.result()
except submitit.helpers.core.utils.FailedJobError:
    say(raised=True)
""")
    line = script.read_line()
    hosts = line["results"][0][5]
    assert line["results"] == [[rank, 4, rank % 2, rank // 2, 2, hosts, line["id"]] for rank in range(4)]
    assert len(hosts) == 2
    assert (line["state"], line["task"]) == ("COMPLETED", 3)
    line = script.read_line()
    assert "printed by 3" in line["out"]
    assert "printed by 0" not in line["out"]
    assert (line["two"], line["command"]) == (1, "42")
    array = line["ids"][0].partition("_")[0]
    assert line["ids"] == [f"{array}_0", f"{array}_1"]
    line = script.read_line()
    assert (line["state"], line["kind"]) == ("FAILED", "FailedJobError")
    assert "in halves" in line["error"]
    assert "ValueError: 3 is odd" in line["error"]
    assert script.read_line() == {"raised": True}


def test_a_function_continues_without_a_lost_node_and_the_results_are_those_of_the_last_world(
    fresh: Cluster, client: Callable[[str], Client]
) -> None:
    script = client("""
def train(steps):  # as scripts for submitit's Slurm cluster do: by its helper, by an address and a port of their own
    import torch
    import torch.distributed as dist
    env, done = submitit.JobEnvironment(), torch.zeros(1)
    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR=env.hostnames[0], MASTER_PORT="45454")
    dist.init_process_group("gloo")
    while done < steps * env.num_tasks or env.num_tasks > 2:  # three of them never finish
        done += 1
        dist.all_reduce(done)
        time.sleep(0.05)
    return env.global_rank, env.num_tasks

executor.update_parameters(nodes="2:3", timeout_min=5)
job = executor.submit(train, 3)
say(job=job.job_id)
say(results=job.results(), restarts=job.status.restarts, nodes=job.status.nodes)
""")
    job = script.job()
    job.wait_event("round")
    wait_for("its workers", lambda: fresh.processes("submitit.core._submit", "n3"))
    fresh.mini("kill", "n3")
    assert script.read_line() == {"results": [[0, 2], [1, 2]], "restarts": 1, "nodes": ["n1", "n2"]}
    assert job.verdict()["requeues"] == 0


@ON_DEMAND
def test_a_function_that_can_checkpoint_does_so_before_a_requeue_and_fails_after_too_many_timeouts(
    client: Callable[[str], Client],
) -> None:
    script = client("""
class Counts(submitit.helpers.Checkpointable):
    def __init__(self):
        self.starts = 0

    def __call__(self, limit):
        self.starts += 1
        print("start", self.starts, flush=True)
        while self.starts < limit:
            time.sleep(0.05)
        return self.starts

executor = submitit.AutoExecutor("jobs", cluster="elastic", elastic_max_num_timeout=0)
executor.update_parameters(nodes=2, timeout_min=5)

def wait_for_round(job, count):
    while job.status.round < count or f"start {count}" not in (job.stdout() or ""):
        time.sleep(0.1)

job = executor.submit(Counts(), 2)
say(job=job.job_id)
wait_for_round(job, 1)
job._interrupt()
say(results=job.results(), requeues=len(job.status.nodes), state=job.state)
job = executor.submit(Counts(), 9)
say(job=job.job_id)
wait_for_round(job, 1)
job._interrupt(timeout=True)
say(error=str(job.exception()), state=job.state)
executor.update_parameters(slurm_additional_parameters={"hold": True})
held = executor.submit(time.sleep, 600)
refused = []
for timeout in (False, True):
    try:
        held._interrupt(timeout=timeout)
    except Exception as error:
        refused.append(str(error))
say(state=held.state, out=held.stdout(), info=held.get_info()["State"], refused=refused)
held.cancel()
say(state=held.exception() and held.state)
executor = submitit.AutoExecutor("jobs", cluster="elastic")
executor.update_parameters(slurm_partition="nowhere")
try:
    executor.submit(time.sleep, 600)
except submitit.core.utils.FailedJobError as error:
    say(refused=str(error))
executor = submitit.AutoExecutor("jobs", cluster="elastic")
job = executor.submit(time.sleep, 600)
while not job.status.round:
    time.sleep(0.1)
job.cancel()
say(error=str(job.exception()), state=job.state, kind=type(job.exception()).__name__)
""")
    job = script.job()
    line = script.read_line()
    assert line["results"] == [2, 2]
    assert line["state"] == "COMPLETED"
    assert [event["cause"] for event in job.events("verdict")] == ["preempted", ""]
    job, line = script.job(), script.read_line()
    assert line["state"] == "FAILED"
    assert "timed-out too many times" in line["error"]
    assert len(job.events("verdict")) == 1
    line = script.read_line()
    assert (line["state"], line["out"], line["info"]) == ("PENDING", None, "PENDING")
    assert all("waits in the queue" in reason for reason in line["refused"])
    assert len(line["refused"]) == 2
    assert script.read_line() == {"state": "CANCELLED"}
    assert "invalid partition" in script.read_line()["refused"]
    line = script.read_line()
    assert (line["state"], line["kind"]) == ("CANCELLED", "UncompletedJobError")
