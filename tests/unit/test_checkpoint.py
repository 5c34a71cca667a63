"""Checkpoints of real worlds in real folders."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from elastic_hpc.errors import UsageError
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.training.checkpoint import CheckpointError, CheckpointReader, Checkpoints, control_group
from elastic_hpc.training.fences import FencedOut

DEADLINE_S = 60.0
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "torch.nn.parallel"])


# --- worlds ---------------------------------------------------------------------------------------------------------


def worker(rank: int, size: int, port: int, environ: dict[str, str], body: Callable[..., Any], given: Any, out: Any):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(environ, GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    if size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    out.send(body(*given))
    if size > 1:
        dist.destroy_process_group()


@contextmanager
def started(size: int, body: Callable[..., Any], *given: Any, **environ: Any) -> Iterator[list[tuple[Any, Connection]]]:
    """A world of ``size`` processes that run ``body(*given)``: each process, with the connection for its result."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = {name: str(value) for name, value in environ.items()}
    world = []
    for rank in range(size):
        answers, out = processes.Pipe(duplex=False)
        process = processes.Process(target=worker, args=(rank, size, port, text, body, given, out))
        process.start()
        out.close()
        world.append((process, answers))
    try:
        yield world
    finally:
        for process, answers in world:
            process.kill()
            process.join()
            answers.close()


def answer(connection: Connection) -> Any:
    assert connection.poll(DEADLINE_S), "no answer in time"
    return connection.recv()


def run_world(size: int, body: Callable[..., Any], *given: Any, **environ: Any) -> list[Any]:
    """The results of ``body(*given)`` on all ranks."""
    with started(size, body, *given, **environ) as world:
        answers = [answer(connection) for _, connection in world]
        for process, _ in world:
            process.join(DEADLINE_S)
            assert process.exitcode == 0
    return answers


