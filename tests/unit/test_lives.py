"""Live workers keep their processes when a round ends, whatever happens to the others. Here they run without torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import live_worker
import pytest
from test_local import Local, written

SCRIPT = Path(live_worker.__file__).read_text()
MAIN = "def main() -> None:\n"
SETS_A_VARIABLE = SCRIPT.replace(MAIN, f"{MAIN}    os.environ['OMP_NUM_THREADS'] = '7'\n")
SETS_A_VARIABLE += "print('threads', os.environ['OMP_NUM_THREADS'])\n"
NEEDS_A_RANK = SCRIPT.replace(MAIN, f"{MAIN}    os.environ['RANK']\n")
REASON = "torch 2.13.0 cannot reconfigure a process group: needs 2.14"
HPC = [sys.executable, "-m", "elastic_hpc"]


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Callable[..., Local]]:
    """Starts ``elastic-srun --local`` with live workers."""
    with contextlib.ExitStack() as jobs:
        yield lambda *options, script=SCRIPT: jobs.enter_context(
            contextlib.closing(Local(tmp_path, *options, script=script))
        )


def pids(job: Local, round: int, *ranks: int) -> list[int]:
    return [job.stepped(round, rank)[0] for rank in ranks]


def kept(job: Local, round: int) -> tuple[int, int]:
    """The number of workers of ``round`` that kept their process, and the number of those that did not."""
    job.wait_for(lambda: any(event["round"] == round for event in job.events("started")))
    (event,) = [event for event in job.events("started") if event["round"] == round]
    return event["kept"], event["warm"] + event["cold"]


@pytest.mark.parametrize("nodes", ["3", "2:3"])
def test_the_others_keep_their_processes_when_a_worker_is_killed(nodes: str, local: Callable[..., Local]) -> None:
    """If enough nodes remain, they continue without the killed worker's node until its new worker is ready."""
    job = local("--local", "3", "--nodes", nodes)
    before = pids(job, 1, 0, 1, 2)
    os.kill(before[1], signal.SIGKILL)
    last = 2
    if nodes == "2:3":
        assert pids(job, 2, 0, 1) == [before[0], before[2]]
        assert kept(job, 2) == (2, 0)
        last = 3
    after = pids(job, last, 0, 1, 2)
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] not in before
    assert kept(job, last) == (2, 1)
    assert job.stepped(last, 0)[1:3] == [3, last - 1]
    assert job.stepped(last, 0)[3] > 1
    assert job.finish() == 0
    assert f"round {last} rank 0 step" in written(job.run_dir, last, 0)
    assert f"round {last} rank 0 step" not in written(job.run_dir, last - 1, 0)
    assert written(job.run_dir, last, 1).startswith("ready\n") == (nodes == "2:3")
    assert job.verdict()["outcome"] == "finished"


def test_the_others_keep_their_processes_when_the_agent_that_leads_is_killed(local: Callable[..., Local]) -> None:
    job = local("--local", "3", "--nodes", "2:3", script=SETS_A_VARIABLE)
    before = pids(job, 1, 0, 1, 2)
    os.kill(job.agent(0), signal.SIGKILL)
    job.wait_for(lambda: len(job.events("round")) == 2)
    round = job.events("round")[1]["round"]
    assert pids(job, round, 0, 1) == before[1:]
    assert kept(job, round) == (2, 0)
    assert job.finish() == 0
    assert "threads 7" in written(job.run_dir, round, 0)  # settings of a script are kept
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)


def test_the_living_one_of_two_workers_on_a_node_is_kept(local: Callable[..., Local]) -> None:
    job = local("--local", "2", "--nodes", "2", "--nproc-per-node", "2")
    before = pids(job, 1, 0, 1, 2, 3)
    os.kill(before[3], signal.SIGKILL)
    after = pids(job, 2, 0, 1, 2, 3)
    assert after[:3] == before[:3]
    assert after[3] != before[3]
    assert job.finish() == 0


def test_a_worker_stopped_by_a_signal_is_killed_and_the_others_are_kept(local: Callable[..., Local]) -> None:
    job = local("--local", "2", "--nodes", "2", "--heartbeat-timeout", "1")
    before = pids(job, 1, 0, 1)
    os.kill(before[1], signal.SIGSTOP)
    after = pids(job, 2, 0, 1)
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)
    assert not Path(f"/proc/{before[1]}").exists()
    assert job.finish() == 0


