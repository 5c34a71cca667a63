"""Why a worker died, determined from the traces of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import run

from elastic_hpc.membership.causes import Cause, explain, is_collateral, kind_of, signature
from elastic_hpc.membership.tracebacks import last_line, message_of, traceback_of
from elastic_hpc.workers.failures import stderr_tail


def die(script: str, tmp_path: Path, **environ: str) -> tuple[int, str]:
    """Run ``script``. Returns its exit code and its stderr."""
    path = tmp_path / "train.py"
    path.write_text(script)
    with (tmp_path / "err").open("wb") as err:
        done = subprocess.run(
            [sys.executable, path], stderr=err, env={**os.environ, **environ}, cwd=tmp_path, timeout=60, check=False
        )
    return done.returncode, stderr_tail(tmp_path / "err")


def death(script: str, tmp_path: Path, **environ: str) -> Cause:
    return explain(*die(script, tmp_path, **environ))


def test_an_exception_is_reported_with_its_traceback(tmp_path: Path) -> None:
    cause = death("def step(x):\n    return 1 / x\nprint('starting')\nstep(0)\n", tmp_path)
    assert (cause.kind, cause.message) == ("exception", "ZeroDivisionError: division by zero")
    assert cause.traceback
    assert cause.traceback.startswith("Traceback (most recent call last):\n")
    assert "in step\n    return 1 / x" in cause.traceback
    assert not cause.collateral


RANK = "(SLURM_PROCID is hidden from workers, which Slurm has not launched: use RANK)"


@pytest.mark.parametrize(
    ("script", "advice"),
    [
        ("rank = int(os.environ['SLURM_PROCID'])", RANK),
        ("rank = int(os.environ.get('SLURM_PROCID'))", RANK),
        ("try:\n    os.environ['SLURM_PROCID']\nexcept KeyError:\n    raise RuntimeError('start me by srun')", RANK),
        ("sys.exit('SLURM_PROCID is not set')", RANK),
        ("os.execlp('sh', 'sh', '-euc', 'echo $SLURM_PROCID')", RANK),
        ("os.environ['OMPI_COMM_WORLD_SIZE']", "use RANK, WORLD_SIZE and LOCAL_RANK)"),
        ("os.environ['SLURM_JOB_NODELIST']", "use MASTER_ADDR)"),
        (
            "from lightning_fabric.plugins.environments import SLURMEnvironment\nSLURMEnvironment().node_rank()",
            "(SLURM_NODEID is hidden from workers: remove SLURMEnvironment from the Trainer's plugins)",
        ),
    ],
)
def test_for_a_script_that_reads_slurms_task_variables_the_message_names_the_replacement(
    script: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_PROCID", "SLURM_NODEID", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    if "lightning" in script:
        pytest.importorskip("lightning_fabric")
    assert death(f"import os, sys\n{script}\n", tmp_path).message.endswith(advice)


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "DATA_DIR"])
def test_a_variable_that_is_not_hidden_is_not_mentioned(name: str, tmp_path: Path) -> None:
    rank = "rank = os.environ.get('SLURM_PROCID')\n"
    assert death(f"import os\n{rank}os.environ.pop('{name}', None)\nos.environ['{name}']\n", tmp_path).message == (
        f"KeyError: '{name}'"
    )


@pytest.mark.parametrize(
    ("between", "marker"), [("from error", "direct cause of"), ("", "During handling of the above exception")]
)
def test_chained_exceptions_are_reported_with_their_causes(tmp_path: Path, between: str, marker: str) -> None:
    script = f"try:\n    open('/none')\nexcept OSError as error:\n    raise RuntimeError('no data') {between}\n"
    cause = death("import sys\nprint('before', file=sys.stderr)\n" + script, tmp_path)
    assert cause.message == "RuntimeError: no data"
    assert cause.traceback
    assert marker in cause.traceback
    assert "FileNotFoundError: [Errno 2]" in cause.traceback
    assert "before" not in cause.traceback


def test_a_text_of_several_lines_and_a_note_are_part_of_the_message(tmp_path: Path) -> None:
    note = "error.add_note('look at shard 7')\n" if sys.version_info >= (3, 11) else ""
    cause = death(f"error = ValueError('bad shards:\\n  3\\n7')\n{note}raise error\n", tmp_path)
    assert cause.message == "ValueError: bad shards:\n  3\n7" + ("\nlook at shard 7" if note else "")


@pytest.mark.parametrize("imported", [False, True])
def test_a_syntax_error_is_reported(tmp_path: Path, *, imported: bool) -> None:
    (tmp_path / "model.py").write_text("x = = 1\n")
    cause = death("import model\n" if imported else "x = = 1\n", tmp_path)
    assert (cause.kind, cause.message) == ("exception", "SyntaxError: invalid syntax")
    assert cause.traceback
    assert ("model.py" if imported else "train.py") in cause.traceback


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_an_exception_group_is_reported_with_its_members(tmp_path: Path) -> None:
    script = """
