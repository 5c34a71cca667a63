"""The assumptions of ``elastic_hpc.slurm`` about Slurm when a job ends or is requeued, checked from within the job."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from conftest import Cluster, wait_for
from on_demand import ON_DEMAND


def fast(cluster: Cluster, *, watched: bool = False) -> float:
    """Seconds from the request to the next run, on an idle cluster. Slurm's own delay is 121 s. On a site, whose epilog
    may take any time, the job waits longer, unless the requeue ``watched`` another node of the job.
    """
    return 60.0 if cluster.is_site and not watched else 30.0


PUPPET = """\
# One per node: ignores SIGTERM and does what files tell it. Every order ends it.
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
from elastic_hpc import slurm
from elastic_hpc.slurm.env import job_name
from elastic_hpc.errors import SlurmError

signal.signal(signal.SIGTERM, lambda *_: (folder / f"sigterm.{run}.{node}").touch())
folder, run, node = Path(sys.argv[1]), int(os.environ.get("SLURM_RESTART_COUNT", 0)), os.environ["SLURMD_NODENAME"]
job, soon = job_name(os.environ), timedelta(seconds=8)

def tell(name, value):
    (folder / f".{name}.{node}").write_text(repr(value))
    (folder / f".{name}.{node}").rename(folder / f"{name}.{run}.{node}")

if len(sys.argv) > 2:
    exec(sys.argv[2])
    os._exit(0)
tell("up", os.environ["SLURM_STEP_ID"])
while not (folder / f"order.{node}").exists():
    time.sleep(0.05)
exec((folder / f"order.{node}").read_text())
os._exit(0)
"""

SCRIPT = """\
#!/bin/bash
#SBATCH --no-kill --open-mode=append --output={folder}/out
run=${{SLURM_RESTART_COUNT:-0}}
date +%s.%N > {folder}/script.$run.tmp; echo "$SLURM_JOB_NODELIST" > {folder}/nodes.$run
echo "${{HELLO-}}" > {folder}/hello.$run; echo "${{SLURM_ARRAY_TASK_ID-}}" > {folder}/task.$run
mv {folder}/script.$run.tmp {folder}/script.$run
[ -e {folder}/verdict ] && exit "$(cat {folder}/verdict)"
srun --nodes=$SLURM_JOB_NUM_NODES --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 \\
  --wait=0 --cpus-per-task=1 {python} {folder}/puppet.py {folder} &
