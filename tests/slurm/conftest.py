"""A real Slurm for the tests of this directory, one for each test process, and the jobs that run on it.

The cluster is ``bin/mini-slurm``'s. Set MINI_SLURM_STATE to use a running cluster, which then stays up. With
MINI_SLURM_SITE=1 all tests use a cluster of ``up --site``.
"""

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import pytest

ROOT = Path(__file__).parents[2]
MINI = ROOT / "bin" / "mini-slurm"
COUNTS = str(Path(__file__).with_name("counts.py"))
sys.path.insert(0, str(ROOT / "benchmarks"))
from _cluster import reset, slurmctld  # noqa: E402
from _jobs import wrong_steps  # noqa: E402
from _processes import processes  # noqa: E402

from elastic_hpc.record.rundir import RunDir  # noqa: E402
from elastic_hpc.record.worker_logs import Logs, Wanted  # noqa: E402

os.umask(0o022)  # the cluster's user must be able to read the files of tests
signal.signal(signal.SIGINT, signal.default_int_handler)  # else "pytest &" and its children ignore SIGINT
STATE = Path(os.environ.get("MINI_SLURM_STATE", "/var/lib/mini-slurm-tests"))
if (process := os.environ.get("PYTEST_XDIST_WORKER", "gw0")) != "gw0":
    STATE = STATE.with_name(f"{STATE.name}-{process}")
ALL_ON_SITE = bool(os.environ.get("MINI_SLURM_SITE"))  # make test-site
os.environ["MINI_SLURM_STATE"] = str(STATE)  # for all callers of bin/mini-slurm


def pytest_itemcollected(item: pytest.Item) -> None:
    """The tests of this directory alone."""
    item.add_marker("slurm")
    if os.geteuid() != 0:
        item.add_marker(pytest.mark.skip(reason="a real Slurm needs root: sudo make test"))


T = TypeVar("T")


def wait_for(what: str, look: Callable[[], T | bool | None], deadline: float = 90) -> T:
    """The first answer of ``look`` that is not empty. Fails when ``deadline`` seconds have passed. Calls
    of ``look`` take at most a quarter of the time, because the processes that the test waits for need CPU time too.
    """
    end = (began := time.monotonic()) + deadline
    while not (found := look()):
        if (now := time.monotonic()) > end:
            pytest.fail(f"waited {deadline:g} s in vain for {what}")
        time.sleep(max(0.1, 3 * (now - began)))
        began = time.monotonic()
    return cast(T, found)


def what_runs(python: Sequence[str]) -> str:
    """The module or file in the command line ``python``; with -c, the module that our inline code runs."""
    if not python:  # the process is about to end
        return ""
    first = next((number for number, word in enumerate(python) if number and word[:1] != "-"), 0)
    return next(iter(python[first + (python[first - 1] == "-c") :]), "")