try:
    raise KeyError('first')
except KeyError:
    raise ExceptionGroup('both failed', [ValueError('a'), ExceptionGroup('inner', [TypeError('b')])])
"""
    cause = death(script, tmp_path)
    assert cause.message.splitlines() == [
        "ExceptionGroup: both failed (2 sub-exceptions)",
        "ValueError: a",
        "ExceptionGroup: inner (1 sub-exception)",
        "TypeError: b",
    ]
    assert cause.traceback
    assert cause.traceback.endswith("+------------------------------------")


def test_an_error_that_did_not_end_the_process_is_not_the_cause(tmp_path: Path) -> None:
    script = """
import logging, sys, threading, warnings
class Leaky:
    def __del__(self): raise OSError('while it goes down')
keep = Leaky()
def side(): raise TypeError('in a thread')
try:
    raise LookupError('handled')
except LookupError:
    logging.exception('going on')
print('working', file=sys.stderr)
thread = threading.Thread(target=side); thread.start(); thread.join()
warnings.warn('noise')
def main(): raise ValueError('the cause')
print(' 50%|#####     | 5/10 [00:00<00:00]', end='', file=sys.stderr)
main()
"""
    cause = death(script, tmp_path)
    assert cause.message == "ValueError: the cause"
    assert cause.traceback
    assert cause.traceback.splitlines()[0] == "Traceback (most recent call last):"
    for other in ("handled", "in a thread", "goes down", "5/10"):
        assert other not in cause.traceback


def test_an_endless_recursion_is_reported_in_a_bounded_size(tmp_path: Path) -> None:
    script = "def a(n):\n    return b(n)  # far too often\ndef b(n):\n    return a(n)\na(0)\n"
    exitcode, stderr = die(script, tmp_path)
    assert len(stderr) == 64 * 1024  # the text was longer
    cause = explain(exitcode, stderr)
    assert cause.message.startswith("RecursionError: maximum recursion depth exceeded")
    assert cause.traceback
    assert len(cause.traceback) < 8300
    assert cause.traceback.startswith("Traceback")


def test_a_huge_message_leaves_the_type_and_the_place_visible(tmp_path: Path) -> None:
    cause = death("def load():\n    raise ValueError('x' * 20000)\nload()\n", tmp_path)
    assert cause.message == "ValueError: " + "x" * 1988
    assert cause.traceback
    assert "in load" in cause.traceback
    assert len(cause.traceback) < 8300


def test_an_exit_without_an_exception_is_reported_with_the_last_line(tmp_path: Path) -> None:
    assert death("import sys; sys.exit('no such data set')", tmp_path) == Cause(
        "exit", "exit code 1: no such data set", None
    )
    code = "import os, sys; sys.stderr.write('late\\n[W1122 21:53:02.5 socket.cpp:4] noise\\n\\n'); os._exit(3)"
    assert death(code, tmp_path) == Cause("exit", "exit code 3: late", None)
    assert death("import os; os._exit(4)", tmp_path) == Cause("exit", "exit code 4", None)


def test_a_signal_is_reported_by_name_and_with_the_stack_if_there_is_one(tmp_path: Path) -> None:
    killed = Cause("signal", "killed by SIGKILL", None, known="killed")
    assert death("import os; os.kill(os.getpid(), 9)", tmp_path) == killed
    crash = "import ctypes\ndef crash():\n    ctypes.string_at(0)\ncrash()\n"
    assert death(crash, tmp_path) == Cause("signal", "killed by SIGSEGV", None, known="crash")
    cause = death(crash, tmp_path, PYTHONFAULTHANDLER="1")
    assert cause.message == "killed by SIGSEGV"
    assert cause.traceback
    assert "line 3 in crash" in cause.traceback


def test_an_abort_is_reported_with_the_thrown_exception() -> None:
    thrown = (
        "what():  [PG ID 0 Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=8) ran for 600020 ms"
    )
    stderr = (
        f"terminate called after throwing an instance of 'c10::DistBackendError'\n  {thrown}\nException raised from x\n"
    )
    cause = explain(-signal.SIGABRT, stderr)
    assert cause.kind == "signal"
    assert cause.message.startswith("killed by SIGABRT: c10::DistBackendError: [PG ID 0 Rank 1] Watchdog caught")
    assert cause.collateral
    bad = "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n"
    assert explain(-signal.SIGABRT, bad).kind == "out of memory"


def test_the_exception_of_the_data_loaders_worker_is_in_the_message(tmp_path: Path) -> None:
    script = """
