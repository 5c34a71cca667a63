"""``elastic-hpc notice``: from the owner of a job, from a program on the node, and from root for other users' jobs."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic_hpc.cli.hpc import main
from elastic_hpc.job.notices import jobs_on
from elastic_hpc.record.events import append_event
from elastic_hpc.record.health import marked

AGENT = [
    sys.executable,
    "-c",
    "import time; print(flush=True); time.sleep(600)",
    "elastic_hpc.agent",
    "--nodes",
    "2",
    "--run-dir",
]
"""A process that looks like an agent."""
HERE = f"here-{os.getpid()}"
"""The name of this machine as a node; a test Slurm on the same machine may also have an n2."""
NOBODY = pwd.getpwnam("nobody").pw_uid
by_root = pytest.mark.skipif(os.geteuid() != 0, reason="root tells the jobs of others: sudo make test")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The run directory of a job with the nodes n1 and n2."""
    return made(tmp_path / "4711")


def made(run_dir: Path) -> Path:
    run_dir.mkdir(0o700)
    (run_dir / "spec.json").write_text("{}")
    for node in ("n1", "n2", HERE):
        append_event(run_dir, "n1", time.time(), "join", {"node": node, "addr": "", "joiner": False})
    return run_dir


@contextmanager
def agent(run_dir: Path, node: str, user: int) -> Iterator[None]:
    environ = {"SLURMD_NODENAME": node}
    owner = {"user": user} if user != os.geteuid() else {}
    try:
        started = subprocess.Popen([*AGENT, run_dir], stdin=-1, stdout=-1, env=environ, cwd="/", **owner)
    except PermissionError:
        pytest.skip("another user cannot run this checkout")
    with started as process:
        assert process.stdout
        process.stdout.readline()
        yield
        process.kill()


def test_the_owner_gives_a_job_notice_of_a_node_and_withdraws_it(job: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["notice", str(job), "--node", "n2", "ECC errors rising"]) == 0
    assert marked(job / "notices") == {"n2": "ECC errors rising"}
    assert main(["notice", str(job), "--well", "n2"]) == 0
    assert marked(job / "notices") == {}
    assert capsys.readouterr().out == "job 4711 leaves n2\njob 4711 may use n2 again\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--node", "n9", "ECC"], "'n9': job 4711 never had that node; its nodes: "),
        (["--node", "n2", " "], "expected why it is about to fail; to withdraw a notice: --well n2"),
        (["--well", "n2"], "job 4711 has no notice to withdraw"),
    ],
)
def test_invalid_notices_are_refused_with_the_reason(
    job: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
):
    assert main(["notice", str(job), *words]) == 2
    assert says in capsys.readouterr().err
    assert not (job / "notices").exists() or not marked(job / "notices")


def test_an_ended_job_has_no_nodes_to_leave(job: Path, capsys: pytest.CaptureFixture[str]):
    (job / "verdict.json").write_text(
        '{"run": 0, "outcome": "finished", "cause": "", "reason": "all workers finished", "failure": null}'
    )
    assert main(["notice", str(job), "--node", "n2", "ECC"]) == 1
    assert "job 4711 has ended, COMPLETED" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root's own jobs have to be named")
def test_on_the_node_the_notice_goes_to_all_jobs_of_the_user(job: Path):
    with agent(job, HERE, os.geteuid()):
        assert main(["notice", "--node", HERE, "ECC errors rising"]) == 0
    assert marked(job / "notices") == {HERE: "ECC errors rising"}


@pytest.mark.skipif(os.geteuid() == 0, reason="for root that is no failure")
def test_elsewhere_the_user_must_name_the_job(capsys: pytest.CaptureFixture[str]):
    assert main(["notice", "--node", HERE, "ECC errors rising"]) == 1
    assert "name the job: elastic-hpc notice JOB" in capsys.readouterr().err


@by_root
def test_root_gives_notice_to_other_users_jobs_on_the_node_as_their_owners(capfd: pytest.CaptureFixture[str]):
    """The test uses a folder of its own, because other users may not enter pytest's."""
    with tempfile.TemporaryDirectory() as folder, owned(Path(folder)) as (job, other):
        with agent(job, HERE, NOBODY), agent(other, "n1", NOBODY):
            assert main(["notice", "--node", HERE, "ECC errors rising"]) == 0
        assert marked(job / "notices") == {HERE: "ECC errors rising"}
        assert {path.stat().st_uid for path in (job / "notices", *(job / "notices").iterdir())} == {NOBODY}
        assert not (other / "notices").exists()
        assert main(["notice", str(job), "--well", HERE]) == 0
        assert marked(job / "notices") == {}
    assert capfd.readouterr().out == f"job 1 leaves {HERE}\njob 1 may use {HERE} again\n"


@contextmanager
def owned(folder: Path) -> Iterator[list[Path]]:
    folder.chmod(0o755)
    jobs = [made(folder / name) for name in ("1", "2")]
    for path in [*jobs, *(file for job in jobs for file in job.iterdir())]:
        os.chown(path, NOBODY, -1)
    yield jobs


@by_root
def test_root_accepts_no_process_that_runs_as_root_as_an_agent(job: Path):
    """A user who can start a setuid program chooses its arguments."""
    with agent(job, HERE, 0):
        assert jobs_on(HERE) == {}
        assert main(["notice", "--node", HERE, "ECC errors rising"]) == 0
    assert not (job / "notices").exists()
