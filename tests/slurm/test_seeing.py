"""Commands watch a job and follow its output while it loses a node and is requeued, on a real Slurm."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from conftest import ROOT, Cluster, Job, wait_for
from on_demand import ON_DEMAND

from elastic_hpc.record.worker_logs import Wanted

Submit = Callable[..., Job]
TOOL = str(Path(sys.executable).with_name("elastic-hpc"))


class Terminal:
    """A command on a terminal of its own, and all its output there."""

    def __init__(self, command: list[str], rows: int, columns: int) -> None:
        self._master, slave = os.openpty()
        self.resize(rows, columns)
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.shown = ""
        threading.Thread(target=self._read, daemon=True).start()

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait(self, text: str, deadline: float = 60) -> None:
        """Wait until the command shows ``text``, after the texts of earlier waits."""
        wait_for(f"{text!r} on the screen", lambda: text in self.shown, deadline)
        self.shown = self.shown.rpartition(text)[2]

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # at its end
            while part := os.read(self._master, 65536):
                self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", part.decode(errors="replace"))


@ON_DEMAND
def test_a_job_is_watched_and_followed_through_a_lost_node_a_requeue_and_a_slurm_that_does_not_answer(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    script = Path(shutil.copy(ROOT / "tests" / "records" / "train.py", folder))
    job = submit("--nodes", "2:3", "--grace", "10", script=script, args=["400"])
    with (folder / "followed").open("w") as output:
        follows = subprocess.Popen(fresh.command([TOOL, "logs", "-f", job.id], cwd=folder), stdout=output)
    screen = Terminal(fresh.command(["env", "TERM=xterm", TOOL, "status", job.id, "--watch"], cwd=folder), 24, 100)
    try:
        screen.wait("3 of 2:3")
        inside = ["sh", "-c", "echo $SLURMD_NODENAME $ELASTIC_HPC_RUN_DIR $SLURM_STEP_NUM_TASKS; pwd; exit 5"]
        done = fresh.exec([TOOL, "shell", job.id, "n2", "--", *inside], cwd=Path("/"), check=False)
        assert done.stdout.split() == ["n2", str(job.run_dir), "1", str(folder)], done.stderr
        assert done.returncode == 5
        shell = Terminal(fresh.command(["env", "TERM=xterm", TOOL, "shell", job.id, "n3", "--", "tty"]), 24, 80)
        shell.wait("/dev/pts/")
        assert shell.process.wait(timeout=60) == 0
        wait_for("step 60", lambda: "step 60\n" in job.worker_output())
        fresh.mini("kill", "n3")
        job.wait_event("round", 2)
        screen.resize(8, 40)
        screen.wait("2 of 2:3")
        screen.resize(30, 120)
        wait_for("step 120", lambda: "step 120\n" in job.worker_output())

        fresh.mini("heal", "n3")
        fresh.exec(["scancel", "--batch", "--signal=URG", job.id])
        job.wait_event("start", 2, deadline=120)
        running = json.loads(fresh.exec([TOOL, "status", "--json"], cwd=Path("/")).stdout)["jobs"]
        assert [(row["id"], row["runs"]) for row in running if row["id"] == job.id] == [(job.id, 2)]

        fresh.slurmctld("stop")
        try:
            done = fresh.exec([TOOL, "status", job.id, "--json"], cwd=Path("/"), check=False, timeout=120)
        finally:
            fresh.slurmctld("start")
        body = json.loads(done.stdout)
        assert done.returncode == 1
        assert body["jobs"][0]["state"] == "UNKNOWN"
        assert "Slurm cannot be asked" in body["slurm"]
        assert "a leader was active" in body["jobs"][0]["note"]

        assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.output()
        screen.wait("COMPLETED")
        assert screen.process.wait(timeout=60) == 0
        assert follows.wait(timeout=60) == 0
    finally:
        for process in (screen.process, follows):
            process.terminate()
            process.wait(timeout=60)

    followed = (folder / "followed").read_text().splitlines()
    heads = [line.split(",")[0] for line in followed if line.startswith("--- ")]
    assert heads == ["--- round 1", "--- round 2", "--- round 3"]
    steps = [int(found[1]) for line in followed if (found := re.fullmatch(r"rank 0\| step (\d+)", line))]
    written = [int(step) for step in re.findall(r"^step (\d+)$", _of_rank_0(job), re.MULTILINE)]
    assert steps == written, "each line once, in the order of the rounds"
    assert steps[-1] == 400
    assert sum(after <= before for before, after in pairwise(steps)) <= 1
    assert any(re.fullmatch(r"rank [012] err\| saved at step \d+", line) for line in followed)

    text = fresh.exec([TOOL, "why", job.id], cwd=folder).stdout
    assert "by: n3 lost: no heartbeat for 5 s" in text
    assert "the job returned to the queue under its own ID" in text
    fresh.exec([TOOL, "timeline", job.id, "--html", "page.html"], cwd=folder)
    assert "n3 lost" in (folder / "page.html").read_text()
    metrics = fresh.exec([TOOL, "metrics", job.id], cwd=folder).stdout
    assert f'elastic_hpc_faults_total{{job="{job.id}",kind="node lost"}} 1.0' in metrics


def test_a_job_that_cannot_start_shows_why_and_a_waiting_job_is_stopped_once(
    submit: Submit, fresh: Cluster, folder: Path
) -> None:
    def call(command: str, job: Job) -> tuple[int, str]:
        done = fresh.exec([TOOL, command, job.id], cwd=Path("/"), check=False)
        return done.returncode, done.stdout + done.stderr

    fresh.exec(["mkdir", "-p", "closed/logs"], cwd=folder)
    lost = submit("--nodes", "1", "--hold", "--output", "closed/logs/%j.out")
    held = submit("--nodes", "1", "--hold")
    fresh.exec(["rmdir", "closed/logs"], cwd=folder)
    fresh.exec(["chmod", "a-w", "closed"], cwd=folder)  # elsewhere Slurm 24.11 makes the folder itself
    fresh.exec(["scontrol", "release", lost.id])
    lost.wait_state("FAILED")
    why = f"its batch script never ran: the folder of its output does not exist: {folder}/closed/logs"
    for command, code in (("why", 0), ("logs", 1), ("timeline", 2)):
        assert (answer := call(command, lost))[0] == code
        assert why in answer[1] or command == "timeline"
    assert f"mkdir -p {folder}/closed/logs" in call("why", lost)[1]
    assert call("stop", lost)[1].startswith(f"job {lost.id} has ended, FAILED: its batch script never ran")

    assert f"scontrol release {held.id}" in call("why", held)[1]
    assert call("drain", held) == (
        1,
        f"elastic-hpc: job {held.id} waits in the queue (JobHeldUser): nothing runs there yet\n",
    )
    assert call("stop", held) == (0, f"job {held.id} is cancelled\n")
    assert call("stop", held)[1].startswith(f"job {held.id} has ended, CANCELLED")
    assert call("drain", held)[0] == 1


def _of_rank_0(job: Job) -> str:
    """The output of rank 0, round after round."""
    return job.written(Wanted(ranks=(0,), streams=("out",)))


def test_a_dry_runs_script_is_edited_and_submitted_by_hand_and_the_job_is_found_from_any_folder(
    fresh: Cluster, folder: Path
) -> None:
    (folder / "train.py").write_text("print('it runs', flush=True)\n")
    dry = [str(Path(TOOL).with_name("elastic-sbatch")), "--dry-run", "--nodes", "2", "--time", "10", "train.py"]
    script = fresh.exec(dry, cwd=folder).stdout
    assert f"submit it in {folder}: sbatch THIS-FILE" in script
    edited = script.replace("  --max-restarts 10 ", "  --max-restarts 3 ")
    assert edited != script
    (folder / "edited.sh").write_text(edited)
    job = fresh.exec(["sbatch", "--parsable", "edited.sh"], cwd=folder).stdout.strip()
    wait_for("the end", lambda: fresh.job_field(job, "JobState") == "COMPLETED")
    elsewhere = Path("/")
    assert "0 of 3" in fresh.exec([TOOL, "status", job], cwd=elsewhere).stdout
    assert "it runs" in fresh.exec([TOOL, "logs", job], cwd=elsewhere).stdout
    assert "all workers finished" in fresh.exec([TOOL, "why", job], cwd=elsewhere).stdout