wait
"""


@dataclass
class Puppets:
    """A job of puppets."""

    cluster: Cluster
    id: str
    folder: Path

    def answer(self, name: str, node: str, run: int = 0, deadline: float = 60) -> Any:
        path = self.folder / f"{name}.{run}.{node}"

        def answered() -> bool:
            for log in (*self.folder.glob("out"), *self.folder.glob("step.log")):
                assert "Traceback" not in (text := log.read_text(errors="replace")), text
            return path.exists()

        wait_for(f"{path.name} of job {self.id}", answered, deadline)
        return ast.literal_eval(path.read_text() or "None")

    def order(self, code: str, node: str) -> None:
        path = self.folder / f".order.{node}"
        path.write_text(dedent(code))
        path.rename(self.folder / f"order.{node}")

    def script_ran(self, run: int, deadline: float = 200) -> float:
        """Epoch seconds at which the batch script started for the ``run``-th time."""
        path = self.folder / f"script.{run}"
        wait_for(f"run {run} of job {self.id}", path.exists, deadline)
        return float(path.read_text())

    def written(self, name: str, run: int) -> str:
        return (self.folder / f"{name}.{run}").read_text().strip()

    def state(self) -> str:
        return self.cluster.job_field(self.id, "JobState")

    def ends(self, deadline: float = 60) -> str:
        def over() -> str | None:
            state = self.state()
            return state if state not in {"RUNNING", "COMPLETING", "PENDING", "CONFIGURING"} else None

        return wait_for(f"the end of job {self.id}", over, deadline)


Start = Callable[..., Puppets]


def start_puppets(cluster: Cluster, folder: Path, *options: str, on: tuple[str, ...]) -> Puppets:
    folder.mkdir(parents=True)
    (folder / "puppet.py").write_text(PUPPET)
    (folder / "job.sh").write_text(SCRIPT.format(folder=folder, python=shlex.quote(sys.executable)))
    os.chmod(folder, 0o777)
    id = cluster.exec(["sbatch", "--parsable", *options, str(folder / "job.sh")], cwd=folder).stdout.strip()
    array = next((option.partition("=")[2] for option in options if option.startswith("--array")), "")
    job = Puppets(cluster, f"{id}_{array}" if array else id, folder)
    for node in on:
        job.answer("up", node)
    return job


@pytest.fixture
def start(fresh: Cluster, folder: Path) -> Start:
    def do(*options: str, on: tuple[str, ...], name: str = "job") -> Puppets:
        return start_puppets(fresh, folder / name, *options, on=on)

    return do


def in_own_step(code: str) -> str:
    """An order to run ``code`` in a step of its own, as soon as no other step is left."""
    waits = """\
        slurm.wait_until_alone(job, os.environ["SLURM_STEP_ID"], deadline=timedelta(seconds=90))
        tell("alone", time.time())
    """
    body = dedent(waits) + dedent(code)
    return (
        f"command = [sys.executable, str(folder / 'puppet.py'), str(folder), {body!r}]\n"
        "slurm.start_step(os.environ['SLURM_JOB_ID'], node, command, folder / 'step.log')\n"
    )


def test_a_job_restarts_within_30_seconds_when_a_node_lost_power_and_slurm_has_not_noticed(
    fresh: Cluster, start: Start
):
    job = start("--nodes=2-4", on=("n1", "n2", "n3", "n4"))
    fresh.mini("kill", "n4")
    requested_at = time.time()
    job.order("", "n2")
    job.order("", "n3")
    job.order('tell("refused", slurm.requeue(job, start_after=soon, lost=["n4"], exclude=["n4"]))', "n1")
    assert job.answer("refused", "n1") is None
    assert job.script_ran(1) - requested_at < fast(fresh, watched=True)
    assert job.written("nodes", 1) == "n[1-3]"


def test_a_cancelled_job_is_never_requeued(fresh: Cluster, start: Start):
    job = start("--nodes=1", "--nodelist=n2", on=("n2",))
    fresh.exec(["scancel", job.id])
    wait_for("SIGTERM", (job.folder / "sigterm.0.n2").exists)
    job.order(
        """\
        tell("state", slurm.job_state(job, run))
        try: slurm.requeue(job, start_after=soon, run=run)
        except SlurmError as error: tell("error", str(error))
        """,
        "n2",
    )
    assert job.answer("state", "n2") == "CANCELLED"
    assert "CANCELLED" in job.answer("error", "n2")
    assert job.ends() == "CANCELLED"


def test_a_requeue_by_another_user_also_starts_early(fresh: Cluster, start: Start):
    job = start("--nodes=1", "--nodelist=n2", on=("n2",))
    requested_at = time.time()
    fresh.exec(["scontrol", "requeue", job.id])
    job.order(
        """\
        tell("state", slurm.job_state(job, run))
        tell("refused", slurm.requeue(job, start_after=soon, run=run))
        """,
        "n2",
    )
    assert job.answer("state", "n2") == "REQUEUED"
    assert job.answer("refused", "n2") is None
    assert job.script_ran(1) - requested_at < fast(fresh)


def test_a_job_that_may_not_be_requeued_reports_that_and_is_submitted_again_instead(fresh: Cluster, start: Start):
    job = start("--nodes=1", "--array=3", "--no-requeue", "--nodelist=n2", on=("n2",))
    (job.folder / "verdict").write_text("0")  # the second job need not continue
    job.order(
        """\
        try: slurm.requeue(job, start_after=soon)
        except SlurmError as error: tell("error", str(error))
        tell("again", slurm.resubmit(job, folder / "job.sh", os.environ, {"HELLO": "a, b=c"}))
        """,
        "n2",
    )
    assert "may not be requeued" in job.answer("error", "n2")
    again = job.answer("again", "n2")
    assert again.endswith("_3")
    assert job.ends() == "COMPLETED"
    assert Puppets(fresh, again, job.folder).ends() == "COMPLETED"
    assert job.written("hello", 0) == "a, b=c"
    assert job.written("task", 0) == "3"


def test_a_job_that_an_administrator_holds_at_the_requeue_is_cancelled(fresh: Cluster, start: Start):
    job = start("--nodes=1", "--nodelist=n2", on=("n2",))
    fresh.mini("exec", "--root", "--", "scontrol", "update", f"JobId={job.id}", "Requeue=0")
    job.order(
        """\
        try: slurm.complete(job, start_after=soon)
        except SlurmError as error: tell("error", str(error))
        """,
        "n2",
    )
    assert "cancelled it instead" in job.answer("error", "n2")
    assert job.ends() == "CANCELLED"


@ON_DEMAND
def test_a_job_is_requeued_after_its_time_limit(fresh: Cluster, start: Start):
    job = start("--nodes=1", "--time=1", "--nodelist=n2", on=("n2",))
    wait_for("SIGTERM", (job.folder / "sigterm.0.n2").exists, 130)
    requested_at = time.time()
    job.order(
        """\
        while (state := slurm.job_state(job, run)) == "RUNNING":
            time.sleep(0.1)
        tell("state", state)
        tell("refused", slurm.requeue(job, start_after=soon, run=run))
        """,
        "n2",
    )
    assert job.answer("state", "n2") == "TIMEOUT"
    assert job.answer("refused", "n2") is None
    assert job.script_ran(1) - requested_at < fast(fresh)


@pytest.mark.site
def test_the_site_settings_and_usable_nodes_are_read_from_slurm(fresh: Cluster, start: Start):
    job = start("--nodes=1", "--nodelist=n2", on=("n2",))
    fresh.mini("exec", "--root", "--", "scontrol", "update", "NodeName=n3", "State=DRAIN", "Reason=test")
    job.order(
        """\
        usable, hidden = slurm.usable_nodes(job)
        tell("usable", [sorted(usable), hidden])
        begin = time.monotonic()
        site = slurm.site("main")
        tell("seconds", time.monotonic() - begin)
        tell("site", [site.kill_wait.seconds, site.job_requeue, site.preempt_mode])
        try: slurm.site("nowhere")
        except SlurmError as error: tell("error", str(error))
        """,
        "n2",
    )
    usable, hidden = job.answer("usable", "n2")
    assert usable == (["n1", "n2", "n3", "n4"] if fresh.is_site else ["n1", "n2", "n4"])  # PrivateData=nodes
    assert ("denied" in hidden) == fresh.is_site, hidden
    assert job.answer("seconds", "n2") < 1
    assert job.answer("site", "n2") == [30, True, "OFF"]
    assert "nowhere" in job.answer("error", "n2")


@dataclass
class Headless:
    """Three jobs whose batch hosts have lost power. Their remaining agents requested the end of two jobs after Slurm
    had noticed the loss, and the requeue of one job before that.
    """

    finished: Puppets
    failed: Puppets
    lost: Puppets
    after_finished: str
    after_failed: str
    noticed: float


@pytest.fixture(scope="module")
def headless(cluster: Cluster) -> Iterator[Headless]:
    base = cluster.home / "headless"
    shutil.rmtree(base, ignore_errors=True)
    on = ("n1", "n2")
    lost = start_puppets(cluster, base / "lost", "--nodes=1-2", on=on)
    finished = start_puppets(
        cluster, base / "finished", "--nodes=2", "--array=5", "--gpus-per-node=2", "--nodelist=n1,n2", on=on
    )
    failed = start_puppets(cluster, base / "failed", "--nodes=2-4", "--exclusive", on=("n3", "n4"))
    after = [
        cluster.exec(
            ["sbatch", "--parsable", f"--dependency=afterok:{job.id}", "--output=/dev/null", "--wrap=true"]
        ).stdout.strip()
        for job in (finished, failed)
    ]
    for node in ("n1", "n3"):
        cluster.mini("kill", node)
    (lost.folder / "verdict").write_text("0")  # its second run need not train
    lost.order(in_own_step('tell("refused", slurm.requeue(job, start_after=soon, exclude=["n1"]))'), "n2")
    cluster.wait_noticed("n1", "n3")
    (finished.folder / "verdict").write_text("0")
    (failed.folder / "verdict").write_text("1")
    noticed = time.time()
    finished.order(in_own_step('tell("refused", slurm.complete(job, start_after=soon, exclude=["n1"]))'), "n2")
    failed.order(in_own_step('tell("refused", slurm.complete(job, start_after=soon, exclude=["n3"]))'), "n4")
    yield Headless(finished, failed, lost, after[0], after[1], noticed)
    cluster.reset()
    shutil.rmtree(base)


def test_a_job_without_batch_host_ends_as_completed_and_releases_its_dependents(cluster: Cluster, headless: Headless):
    job = headless.finished
    assert job.script_ran(1) - headless.noticed < fast(cluster)
    assert job.ends() == "COMPLETED"
    assert job.written("nodes", 1) != "n1"
    assert Puppets(cluster, headless.after_finished, job.folder).ends() == "COMPLETED"


@ON_DEMAND
def test_a_job_without_batch_host_ends_as_failed(cluster: Cluster, headless: Headless):
    job = headless.failed
    assert job.script_ran(1) - headless.noticed < fast(cluster)
    assert job.ends() == "FAILED"
    assert cluster.job_field(headless.after_failed, "JobState") != "COMPLETED"


def test_a_job_without_batch_host_restarts_within_30_seconds_after_slurm_notices(cluster: Cluster, headless: Headless):
    job = headless.lost
    assert job.script_ran(1) - headless.noticed < fast(cluster)