def raised(action: Callable[[], Any]) -> str:
    """Type, text and cause of the exception that ``action`` raises."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - whatever it is
        return f"{type(error).__name__}: {error} <- {type(error.__cause__).__name__}"
    return "nothing"


def names(folder: Path) -> list[str]:
    """The names in ``folder``, without fences."""
    return sorted(name for name in os.listdir(folder) if not name.startswith(".fence."))


def save(checkpoints: Checkpoints, step: int, text: str = "") -> None:
    with checkpoints.save(step) as path:
        (path / "state").write_text(text or str(step))


def read(path: Path) -> str:
    return (path / "state").read_text()


@pytest.fixture(autouse=True)
def no_agent(monkeypatch):
    for name in ("ELASTIC_HPC_FENCE", "ELASTIC_HPC_RUN_DIR", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


# --- one process ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_appears_when_it_is_complete_and_old_ones_are_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path / "deep" / "checkpoints", keep=2)
    assert checkpoints.load(read) is None
    for step in (1, 2, 3):
        with checkpoints.save(step) as path:
            (path / "state").write_text(str(step))
            assert path not in checkpoints.newest_first()
    assert names(checkpoints.folder) == ["step-00000002", "step-00000003"]
    assert checkpoints.load(read) == "3"


def test_checkpoints_lie_in_the_run_directory_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Checkpoints().folder == tmp_path / "checkpoints"
    monkeypatch.setenv("ELASTIC_HPC_RUN_DIR", str(tmp_path / "run"))
    assert Checkpoints().folder == tmp_path / "run" / "checkpoints"


def test_saving_a_step_again_replaces_it(tmp_path):
    for text in ("first", "second", "third"):
        save(Checkpoints(tmp_path), 5, text)
        assert Checkpoints(tmp_path).load(read) == text
        assert len(names(tmp_path)) == 1


def test_a_failed_save_leaves_the_previous_checkpoint_and_no_partial_files(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)

    def fail():
        with checkpoints.save(2) as path:
            (path / "state").write_text("half")
            raise OSError(28, "No space left on device")

    assert "no checkpoint of step 2" in raised(fail)
    assert "No space left on device <- OSError" in raised(fail)
    assert names(tmp_path) == ["step-00000001"]
    save(checkpoints, 2)
    assert checkpoints.load(read) == "2"


def test_a_damaged_checkpoint_is_skipped_with_a_warning_and_not_counted(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    (tmp_path / "step-00000002").mkdir()
    assert checkpoints.load(read) == "1"
    assert str(tmp_path / "step-00000002") in caplog.text
    assert "FileNotFoundError" in caplog.text
    save(checkpoints, 1, "again")  # the checkpoint just saved is never pruned in favour of a later step
    assert checkpoints.load(read) == "again"
    save(checkpoints, 2)
    assert checkpoints.load(read) == "2"
    assert len(names(tmp_path)) == 1


def test_training_does_not_restart_from_zero_because_no_checkpoint_loads(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, "not JSON")
    with pytest.raises(CheckpointError, match=r"step-00000001.*JSONDecodeError.*fix the loader"):
        checkpoints.load(lambda path: json.loads(read(path)))


def test_senseless_arguments_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(UsageError, match=r"save\(-1\)"), Checkpoints(tmp_path).save(-1):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="init_process_group"):
        Checkpoints(tmp_path)


def test_a_later_round_shuts_out_an_earlier_one_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTIC_HPC_FENCE", "job.0.9")
    old = Checkpoints(tmp_path)
    save(old, 1)
    monkeypatch.setenv("ELASTIC_HPC_FENCE", "job.0.10")
    new = Checkpoints(tmp_path)
    said = "opened by round 10 of run 1 of this job; this is round 9"
    with pytest.raises(FencedOut, match=said), old.save(2):
        pytest.fail("the block was entered")
    assert names(tmp_path) == ["step-00000001"]
    save(new, 2)
    monkeypatch.setenv("ELASTIC_HPC_FENCE", "job.0.9")
    with pytest.raises(FencedOut, match="round 10"):
        Checkpoints(tmp_path)


# --- several jobs in one folder -------------------------------------------------------------------------------------


class Job:
    """A job with a run directory in which a leader is active until ``end`` or ``die``."""

    def __init__(self, path: Path, run: int = 0) -> None:
        self.rundir, self.run = RunDir(path).create(), run
        self.rundir.make_secret()
        self.rundir.write("spec.json", {"--heartbeat-timeout": "0.5"})
        self.rundir.write("endpoint.json", {"run": run})
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._over.wait(0.1):
            os.utime(self.rundir.path / "endpoint.json")

    def die(self) -> None:
        self._over.set()
        self._thread.join()

    def end(self) -> None:
        self.rundir.write("verdict.json", {"run": self.run})
        self.die()

    def checkpoints(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, round: int = 1) -> Checkpoints:
        """The checkpoints as a worker of this job opens them."""
        with monkeypatch.context() as patch:
            patch.setenv("ELASTIC_HPC_FENCE", f"{self.rundir.identity()}.{self.run}.{round}")
            patch.setenv("ELASTIC_HPC_RUN_DIR", str(self.rundir.path))
            return Checkpoints(folder)


@pytest.fixture
def jobs(tmp_path) -> Iterator[Callable[..., Job]]:
    """Creates jobs by name."""
    made = []

    def make(name: str, run: int = 0) -> Job:
        made.append(Job(tmp_path / name, run))
        return made[-1]

    yield make
    for job in made:
        job.die()


@pytest.mark.parametrize("how", ["end", "die"])
def test_a_job_continues_where_another_job_has_ended_with_a_message_whatever_their_rounds(
    tmp_path, monkeypatch, jobs, how, caplog
):
    folder = tmp_path / "checkpoints"
    first = jobs("first")
    before = first.checkpoints(folder, monkeypatch, round=9)
    save(before, 1)
    save(first.checkpoints(folder, monkeypatch, round=10), 1)
    assert not caplog.messages
    getattr(first, how)()
    after = jobs("second").checkpoints(folder, monkeypatch)
    assert "has checkpoints of job first, the newest of step 1: this job continues from them" in caplog.text
    assert after.load(read) == "1"
    with pytest.raises(FencedOut, match="job second has opened the folder"):
        save(before, 2)
    save(after, 2)


def test_a_job_is_refused_where_another_job_is_alive_and_does_no_harm(tmp_path, monkeypatch, jobs):
    folder = tmp_path / "checkpoints"
    first, second = jobs("first"), jobs("second")
    owner = first.checkpoints(folder, monkeypatch)
    save(owner, 1)
    before = sorted(os.listdir(folder))
    for _ in range(2):
        with pytest.raises(FencedOut, match=r"belongs to job first, which is alive.*CheckpointReader"):
            second.checkpoints(folder, monkeypatch, round=7)
    assert sorted(os.listdir(folder)) == before
    with pytest.raises(FencedOut, match="job first, which is alive"):
        Checkpoints(folder)  # in a process without an agent
    save(owner, 2)
    first.die()
    save(second.checkpoints(folder, monkeypatch, round=7), 3)
    with pytest.raises(FencedOut, match="job second"):
        save(owner, 3)


def test_a_job_whose_run_directory_was_removed_is_not_confused_with_the_new_one_there(tmp_path, monkeypatch, jobs):
    folder, first = tmp_path / "checkpoints", jobs("local.0")
    save(first.checkpoints(folder, monkeypatch, round=9), 1)
    first.die()
    shutil.rmtree(first.rundir.path)
    assert jobs("local.0").checkpoints(folder, monkeypatch).load(read) == "1"


def test_a_job_in_a_later_run_is_alive_although_its_previous_run_has_ended(tmp_path, monkeypatch, jobs):
    folder, first = tmp_path / "checkpoints", jobs("first")
    save(first.checkpoints(folder, monkeypatch), 1)
    first.end()
    jobs("first", run=1)
    with pytest.raises(FencedOut, match="job first, which is alive"):
        jobs("second").checkpoints(folder, monkeypatch)


def test_without_an_agent_the_last_process_to_open_the_folder_owns_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTIC_HPC_FENCE", "job.0.7")
    within = Checkpoints(tmp_path)
    save(within, 1)
    monkeypatch.delenv("ELASTIC_HPC_FENCE")
    outside = Checkpoints(tmp_path)
    assert outside.load(read) == "1"
    with pytest.raises(FencedOut, match="a process without an agent"):
        save(within, 2)
    save(Checkpoints(tmp_path), 2)
    save(outside, 3)  # also of the same process
    assert run_world(1, one_writes, tmp_path)[0][0] == "3"
    with pytest.raises(FencedOut):
        save(outside, 5)


# --- readers --------------------------------------------------------------------------------------------------------


def test_a_reader_changes_nothing_and_the_training_continues(tmp_path, monkeypatch, jobs):
    folder = tmp_path / "checkpoints"
    training = jobs("training").checkpoints(folder, monkeypatch)
    save(training, 1)
    with training.save(2) as path:
        (path / "state").write_text("2")
        before = sorted(os.listdir(folder))
        os.chmod(folder, 0o500)
        assert CheckpointReader(folder).load(read) == "1"
        assert sorted(os.listdir(folder)) == before
        os.chmod(folder, 0o700)
    assert [path.name for path in CheckpointReader(folder).newest_first()] == ["step-00000002", "step-00000001"]
    with pytest.raises(CheckpointError, match=r"cannot list .*missing; FileNotFoundError"):
        CheckpointReader(tmp_path / "missing").load(read)
    assert not (tmp_path / "missing").exists()


def test_a_reader_whose_checkpoints_are_pruned_while_it_reads_takes_the_new_ones(tmp_path):
    training = Checkpoints(tmp_path, keep=1)
    save(training, 1)
    tries = []

    def slow(path: Path) -> str:
        tries.append(path.name)
        if len(tries) < 3:
            save(training, len(tries) + 1)
        return read(path)

    assert CheckpointReader(tmp_path).load(slow) == "3"
    assert tries == ["step-00000001", "step-00000002", "step-00000003"]


# --- worlds of several processes ------------------------------------------------------------------------------------


def one_writes(folder: Path) -> tuple[str | None, list[str]]:
    checkpoints = Checkpoints(folder)
    found = checkpoints.load(read)
    with checkpoints.save(int(found or 0) + 1) as path:
        if os.environ["RANK"] == "0":
            (path / "state").write_text(str(int(found or 0) + 1))
    return found, [path.name for path in checkpoints.newest_first()]


def test_all_ranks_continue_from_what_one_rank_has_saved(tmp_path):
    both = [(None, ["step-00000001"])] * 2
    assert run_world(2, one_writes, tmp_path) == both
    assert run_world(1, one_writes, tmp_path) == [("1", ["step-00000002", "step-00000001"])]


def sharded(folder: Path, steps: int) -> tuple[int, list[list[float]]]:
    """Train a little with parameters that are sharded over the ranks. Returns the step and all parameters before."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    size = int(os.environ["WORLD_SIZE"])
    full = torch.zeros(7, 2)
    parameters = distribute_tensor(full, init_device_mesh("cpu", (size,)), [Shard(0)]) if size > 1 else full
    state = {"parameters": parameters, "step": 0}
    checkpoints = Checkpoints(folder)

    def load(path: Path) -> int:
        dcp.load(state, checkpoint_id=path)
        return state["step"]

    step = checkpoints.load(load) or 0
    found = (parameters.full_tensor() if size > 1 else parameters).tolist()
    for _ in range(steps):
        parameters += distribute_tensor(torch.arange(14.0).view(7, 2), parameters.device_mesh, [Shard(0)])
        state["step"] = step = step + 1
        with checkpoints.save(step) as path:
            dcp.save(state, checkpoint_id=path)
    return step, found