def test_a_worker_that_does_not_pause_is_killed(local: Callable[..., Local]) -> None:
    job = local("--local", "2", "--nodes", "2")
    before = pids(job, 1, 0, 1)
    (job.run_dir / f"deaf.{before[0]}").touch()
    job.wait_for(lambda: not (job.run_dir / f"deaf.{before[0]}").exists())
    os.kill(before[1], signal.SIGKILL)
    after = pids(job, 2, 0, 1)
    assert not {*after} & {*before}
    assert "is not kept for the next round: it has not paused within 3 s" in job.output.read_text()
    job.wait_for(lambda: len(job.events("started")) == 2)
    assert "a worker could not be kept: it has not paused within 3 s" in job.events("started")[1]["why"]
    assert job.finish() == 0


def test_a_spare_takes_a_lost_nodes_place_and_the_others_keep_their_processes(local: Callable[..., Local]) -> None:
    job = local("--local", "3", "--nodes", "2", "--spares", "1")
    before = pids(job, 1, 0, 1)
    job.wait_for(lambda: "starting the workers of this node" in job.output.read_text())
    os.kill(job.agent(1), signal.SIGKILL)
    after = pids(job, 2, 0, 1)
    assert after[0] == before[0]
    assert kept(job, 2) == (1, 1)
    assert job.finish() == 0


@pytest.mark.parametrize("what", ["breaks", "cannot", "leaves"])
def test_the_facts_that_a_worker_reports_about_itself(what: str, local: Callable[..., Local]) -> None:
    job = local("--local", "2", "--nodes", "2")
    before = pids(job, 1, 0, 1)
    (job.run_dir / f"{what}.{before[0]}").touch()
    if what == "leaves":
        job.wait_for(lambda: not (job.run_dir / f"leaves.{before[0]}").exists())
        os.kill(before[1], signal.SIGKILL)
        assert not {*pids(job, 2, 0, 1)} & {*before}
    elif what == "breaks":
        assert pids(job, 2, 0, 1) == before
        assert [event["collateral"] for event in job.events("failure")] == [True]
    else:
        after = pids(job, 2, 0, 1)
        assert (after[0] == before[0], after[1] == before[1]) == (False, True)
        assert job.events("failure")[0]["message"] == "its state is torn"
    assert job.finish() == 0


def test_the_same_exception_twice_at_the_same_step_ends_the_job_and_after_the_first_the_others_were_kept(
    local: Callable[..., Local],
) -> None:
    script = SCRIPT.replace("        step += 1\n", "        step = min(step + 1, 5)\n")
    raises = "if rank == '1' and step == 5:\n            raise ValueError('of the script itself')\n        elif "
    job = local("--local", "2", "--nodes", "2", script=script.replace('if told("breaks")', raises + 'told("breaks")'))
    before = pids(job, 1, 0)
    assert job.process.wait(timeout=60) == 1
    assert [event["kept"] for event in job.events("started")] == [0, 1]
    assert pids(job, 2, 0) == before
    verdict = job.verdict()
    assert (verdict["outcome"], verdict["restarts"]) == ("failed", 1)
    assert "of the script itself" in str(verdict["reason"])


CANNOT = """
import os, time
from pathlib import Path
from elastic_hpc.training.progress import note_in_place, report_progress
note_in_place("torch 2.13.0 cannot reconfigure a process group: needs 2.14")
run, rank, round = (os.environ[name] for name in ("ELASTIC_HPC_RUN_DIR", "RANK", "ELASTIC_HPC_ROUND"))
report_progress(1)
Path(run, f"stepped.{round}.{rank}").write_text(f"{os.getpid()} 2 0 1")
while not Path(run, "enough").exists():
    time.sleep(0.02)
"""


def test_the_record_shows_why_workers_cannot_continue_in_place(local: Callable[..., Local]) -> None:
    job = local("--local", "2", "--nodes", "2", script=CANNOT)
    os.kill(pids(job, 1, 1)[0], signal.SIGKILL)
    assert kept(job, 2) == (0, 2)
    assert [event["not_kept"] for event in job.events("started")] == [[], [REASON]]
    assert f"a worker could not be kept: {REASON}" in job.events("started")[1]["why"]
    assert job.finish() == 0
    for words in ["why"], ["timeline", "--html", "-"]:
        shown = subprocess.run([*HPC, *words, str(job.run_dir)], capture_output=True, text=True, check=True).stdout
        assert f"not in place: {REASON}" in " ".join(shown.split())