from torch.utils.data import DataLoader
class Broken(list):
    def __getitem__(self, i): raise ValueError('sample %d is damaged' % (i + 40))
if __name__ == '__main__':
    next(iter(DataLoader(Broken([1]), num_workers=1)))
"""
    cause = death(script, tmp_path)
    assert cause.message.startswith("ValueError: Caught ValueError in DataLoader worker process 0.\n")
    assert cause.message.endswith("\nValueError: sample 40 is damaged")
    assert signature(cause.kind, cause.message) == (
        "exception: ValueError: Caught ValueError in DataLoader worker process #. ValueError: sample # is damaged"
    )


@pytest.mark.parametrize(
    ("exitcode", "text", "oom", "kind"),
    [
        (-9, None, False, "signal"),
        (-9, None, True, "out of memory"),
        (137, None, True, "out of memory"),
        (-11, None, True, "signal"),
        (3, None, False, "exit"),
        (1, None, False, "exit"),
        (1, "ValueError: x", True, "exception"),
        (1, "MemoryError", False, "out of memory"),
        (1, "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7. TiB", False, "out of memory"),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", False, "out of memory"),
        (1, "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried", False, "out of memory"),
        (1, "RuntimeError: CUDA error: out of memory", False, "out of memory"),
        (1, "RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed. ", True, "out of memory"),
        (1, "RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed. ", False, "exception"),
    ],
)
def test_the_kind_of_a_death(exitcode: int, text: str | None, *, oom: bool, kind: str) -> None:
    assert kind_of(exitcode, text, oom=oom) == kind


def test_real_memory_errors_are_out_of_memory(tmp_path: Path) -> None:
    assert death("x = bytearray(1 << 60)", tmp_path).kind == "out of memory"
    cause = death("import torch\ntorch.empty(1 << 60)", tmp_path)
    assert cause.kind == "out of memory", cause


def test_a_handled_memory_error_is_not_what_ended_the_process(tmp_path: Path) -> None:
    script = "try:\n    bytearray(1 << 60)\nexcept MemoryError:\n    pass\nraise ValueError('x')  # MemoryError"
    assert death(script, tmp_path).kind == "exception"


# echoes

WORLDS = """
import datetime, os, signal, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

WAIT = datetime.timedelta(seconds=2)

def init(rank, world, victim, port, how):
    if rank == victim:  # reaches the store, and then dies
        store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout=WAIT, wait_for_workers=False)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.init_process_group("gloo", timeout=WAIT)