def test_a_sharded_checkpoint_is_loaded_by_a_world_of_another_size(tmp_path):
    def expected(step: int) -> list[list[float]]:
        return [[step * 2.0 * row, step * (2.0 * row + 1)] for row in range(7)]

    assert run_world(2, sharded, tmp_path, 2, ELASTIC_HPC_FENCE="job.0.1") == [(2, expected(0))] * 2
    assert len(list((tmp_path / "step-00000002").glob("*.distcp"))) == 2
    assert run_world(3, sharded, tmp_path, 1, ELASTIC_HPC_FENCE="job.0.2") == [(3, expected(2))] * 3
    assert run_world(1, sharded, tmp_path, 0, ELASTIC_HPC_FENCE="job.0.3") == [(3, expected(3))]


def troubles(folder: Path) -> list[Any]:
    """The error on this rank for each of several troubles on rank 1 alone."""
    rank = int(os.environ["RANK"])
    checkpoints = Checkpoints(folder)
    save(checkpoints, 1)
    save(checkpoints, 2)

    def fail() -> None:
        with checkpoints.save(3) as path:
            (path / f"state.{rank}").write_text("half")
            if rank == 1:
                raise ValueError("no luck")

    def load(path: Path) -> str:
        if rank == 1 and path.name == "step-00000002":
            raise ValueError("cannot read")
        return path.name

    seen = [raised(fail), checkpoints.load(load)]
    os.environ["ELASTIC_HPC_FENCE"] = "job.0.2"
    seen.append(Checkpoints(folder).load(lambda path: path.name))  # also used to save 3 to a missing folder, below
    seen.append(raised(lambda: save(checkpoints, 3)).partition(":")[0])
    return [*seen, raised(lambda: Checkpoints(folder / "step-00000001" / "state")).partition(":")[0]]


