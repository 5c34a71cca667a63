"""``elastic-srun --local``: the same agents and the same workers as on Slurm, as processes of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_hpc.cli import agents
from elastic_hpc.cli.srun import _read, _request
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.record.worker_logs import Logs, Wanted
from elastic_hpc.workers.guard import marked

SRUN = Path(sys.executable).with_name("elastic-srun")
TRAIN = """
import json, os, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
run, rank, round = os.environ["ELASTIC_HPC_RUN_DIR"], dist.get_rank(), os.environ["ELASTIC_HPC_ROUND"]
open(f"{run}/args.{rank}", "w").write(json.dumps(sys.argv[1:]))
step = 0
while True:  # all ranks stop at the same step
    total = torch.ones(1)
    dist.all_reduce(total)
    step += 1
    print(f"round {round} rank {rank} pid {os.getpid()} step {step}", flush=True)
    restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
    open(f"{run}/stepped.{round}.{rank}", "w").write(f"{os.getpid()} {int(total)} {restarts}")
    time.sleep(0.02)
    stop = torch.tensor([float(os.path.exists(f"{run}/enough"))])
    dist.all_reduce(stop)
    if stop:
        break
dist.destroy_process_group()
"""


LISTEN = """
import os, time
import torch.distributed as dist
from elastic_hpc.training import drain_requested, report_progress
dist.init_process_group("gloo")
run, rank, round = os.environ["ELASTIC_HPC_RUN_DIR"], dist.get_rank(), os.environ["ELASTIC_HPC_ROUND"]
step = 0
while not drain_requested():
    step += 1
    report_progress(step)
    restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
    open(f"{run}/stepped.{round}.{rank}", "w").write(f"{os.getpid()} {dist.get_world_size()} {restarts}")
    time.sleep(0.02)
open(f"{run}/saved.{round}.{rank}", "w").close()
dist.destroy_process_group()
"""

LEAVES = """
import os, subprocess
if os.environ["ELASTIC_HPC_ROUND"] == "1" and os.environ["RANK"] == "0":
    left = subprocess.Popen(["sleep", "600"], start_new_session=True)
    open(os.environ["ELASTIC_HPC_RUN_DIR"] + "/left", "w").write(str(left.pid))
"""
"""To be put before a script."""

ANEW = """
import os, sys, time
run = os.environ["ELASTIC_HPC_RUN_DIR"]
if os.environ["ELASTIC_HPC_ROUND"] == "1":
    open(f"{run}/began", "w").close()
    while not os.path.exists(f"{run}/anew"):
        time.sleep(0.01)
    sys.exit(3)
open(f"{run}/cwd", "w").write(os.getcwd())
"""

FORGETS = """
import os, sys, time
path = os.environ["ELASTIC_HPC_RUN_DIR"] + "/forgot"
if os.environ["ELASTIC_HPC_ROUND"] == "1":
    if os.environ["RANK"] == "0":
        open(path, "w").write(str(os.getpid()))
        os.execve("/bin/sleep", ["sleep", "600"], {})
    while not os.path.exists(path) or not (pid := open(path).read()) or open(f"/proc/{pid}/environ").read():
        time.sleep(0.01)
    sys.exit(3)