def lose(rank, world, victim, port, how):
    dist.init_process_group("gloo", timeout=WAIT * (1 if how == "store" else 15))
    tensor = torch.ones(1000)
    dist.all_reduce(tensor)
    if how == "ddp":
        model = DistributedDataParallel(torch.nn.Linear(100, 100))
        for step in range(3):
            loss = model(torch.ones(4, 100)).sum()
            if rank == victim and step == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            loss.backward()
    if rank == victim and how == "raise":
        raise ValueError("loss is nan")
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(3):
        if how in ("all_reduce", "raise"): dist.all_reduce(tensor)
        if how == "large": dist.all_reduce(torch.ones(4_000_000))
        if how == "broadcast": dist.broadcast(tensor, 2)
        if how == "barrier": dist.barrier()
        if how == "monitored": dist.monitored_barrier(timeout=WAIT)
        if how == "objects": dist.all_gather_object([None] * world, rank)
        if how == "store": dist.distributed_c10d._get_default_store().get("never")
        if how == "wrapped":
            try:
                dist.all_reduce(tensor)
            except RuntimeError as error:
                raise LookupError("step failed") from error

folder = sys.argv[1]
for case in sys.argv[2:]:
    how, victim, port = case.split(":")
    children = []
    for rank in range(3):
        if (child := os.fork()) == 0:
            os.dup2(os.open(f"{folder}/{how}.{victim}.{rank}", os.O_CREAT | os.O_WRONLY, 0o600), 2)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="3")
            try:
                (init if how == "init" else lose)(rank, 3, int(victim), int(port), how)
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(how, victim, *codes, flush=True)
"""
CASES = [
    *((how, victim) for how in ("init", "all_reduce", "broadcast", "ddp", "store") for victim in (0, 1)),
    *((how, 1) for how in ("large", "barrier", "monitored", "objects", "wrapped", "raise")),
]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[Cause]]:
    """Causes of death of the three ranks, by their operation and the first rank to die."""
    folder = tmp_path_factory.mktemp("worlds")
    found = {}
    for how, victim, *codes in run(WORLDS, folder, CASES, 120):
        found[how, int(victim)] = [
            explain(int(code), stderr_tail(folder / f"{how}.{victim}.{rank}")) for rank, code in enumerate(codes)
        ]
    return found


@pytest.mark.parametrize(("how", "victim"), CASES)
def test_errors_of_the_survivors_of_a_lost_rank_are_recognised_as_echoes(
    worlds: dict[tuple[str, int], list[Cause]], how: str, victim: int
) -> None:
    causes = worlds[how, victim]
    for rank, cause in enumerate(causes):
        if rank != victim:
            assert cause.kind == "exception", cause
            assert cause.traceback
            assert "[rank" not in cause.traceback
            assert cause.collateral, cause
    expected = ("exception", "ValueError: loss is nan") if how == "raise" else ("signal", "killed by SIGKILL")
    assert (causes[victim].kind, causes[victim].message) == expected
    assert not causes[victim].collateral


@pytest.mark.parametrize(
    "message",
    [
        # from the trackers of NCCL and torch
        (
            "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/c10d/NCCLUtils.hpp:268, "
            "remote process exited or there was a network error, NCCL version 2.21.5\nncclRemoteError: A call failed "
            "possibly due to a network error or a remote process exiting prematurely.\nLast error:\nsocketProgressOpt: "
            "Call to recv from 172.1.1.1<33759> failed : Connection reset by peer"
        ),
        (
            "torch.distributed.DistBackendError: NCCL error in: x.cpp:1691, unhandled system error (run "
            "with NCCL_DEBUG=INFO for details), NCCL version 2.19.3"
        ),
        (
            "RuntimeError: NCCL communicator was aborted on rank 2.  Original reason for failure was: [Rank 2] "
            "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=10, OpType=BROADCAST, Timeout(ms)=1800000)"
        ),
        (
            "torch.distributed.DistNetworkError: failed to recv, got 0 bytes. Connection was likely closed. "
            "Did the remote server shutdown or crash?"
        ),
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:1",
        "RuntimeError: [../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation",
        "RuntimeError: Connection reset by peer",
        "RuntimeError: Broken pipe",
    ],
)
def test_echoes_of_other_versions_and_back_ends_are_recognised(message: str) -> None:
    assert is_collateral(message)


@pytest.mark.parametrize(
    "message",
    [
        "ValueError: loss is nan",
        "FileNotFoundError: [Errno 2] No such file or directory: 'data/peer.bin'",
        "AssertionError",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
        "BrokenPipeError: [Errno 32] Broken pipe",
        "requests.exceptions.ConnectionError: ('Connection aborted.', ConnectionResetError(104, 'Connection reset')",
        (
            "RuntimeError: [enforce fail at /third_party/gloo/gloo/transport/tcp/pair.cc:478] op.preamble.length <= "
            "op.nbytes. 4000 vs 2000"
        ),
        (
            "torch.distributed.DistBackendError: NCCL error in: x.cpp:1, invalid usage, NCCL version 2.18.5\n"
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
            "Last error:\nDuplicate GPU detected : rank 0 and rank 1"
        ),
        (
            "torch.distributed.DistBackendError: NCCL error in: x.cpp:1, unhandled system error, NCCL version 2.18.5\n"
            "Last error:\nError while creating shared memory segment /dev/shm/nccl-x: No space left on device"
        ),
        (
            "killed by SIGABRT: c10::DistBackendError: [PG ID 0 Rank 0] Process group watchdog thread terminated with "
            "exception: CUDA error: an illegal memory access was encountered"
        ),
        (
            "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
            "port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use"
        ),
        "exit code 3: giving up after Connection reset by peer",
    ],
)
def test_ordinary_failures_are_no_echoes(message: str) -> None:
    assert not is_collateral(message)


def test_the_first_of_chained_exceptions_decides_whether_the_failure_is_an_echo(tmp_path: Path) -> None:
    script = """