@contextlib.contextmanager
def agent_that_joins(job: Local, said: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Kill the agent of the third node. Yields a function that restarts the agent; its stderr goes to ``said``."""
    agent = Path(f"/proc/{job.agent(2)}")
    command = (agent / "cmdline").read_bytes().split(b"\0")[:-1]
    environ = dict(entry.split(b"=", 1) for entry in (agent / "environ").read_bytes().split(b"\0") if entry)
    os.kill(int(agent.name), signal.SIGKILL)
    with contextlib.ExitStack() as stack, said.open("wb") as file:

        def join() -> subprocess.Popen[bytes]:
            joins = subprocess.Popen(command, env=environ, cwd=job.run_dir.parents[1], stderr=file)
            stack.callback(joins.wait)
            stack.callback(joins.kill)
            return joins

        yield join


@pytest.mark.parametrize("script", [SCRIPT, NEEDS_A_RANK])
def test_a_joining_node_costs_no_process(script: str, local: Callable[..., Local]) -> None:
    job = local("--local", "3", "--nodes", "2:3", "--heartbeat-timeout", "2", script=script)
    before = pids(job, 1, 0, 1, 2)
    said = job.run_dir / "said"
    with agent_that_joins(job, said) as join:
        assert pids(job, 2, 0, 1) == before[:2]
        joins = join()
        assert pids(job, 3, 0, 1) == before[:2]
        assert kept(job, 3) == (2, 1)
        assert job.stepped(3, 2)[1] == 3
        assert job.finish() == 0
        assert joins.wait(30) == 0
    assert [event["reason"] for event in job.events("drain")] == ["1 more node(s) joined"]
    paused = [(job.run_dir / f"paused.{round}.{before[0]}").read_text() for round in (1, 2)]
    assert paused == ["now", "at its step's end"]
    assert "starting the workers of this node" in said.read_text()
    was_ready = written(job.run_dir, 3, 2).startswith("ready\n")
    failed = "not started ahead: local rank 0 has ended with exit code 1: KeyError: 'RANK'" in said.read_text()
    assert (was_ready, failed) == (script == SCRIPT, script == NEEDS_A_RANK)


def test_a_node_joining_between_two_loops_costs_no_process(local: Callable[..., Local]) -> None:
    """A worker is connected only during a loop. The others wait until its next loop begins."""
    job = local("--local", "3", "--nodes", "2:3", "--heartbeat-timeout", "2")
    before = pids(job, 1, 0, 1, 2)
    with agent_that_joins(job, job.run_dir / "said") as join:
        assert pids(job, 2, 0, 1) == before[:2]
        (job.run_dir / f"leaves.{before[0]}").touch()
        job.wait_for(lambda: not (job.run_dir / f"leaves.{before[0]}").exists())
        joins = join()
        job.wait_for((job.run_dir / f"paused.2.{before[1]}").exists)
        (job.run_dir / f"returns.{before[0]}").touch()
        assert pids(job, 3, 0, 1) == before[:2]
        assert kept(job, 3) == (2, 1)
        assert job.finish() == 0
        assert joins.wait(30) == 0


def test_a_worker_that_can_never_pause_is_asked_to_save_immediately(local: Callable[..., Local]) -> None:
    job = local("--local", "3", "--nodes", "2:3", "--heartbeat-timeout", "2", "--grace", "600")
    before = pids(job, 1, 0, 1, 2)
    with agent_that_joins(job, job.run_dir / "said") as join:
        assert pids(job, 2, 0, 1) == before[:2]
        (job.run_dir / f"shards.{before[0]}").touch()
        job.wait_for(lambda: not (job.run_dir / f"shards.{before[0]}").exists())
        join()
        job.wait_for((job.run_dir / f"drained.{before[0]}").exists)  # not after half of the grace


@pytest.fixture
def paused(local: Callable[..., Local]) -> tuple[Local, list[int]]:
    """A job whose worker of rank 0 has paused while its agent waits for the other node, and the pids."""
    job = local("--local", "2", "--nodes", "2")
    before = pids(job, 1, 0, 1)
    (job.run_dir / f"deaf.{before[1]}").touch()
    job.wait_for(lambda: not (job.run_dir / f"deaf.{before[1]}").exists())
    (job.run_dir / f"breaks.{before[0]}").touch()
    job.wait_for((job.run_dir / f"paused.1.{before[0]}").exists)
    return job, before


def test_a_worker_that_is_killed_while_it_waits_is_replaced(paused: tuple[Local, list[int]]) -> None:
    job, before = paused
    os.kill(before[0], signal.SIGKILL)
    assert not {*pids(job, 2, 0, 1)} & {*before}
    assert "the worker of local rank 0 is not kept: it ended while it waited" in job.output.read_text()
    assert job.finish() == 0


def test_a_job_that_is_stopped_while_workers_wait_ends_them(paused: tuple[Local, list[int]]) -> None:
    job, before = paused
    job.process.terminate()
    assert job.process.wait(timeout=60) == 1
    assert job.verdict()["cause"] == "user"
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)