"""
"""Prefix for a script. Rank 0 replaces its environment, like programs that set the title of their process."""


def written(run_dir: Path, round: int, rank: int) -> str:
    """The output of a worker to stdout."""
    wanted = Wanted(ranks=(rank,), rounds=(round,), streams=("out",))
    return "".join(line.written for line in Logs(run_dir / "logs", wanted).written())


class Local:
    """A running ``elastic-srun --local``."""

    def __init__(self, folder: Path, *options: str, args: tuple[str, ...] = (), script: str = TRAIN) -> None:
        train = folder / "train.py"
        train.write_text(script)
        self.run_dir = folder / "elastic-logs" / "local.0"
        self.output = folder / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [str(SRUN), *options, str(train), *args], cwd=folder, stdout=output, stderr=subprocess.STDOUT
            )

    def close(self) -> None:
        for asked in range(1, 4):  # signals: save, stop, kill
            if self.process.poll() is None:
                self.process.send_signal((signal.SIGTERM, signal.SIGINT)[asked % 2])  # the same again may count once
                while self.process.poll() is None and self._stopping() < asked < 3:
                    time.sleep(0.05)
        self.process.wait(timeout=60)

    def _stopping(self) -> int:
        return self.output.read_text().count("elastic-srun: stopping")

    def wait_for(self, what: Callable[[], object], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.output.read_text()
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)

    def stepped(self, round: int, rank: int) -> list[int]:
        """pid, world size and restart count of ``rank`` once it has stepped in ``round``."""
        path = self.run_dir / f"stepped.{round}.{rank}"
        words: list[str] = []

        def look() -> bool:
            words[:] = path.read_text().split() if path.exists() else []  # the worker rewrites the file at each step
            return bool(words)

        self.wait_for(look)
        return [int(word) for word in words]

    def agent(self, node: int) -> int:
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            if f"ELASTIC_HPC_LOCAL_NODE={node}\0" in Path(f"/proc/{pid}/environ").read_text():
                return int(pid)
        raise AssertionError(f"no agent {node}")

    def standbys(self) -> set[int]:
        agents = [str(self.agent(0)), str(self.agent(1))]
        children = [int(pid) for a in agents for pid in Path(f"/proc/{a}/task/{a}/children").read_text().split()]
        commands = {}
        for pid in children:
            with contextlib.suppress(OSError):  # the process has just ended
                commands[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
        return {pid for pid, command in commands.items() if b"/standby.py\0" in command}

    def marked(self) -> list[int]:
        """Workers and standbys, and all processes that they have started."""
        return marked(f"ELASTIC_HPC_RUN_DIR={self.run_dir}\0".encode())

    def finish(self) -> int:
        (self.run_dir / "enough").touch()
        return self.process.wait(timeout=60)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in RunDir(self.run_dir).events() if event["event"] == name]

    def verdict(self) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.run_dir / "verdict.json").read_text())
        return found


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Callable[..., Local]]:
    with contextlib.ExitStack() as jobs:
        yield lambda *options, **how: jobs.enter_context(contextlib.closing(Local(tmp_path, *options, **how)))


def test_training_survives_a_killed_worker_then_a_killed_agent(local: Callable[..., Local]) -> None:
    awkward = ("--lr", "1e-3", "", "a b", "$HOME ${local_rank} $$", "it's", "ü\n")
    job = local("--local", "3", "--nodes", "2:3", args=awkward)
    pid, world, restarts = job.stepped(1, 2)
    assert (world, restarts) == (3, 0)
    os.kill(pid, signal.SIGKILL)
    pid, world, restarts = job.stepped(2, 2)
    assert (world, restarts) == (3, 1)
    job.wait_for(lambda: written(job.run_dir, 2, 2))  # the output of the last second would be lost with the agent
    os.kill(job.agent(2), signal.SIGKILL)
    assert job.stepped(3, 0)[1:] == job.stepped(3, 1)[1:] == [2, 2]
    job.wait_for(lambda: not Path(f"/proc/{pid}").exists())  # the lost agent's guard has killed its worker
    assert job.finish() == 0
    assert (job.verdict()["outcome"], job.verdict()["restarts"]) == ("finished", 2)
    assert tuple(json.loads((job.run_dir / "args.0").read_text())) == awkward
    for round, ranks in ((1, 3), (2, 3), (3, 2)):
        for rank in range(ranks):
            assert f"round {round} rank {rank}" in written(job.run_dir, round, rank)
    assert "[rank0]: round 3 rank 0" in job.output.read_text()
    assert "[rank1]: " not in job.output.read_text(), "by default only rank 0 is shown"


def test_a_node_that_is_slower_than_the_others_is_left_at_a_step_boundary(local: Callable[..., Local]) -> None:
    uneven = LISTEN.replace("(step)", "(step, own_seconds=0.2 if rank == 2 else 0.1)").replace("0.02", "0.01")
    uneven = uneven.replace("drain_requested()", "drain_requested(every=10)")
    job = local("--local", "3", "--nodes", "2:3", "--slow-node", "1.5:leave", script=uneven)
    job.wait_for(lambda: job.events("slow"), 180)
    assert job.stepped(2, 0)[1:] == job.stepped(2, 1)[1:] == [2, 0]
    (slow,) = job.events("slow")
    assert (slow["node"], slow["times"]) == ("local2", 2)
    assert [event["node"] for event in job.events("leave")] == ["local2"]
    assert (job.run_dir / "saved.1.0").exists()
    assert (job.events("lost"), job.events("failure")) == ([], [])


def test_the_next_round_works_in_a_recreated_working_directory(tmp_path: Path, local: Callable[..., Local]) -> None:
    job = local("--local", "1", "--nodes", "1", "--preload", "off", script=ANEW)
    job.wait_for((job.run_dir / "began").exists)
    work = job.output.parent
    work.rename(work.with_name("old"))
    shutil.copytree(work.with_name("old"), work)
    shutil.rmtree(work.with_name("old"))
    (job.run_dir / "anew").touch()
    assert job.process.wait(timeout=60) == 0, job.output.read_text()
    assert (job.run_dir / "cwd").read_text() == str(work)


def listened(pids: Iterable[int]) -> set[str]:
    """The addresses on which the processes ``pids`` listen, as the kernel writes them."""
    inodes = set()
    for pid in pids:
        for name in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(name).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path("/proc/self/net", kind).read_text().splitlines()]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_local_agents_and_workers_listen_only_on_loopback(local: Callable[..., Local]) -> None:
    job = local("--local", "2")
    job.stepped(1, 1)
    assert listened([job.agent(0), job.agent(1), *job.marked()]) == {"0100007F"}
    assert job.finish() == 0


def test_the_next_workers_are_the_waiting_standbys(local: Callable[..., Local]) -> None:
    job = local("--local", "2", "--preload", "torch,elastic_hpc.training", script=LISTEN)
    pid = job.stepped(1, 1)[0]
    assert pid not in job.standbys()
    job.wait_for(lambda: job.events("started") and len(job.standbys()) == 2)
    standbys = job.standbys()
    os.kill(pid, signal.SIGKILL)
    assert {job.stepped(2, 0)[0], job.stepped(2, 1)[0]} == standbys
    job.wait_for(lambda: len(job.events("started")) == 2)
    assert [(event["round"], event["warm"], event["cold"]) for event in job.events("started")] == [(1, 2, 0), (2, 2, 0)]
    assert all(event["standby_mb"] > 10 for event in job.events("started"))
    waiting_for_the_end = job.standbys()
    job.process.send_signal(signal.SIGINT)
    assert job.process.wait(timeout=60) == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in waiting_for_the_end)


def test_variables_that_a_script_sets_before_it_imports_torch_hold_in_each_round(local: Callable[..., Local]) -> None:
    """In the first round the scripts in the standbys restart; the next standbys have imported torch with these
    variables.
    """
    sets = "import os, time\nprint('begins', flush=True)\ntime.sleep(0.3)  # the agent has read that\n"
    sets += "os.environ.update(TORCH_LOGS='+dynamo', TORCH_COMPILE_DISABLE='1')\n"
    looks = "import logging, torch._dynamo.config\n"
    looks += "print('seen', logging.getLogger('torch._dynamo').level, torch._dynamo.config.disable, flush=True)\n"
    job = local("--local", "2", script=sets + looks + LISTEN)
    pid = job.stepped(1, 1)[0]
    job.wait_for(lambda: job.events("started") and len(job.standbys()) == 2)
    os.kill(pid, signal.SIGKILL)
    assert job.stepped(2, 1)[0] != pid
    job.wait_for(lambda: len(job.events("started")) == 2)
    for number in (1, 2):
        job.wait_for(lambda number=number: written(job.run_dir, number, 1).startswith("begins\nseen 10 True\n"))
    first, second = job.events("started")
    assert (first["warm"], first["cold"], second["warm"], second["cold"]) == (0, 2, 2, 0)
    assert first["why"] == ["TORCH_COMPILE_DISABLE was set before torch was imported"]
    job.process.send_signal(signal.SIGINT)
    assert job.process.wait(timeout=60) == 130


def test_processes_of_a_worker_in_a_session_of_their_own_end_with_the_round_but_the_standbys_do_not(
    local: Callable[..., Local],
) -> None:
    job = local("--local", "2", "--preload", "torch", script=LEAVES + TRAIN)
    pids = [job.stepped(1, rank)[0] for rank in (0, 1)]
    left = int((job.run_dir / "left").read_text())
    job.wait_for(lambda: len(job.standbys()) == 2)
    standbys = job.standbys()
    assert left in job.marked()
    os.kill(pids[1], signal.SIGKILL)
    assert {job.stepped(2, rank)[0] for rank in (0, 1)} == standbys
    assert left not in job.marked()
    assert job.finish() == 0


def test_a_worker_without_its_environment_is_killed_with_its_round(local: Callable[..., Local]) -> None:
    job = local("--standalone", "--nproc-per-node", "2", script=FORGETS + TRAIN)
    assert job.stepped(2, 0)[1:] == [2, 1]
    assert job.finish() == 0


def test_without_standbys_every_worker_starts_cold(local: Callable[..., Local]) -> None:
    job = local("--local", "2", "--preload", "off", script=LISTEN)
    job.stepped(1, 1)
    job.wait_for(lambda: job.events("started"))
    event = job.events("started")[0]
    assert (event["warm"], event["cold"], event["why"]) == (0, 2, ["--preload off"])


def test_a_second_ctrl_c_stops_even_a_script_that_does_not_listen(local: Callable[..., Local]) -> None:
    job = local("--local", "2", "--nodes", "2")
    pid = job.stepped(1, 1)[0]
    job.process.send_signal(signal.SIGINT)
    job.wait_for(lambda: "the workers may save first; once more to stop them at once" in job.output.read_text())
    time.sleep(agents._SAME)
    job.process.send_signal(signal.SIGINT)
    assert job.process.wait(timeout=30) == 130
    assert job.verdict()["reason"] == "stopped by the user"
    assert job.output.read_text().count("stopped by the user") == 1, "the leader says it, once"
    assert not Path(f"/proc/{pid}").exists()


def test_a_second_signal_during_the_handling_of_the_first_is_handled_next(local: Callable[..., Local]) -> None:
    job = local("--standalone", "--nproc-per-node", "2")
    pid = job.stepped(1, 1)[0]
    job.process.send_signal(signal.SIGINT)
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(timeout=30) == 130, job.output.read_text()
    assert job.verdict()["reason"] == "stopped by the user"
    assert not Path(f"/proc/{pid}").exists()


def test_ctrl_c_lets_a_script_that_listens_save_and_has_no_effect_in_later_rounds(
    local: Callable[..., Local],
) -> None:
    job = local("--local", "2", "--nodes", "2", script=LISTEN)
    os.kill(job.stepped(1, 1)[0], signal.SIGKILL)
    assert job.stepped(2, 1)[1:] == [2, 1]
    job.process.send_signal(signal.SIGINT)
    assert job.process.wait(timeout=60) == 130
    verdict = job.verdict()
    assert (verdict["outcome"], verdict["cause"]) == ("failed", "user")
    assert verdict["reason"] == "stopped by the user; the workers saved and stopped"
    saved = [(job.run_dir / f"saved.{round}.{rank}").exists() for round in (1, 2) for rank in (0, 1)]
    assert saved == [False, False, True, True]


def test_a_worker_that_is_stopped_is_noticed_and_restarted(local: Callable[..., Local]) -> None:
    job = local("--local", "2", "--nodes", "2", "--heartbeat-timeout", "1")
    pid = job.stepped(1, 1)[0]
    os.kill(pid, signal.SIGSTOP)
    assert job.stepped(2, 1)[1:] == [2, 1]
    assert not Path(f"/proc/{pid}").exists()
    assert job.finish() == 0
    (failure,) = [event for event in job.events("failure") if event["first"]]
    assert (failure["kind"], failure["node"]) == ("stopped", "local1")


def test_the_job_continues_without_the_agent_that_led(local: Callable[..., Local]) -> None:
    job = local("--local", "3", "--nodes", "2:3", "--heartbeat-timeout", "2")
    job.stepped(1, 2)
    os.kill(job.agent(0), signal.SIGKILL)
    job.wait_for(lambda: len(job.events("round")) == 2)
    assert [event["round"] > 1 for event in job.events("take_over")] == [True]
    round = job.events("round")[1]["round"]
    assert job.stepped(round, 0)[1:] == job.stepped(round, 1)[1:] == [2, 1]
    assert job.finish() == 0
    assert (job.verdict()["outcome"], job.verdict()["restarts"]) == ("finished", 1)


def test_fewer_than_min_ends_a_job_that_cannot_be_requeued(local: Callable[..., Local]) -> None:
    job = local("--local", "2", "--nodes", "2", "--heartbeat-timeout", "1")
    job.stepped(1, 1)
    os.kill(job.agent(1), signal.SIGKILL)
    assert job.process.wait(timeout=30) == 1
    assert job.verdict()["reason"] == "1 nodes are left, fewer than MIN 2; this job cannot be requeued"


def test_the_last_output_of_the_last_worker_is_shown(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("print('loading', flush=True)\nraise ValueError('no such data set')\n")
    command = [str(SRUN), "--standalone", "--max-restarts", "0", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "[rank0]: loading" in done.stdout
    assert "[rank0]: ValueError: no such data set" in done.stderr
    assert done.stderr.count("Traceback") == 1, "the worker's own"
    assert done.stderr.count("failed: rank 0 on local0: ValueError: no such data set") == 1, "the leader's verdict"


@pytest.mark.parametrize(
    ("options", "here", "agents"),
    [
        ([], 4, 4),
        (["--nodes", "1:2"], 4, 2),
        (["--nodes", "1:2", "--spares", "1"], 4, 3),
        (["--nodes", "2,3", "--spares", "9"], 4, 4),
        (["--spares", "1"], 4, 4),
    ],
)
def test_agents_start_on_max_nodes_and_on_the_available_spares(options: list[str], here: int, agents: int) -> None:
    _, count = _request(_read([*options, __file__]), here)
    assert count == agents


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "8-4"], "--nodes '8-4': expected N or MIN:MAX"),
        *(
            (["--local", "2", option], f"elastic-srun: {option}: is for jobs that elastic-sbatch submits; elastic-srun")
            for option in ("--grow", "--grow-partition=gpu", "--max-requeues=3", "--setup=true", "--requeue", "--wait")
        ),
        (["--local", "2", "--free-growth", "on"], "--free-growth on: expected the value after '=', for example"),
        (
            ["--local", "2", "--wait-for-nodes=9"],
            "--wait-for-nodes=9 with --local: no node returns to such a run; leave",
        ),
        (["--standalone", "--free-growth"], "elastic-srun: --free-growth with --standalone: no node returns to such"),
        (["--grow-every", "5", "--standalone"], "elastic-srun: --grow-every=5 with --standalone: no node returns to"),
        (["--local", "2", "--standalone"], "elastic-srun: --local with --standalone: only one of them"),
        (["--local", "2", "--node_rank=1"], "elastic-srun: --node-rank 1: one command starts the agents of all nodes"),
        (["--local", "2", "-p", "gpu"], "--partition: is for the allocation that elastic-srun runs in, for example: "),
        (["--local", "2", "--max-restart=1"], "--max-restart: unknown option; did you mean --max-restarts?"),
        (["--bogus"], "elastic-srun: --bogus: unknown option; elastic-srun --help lists all options"),
        (["--node"], "elastic-srun: --node: unknown option; did you mean --nodelist or --nodes?"),
        (["--local", "2", "--ntasks=4"], "elastic-srun: --ntasks=4: elastic-srun starts one agent on each node; leave"),
        (["-m"], "or run on this machine alone: elastic-srun --standalone -m "),
        (["--local", "2", "--no-python", "-m"], "--no-python with --module: a module needs Python"),
        (["--local", "2", "--no-python"], "train.py: expected a program that can be run"),
        (
            ["--local", "2", "--nproc-per-node", "1", "--world-multiple-of", "4"],
            "--world-multiple-of 4: no number of nodes in --nodes 1:2 fits",
        ),
        (["--local", "0"], "--local '0': expected a number of agents above 0"),
        (["--local", "2", "--nodes", "3:4"], "--nodes 3:4: expected at most the 2 nodes there are"),
        ([], "not inside a Slurm allocation"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, options: list[str], message: str) -> None:
    script = tmp_path / "train.py"
    script.touch()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run([str(SRUN), *options, str(script)], capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "elastic-logs").exists()


def test_a_missing_script_and_a_missing_value_are_reported_by_name(tmp_path: Path) -> None:
    for options, message in (
        (["--local", "2"], "expected SCRIPT; usage: elastic-srun [options] SCRIPT [ARGS...]"),
        (["--grace"], "--grace: expected a value: --grace TIME"),
    ):
        done = subprocess.run([str(SRUN), *options], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (2, f"elastic-srun: {message}\n")


def test_a_script_may_have_the_name_of_an_option(tmp_path: Path) -> None:
    (tmp_path / "-x.py").write_text("import sys\nprint(sys.argv)\n")
    command = [str(SRUN), "--local", "1", "--preload", "off", "--", "-x.py", "-h"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert "[rank0]: ['./-x.py', '-h']" in done.stdout
    assert done.returncode == 0


def test_the_help_has_no_option_without_effect_in_an_allocation() -> None:
    done = subprocess.run([str(SRUN), "--help"], capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^  (?:-\w, )?--([a-z-]+)", done.stdout, re.MULTILINE))
    assert {"nodes", "free-growth", "local", "no-python"} <= listed
    assert not listed & {"grow", "yield-to", "yield-every", "max-requeues", "again"}
    assert not re.search("requeue|growth", done.stdout.replace("--free-growth", ""))


SHOW = """#!/bin/bash
echo "rank $RANK of $WORLD_SIZE, $ROLE_NAME $*"
[ "$LOCAL_RANK" != 1 ] || echo hidden
exec "$PYTHON" -c 'import os, torch.distributed as dist; dist.init_process_group("gloo"); print("formed", flush=True)'
"""


def test_any_program_can_be_a_worker_under_torchruns_own_options(tmp_path: Path) -> None:
    program = tmp_path / "run.sh"
    program.write_text(SHOW)
    program.chmod(0o755)
    options = "--standalone --nnodes=1 --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=localhost:0"
    options += " --tee 3 -r 0:1 --max_restarts=0 --role=trainer --local_ranks_filter=0 --monitor_interval=1 --no_python"
    options += " --ntasks_per_node=1"
    for start in (["./run.sh"], ["bash", "run.sh"]):
        done = subprocess.run(
            [str(SRUN), *options.split(), *start, "--epochs", "$2"],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "[rank0]: rank 0 of 2, trainer --epochs $2" in done.stdout
        assert done.stdout.count("formed") == 1
        assert "hidden" not in done.stdout
        run_dir = max((tmp_path / "elastic-logs").iterdir())
        assert "hidden" in written(run_dir, 1, 1)
        started = next(e for e in RunDir(run_dir).events() if e["event"] == "started")
        assert "--no-python" in json.dumps(started)


def test_options_of_the_interpreter_reach_agents_and_warm_and_cold_workers(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\n"
        "print('dev', sys.flags.dev_mode, sys.orig_argv[1:])\n"
        "sys.exit(os.environ['TORCHELASTIC_RESTART_COUNT'] == '0')\n"
    )
    for preload in ("json", "off"):
        agent = [sys.executable, "-X", "dev", "-W", "ignore", "-u", "-m", "elastic_hpc.agent", f"--preload={preload}"]
        run_dir = tmp_path / preload
        environ = {**os.environ, "ELASTIC_HPC_LOCAL_NODE": "0", "ELASTIC_HPC_LOCAL_NODES": "1"}
        command = [*agent, "--max-restarts=1", "--run-dir", str(run_dir), "--", str(script)]
        subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, check=True, timeout=60)
        for round in (1, 2):
            assert written(run_dir, round, 0) == f"dev True ['-X', 'dev', '-W', 'ignore', '-u', '{script}']\n"


def test_the_verdict_of_an_agent_that_found_no_leader_does_not_end_a_job_that_the_others_continue(
    local: Callable[..., Local],
) -> None:
    """The other agents freeze for longer than that agent waits, as on a machine without CPU time."""
    job = local("--local", "3", "--nodes", "2:3", "--heartbeat-timeout", "1")
    job.stepped(1, 2)
    agents = [job.agent(0), job.agent(1)]
    for pid in agents:
        os.kill(pid, signal.SIGSTOP)
    verdict = job.run_dir / "verdict.json"
    job.wait_for(verdict.exists)
    assert job.verdict()["outcome"] == "failed", "a job without a queue cannot be requeued"
    for pid in agents:
        os.kill(pid, signal.SIGCONT)
    job.wait_for(lambda: not verdict.exists())
    job.wait_for(lambda: len(job.events("round")) == 2)
    assert job.events("round")[1]["nodes"] == ["local0", "local1"]
    assert [event["node"] for event in job.events("withdrawn")] == ["local2"]
    assert job.stepped(int(job.events("round")[1]["round"]), 0)[1] == 2
    assert job.finish() == 0
    assert job.verdict()["outcome"] == "finished"