try:
    raise {first}
finally:
    raise {second}
"""
    echo, fault = "RuntimeError('Connection reset by peer')", "ValueError('loss is nan')"
    assert not death(script.format(first=fault, second=echo), tmp_path).collateral
    assert death(script.format(first=echo, second=fault), tmp_path).collateral


# the same failure, repeated


@pytest.mark.parametrize(
    ("once", "again"),
    [
        ("killed by SIGSEGV", "killed by SIGSEGV"),
        ("ValueError: loss is nan at step 120", "ValueError: loss is nan at step 125"),
        ("RuntimeError: [rank 3] at 0x7f00aa", "RuntimeError: [rank 12] at 0x7fffe1"),
        ("OSError: [Errno 28] /tmp/tmpab3_x/f: full", "OSError: [Errno 28] /tmp/tmpq1/g2: full"),
        ("X: cannot reach node17:29500 (10.0.3.7)", "X: cannot reach node3:41234 (10.11.3.77)"),
        ("X: Tried to allocate 2.00 GiB", "X: Tried to allocate 512 MiB"),
        ("X: run 3f2a9c1e-77aa-4b1c-9d2e-001122334455", "X: run aaaabbbb-77ab-4b1c-9d2e-abcdefabcdef"),
        ("X: same\nother tail 1", "X: same\nanother"),
    ],
)
def test_the_same_failure_has_the_same_signature(once: str, again: str) -> None:
    assert signature("exception", once) == signature("exception", again)


def test_different_failures_have_different_signatures() -> None:
    assert signature("exception", "KeyError: 'weight'") != signature("exception", "KeyError: 'bias'")
    assert signature("signal", "killed by SIGSEGV") != signature("signal", "killed by SIGBUS")
    assert signature("exit", "exit code 3") != signature("exception", "exit code 3")
    assert signature("exception", "") == "exception:"


def test_garbage_input_is_tolerated(tmp_path: Path) -> None:
    assert stderr_tail(tmp_path / "none") == ""
    assert last_line("\n \n") == ""
    assert traceback_of("") is None
    assert message_of("Traceback (most recent call last):") == "Traceback (most recent call last):"
    header = "Traceback (most recent call last):\n"
    for text in (
        header,
        header * 3,
        "\nDuring handling of the above exception, another exception occurred:\n" + header,
    ):
        assert traceback_of(text)
        assert explain(1, text).kind == "exception"
    (tmp_path / "big").write_bytes(b"\xff" * 100_000 + b"\nlast\n")
    assert last_line(stderr_tail(tmp_path / "big")) == "last"