class Cluster:
    """The cluster as its unprivileged user sees it."""

    def __init__(self, state: Path = STATE) -> None:
        self.state = state

    def mini(self, *args: str, timeout: float = 180, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(MINI), "--state", str(self.state), *args],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            pytest.fail(f"mini-slurm {' '.join(args)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def command(self, argv: Sequence[str], node: str | None = None, cwd: Path | None = None) -> list[str]:
        """``argv`` as a command of the unprivileged user on the login machine or on ``node``."""
        at = ["env", f"--chdir={cwd}"] if cwd else []
        where = ["--node", node] if node else []
        return [str(MINI), "--state", str(self.state), "exec", *where, "--", *at, *argv]

    def exec(
        self,
        argv: Sequence[str],
        node: str | None = None,
        timeout: float = 60,
        *,
        check: bool = True,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        command = self.command(argv, node, cwd)
        done = subprocess.run(
            command, capture_output=True, text=True, errors="surrogateescape", timeout=timeout, check=False
        )
        if check and done.returncode:
            pytest.fail(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    @property
    def home(self) -> Path:
        return self.state / "home"

    def slurmctld(self, what: Literal["stop", "start"]) -> None:
        """Stop or start slurmctld. A start returns as soon as slurmctld answers."""
        slurmctld(self.state, what)
        if what == "start":
            wait_for("slurmctld", lambda: self.exec(["scontrol", "ping"], check=False).returncode == 0)

    @property
    def is_site(self) -> bool:
        """Whether the cluster is configured as sites do it."""
        return (self.state / "site").exists()

    def wait_noticed(self, *nodes: str) -> None:
        """Wait until Slurm knows that ``nodes`` are lost. On a site an administrator sets them DOWN: SlurmdTimeout is
        minutes.
        """
        if self.is_site:
            down = ["State=DOWN", "Reason=lost"]
            self.mini("exec", "--root", "--", "scontrol", "update", f"NodeName={','.join(nodes)}", *down)

        def noticed() -> bool:
            shown = json.loads(self.mini("status", "--json").stdout)["nodes"]
            return all("DOWN" in shown[node]["slurm"] for node in nodes)

        wait_for(f"Slurm to notice the loss of {' and '.join(nodes)}", noticed, 120)

    def seen_from_login(self, path: Path) -> Path:
        """``path`` as the machines see it, with their mounts."""
        init = (self.state / "machines" / "login").read_text().split()[0]
        return Path(f"/proc/{init}/root{path}")

    def job_field(self, job: str, name: str) -> str:
        shown = self.exec(["scontrol", "show", "job", "--oneliner", job]).stdout
        found = re.search(rf"\b{name}=(\S*)", shown)
        assert found, shown
        return found[1]

    def processes(self, word: str, node: str) -> list[int]:
        """Pids, as this machine sees them, of processes on ``node`` that have ``word``, or the path of a file of that
        name, as an argument.
        """
        found = processes(self.state, node)
        return [process.pid for process in found if word in {*process.argv, *map(os.path.basename, process.argv)}]

    def running(self, script: str, node: str) -> list[int]:
        """Pids of the Python processes on ``node`` that run a module or file of this name, without processes that will
        only start it.
        """
        found = [process for process in processes(self.state, node) if process.is_python]
        return [process.pid for process in found if os.path.basename(what_runs(process.argv)) == script]

    def agents(self, node: str) -> list[int]:
        return self.running("elastic_hpc.agent", node)

    def in_jobs(self, node: str) -> list[list[str]]:
        """Command lines of the processes of jobs on ``node``."""
        return [process.argv for process in processes(self.state, node) if process.job]

    def reset(self) -> None:
        """End all jobs, heal all nodes."""
        reset(self.state)


@dataclass
class Job:
    """A job of ours, and its run directory."""

    cluster: Cluster
    id: str
    folder: Path
    """The folder from which the job was submitted."""
    log_dir: Path = Path("elastic-logs")
    data: Path | None = None
    """Where the script records its steps, if not in the run directory."""

    @property
    def run_dir(self) -> Path:
        return self.folder / self.log_dir / self.id

    @staticmethod
    def lines(path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        return [event for event in RunDir(self.run_dir).events() if name in {None, event["event"]}]

    def steps(self) -> list[dict[str, Any]]:
        return self.lines((self.data or self.run_dir) / "steps.jsonl")

    def verdict(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_dir / "verdict.json").read_text())
        return found

    def output(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("slurm-*.out")))

    def worker_output(self) -> str:
        """The output of the workers, round after round; it survives the loss of srun."""
        return self.written(Wanted(streams=("out",)))

    def written(self, wanted: Wanted) -> str:
        return "".join(line.written for line in Logs(self.run_dir / "logs", wanted).written())

    def wait_event(self, name: str, count: int = 1, deadline: float = 90) -> dict[str, Any]:
        return wait_for(f"{count} x {name} of job {self.id}", lambda: self.events(name)[count - 1 : count], deadline)[0]

    def wait_steps(self, count: int, round: int = 1, deadline: float = 90) -> None:
        """Wait until ``round`` has done ``count`` steps."""
        wait_for(
            f"step {count} in round {round} of job {self.id}",
            lambda: sum(step["round"] == round for step in self.steps()) >= count,
            deadline,
        )

    def wait_state(self, *states: str, deadline: float = 150) -> str:
        return wait_for(
            f"job {self.id} to be {' or '.join(states)}",
            lambda: (state := self.cluster.job_field(self.id, "JobState")) in states and state,
            deadline,
        )

    def worlds(self) -> list[int]:
        """World sizes that did steps, in the order of the rounds."""
        return list({step["round"]: step["world_size"] for step in self.steps()}.values())

    def assert_steps_contiguous(self, checkpoint_every: int) -> None:
        """Every round continues right after a checkpoint and never skips or repeats a step of its own."""
        assert wrong_steps(self.steps(), checkpoint_every) == []


@contextlib.contextmanager
def started(state: Path, *options: str) -> Iterator[Cluster]:
    """The cluster in ``state``; started, and taken down at the end, unless it was up."""
    made = Cluster(state)
    was_up = made.mini("status", check=False).returncode == 0
    if not was_up:
        made.mini("down")
        made.mini("up", *options, timeout=600)
    made.reset()
    yield made
    if not was_up:
        made.mini("down")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the marker ``site`` runs on both clusters, the usual one and the site's. The arguments of the marker
    are marks for the run on the site's cluster.
    """
    if (marker := metafunc.definition.get_closest_marker("site")) and not ALL_ON_SITE:
        clusters = ["usual", pytest.param("site", marks=marker.args)]
        metafunc.parametrize("cluster", clusters, indirect=True, scope="module")


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Cluster:
    found: Cluster = request.getfixturevalue(getattr(request, "param", "usual"))
    return found


@pytest.fixture(scope="session")
def usual() -> Iterator[Cluster]:
    with started(STATE, *(["--site"] if ALL_ON_SITE else [])) as made:
        yield made


@pytest.fixture(scope="session")
def site(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster that is configured as sites do it. A module whose tests all run on it overrides ``cluster`` with it."""
    if ALL_ON_SITE:
        yield request.getfixturevalue("usual")
        return
    with started(STATE.with_name(f"{STATE.name}-site"), "--site") as made:
        yield made


@pytest.fixture
def fresh(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with all nodes idle, before and after the test."""
    yield cluster
    cluster.reset()


@pytest.fixture
def folder(fresh: Cluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of the unprivileged user on the shared file system."""
    path = fresh.home / re.sub(r"\W+", "_", request.node.name)[:60]
    fresh.exec(["mkdir", "-p", str(path)])
    yield path
    for record in path.rglob("events.*.jsonl"):  # pytest shows this output if the test has failed
        print(record, record.read_text(), sep="\n")
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def submit(fresh: Cluster, folder: Path) -> Callable[..., Job]:
    """Submit with elastic-sbatch: ``submit("--nodes", "2:4", ..., script=..., args=[...])``."""

    def do(*options: str, script: str | Path = ROOT / "examples" / "train_digits.py", args: Sequence[str] = ()) -> Job:
        done = fresh.exec(
            [str(Path(sys.executable).with_name("elastic-sbatch")), "--parsable", *options, str(script), *args],
            cwd=folder,
        )
        return Job(fresh, done.stdout.strip(), folder)

    return do