def test_an_error_on_one_rank_is_the_same_error_on_all_ranks(tmp_path):
    first, second = run_world(2, troubles, tmp_path, ELASTIC_HPC_FENCE="job.0.1")
    assert "no checkpoint of step 3" in first[0]
    assert "rank 1: ValueError: no luck <- NoneType" in first[0]
    assert "rank 1: ValueError: no luck <- ValueError" in second[0]
    assert first[1:] == second[1:] == ["step-00000001", "step-00000002", "FencedOut", "CheckpointError"]
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def half_saved(folder: Path, gate: Connection) -> str:
    checkpoints = Checkpoints(folder)
    save(checkpoints, 1)

    def save_slowly() -> None:
        with checkpoints.save(2) as path:
            (path / "state").write_text("half")
            gate.send("inside")
            if os.environ["RANK"] == os.environ["SLOW"]:
                gate.recv()

    return raised(save_slowly)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_is_killed_while_it_saves_leaves_the_previous_checkpoint(tmp_path, victim):
    ours, theirs = processes.Pipe()
    with ours, theirs, started(2, half_saved, tmp_path, theirs, ELASTIC_HPC_FENCE="job.0.1", SLOW=victim) as world:
        assert [answer(ours), answer(ours)] == ["inside", "inside"]
        assert names(tmp_path) == [".tmp-step-00000002.job.0.1", "step-00000001"]
        world[victim][0].kill()
        assert answer(world[1 - victim][1]) != "nothing"
    assert "step-00000002" not in names(tmp_path)
    assert run_world(1, one_writes, tmp_path, ELASTIC_HPC_FENCE="job.0.2") == [
        ("1", ["step-00000002", "step-00000001"])
    ]
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_worker_that_slept_while_a_later_round_trained_cannot_save(tmp_path, monkeypatch):
    ours, theirs = processes.Pipe()
    with ours, theirs, started(1, half_saved, tmp_path, theirs, ELASTIC_HPC_FENCE="job.0.1", SLOW=0) as [(_, answers)]:
        assert answer(ours) == "inside"
        monkeypatch.setenv("ELASTIC_HPC_ROUND", "2")
        later = Checkpoints(tmp_path)
        assert later.load(read) == "1"
        ours.send("wake up")
        assert answer(answers).startswith("FencedOut")
        assert [path.name for path in later.newest_first()] == ["step-00000001"]
        save(later, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def group_ends() -> bool:
    import torch.distributed as dist

    control = control_group()
    assert control
    assert control[1] is control_group()[1]
    group = weakref.ref(control[1])
    del control
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the group that the worker destroys
    return group() is None


def test_the_control_group_ends_with_the_process_group():
    assert run_world(2, group_ends) == [True, True]
