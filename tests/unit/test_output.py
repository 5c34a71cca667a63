"""The output of workers reaches the log file and the job's output, and nothing on the way blocks a worker."""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import wait_for

from elastic_hpc.record.rundir import RunDir
from elastic_hpc.record.worker_logs import Logs, Stream, Wanted
from elastic_hpc.workers import output
from elastic_hpc.workers.failures import stderr_tail
from elastic_hpc.workers.output import LogFile, Output, Terminal, is_shown

SRUN = Path(sys.executable).with_name("elastic-srun")


class Node:
    """The output of workers of one node, of which rank 0 is shown."""

    def __init__(self, folder: Path, *ranks: int) -> None:
        self.logs = folder / "logs"
        self.path = self.logs / "0.1" / f"n1.rank{ranks[0]}-{ranks[-1]}.log"
        self.terminal, into = os.pipe()
        self.destinations: list[LogFile | Terminal] = [log_file := LogFile(), terminal := Terminal(into)]
        terminals: dict[Stream, Terminal] = {"out": terminal, "err": terminal}
        self.output = Output(dict(enumerate(ranks)), {0}, self.path, log_file, terminals)

    def write(self, local: int, text: bytes, stream: Stream = "out") -> None:
        """Write as a worker does."""
        with open(self.output.paths(stream)[local], "ab") as file:
            file.write(text)

    def read(self, *ranks: int) -> list[str]:
        """The lines of ``ranks`` in the log file."""
        return [line.written for line in Logs(self.logs, Wanted(ranks=ranks, streams=("out", "err"))).written()]

    def close(self) -> None:
        self.output.finish()
        self.output.join(10)
        for destination in self.destinations:
            destination.close(10)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path, 0, 1)
    yield made
    made.close()


def test_all_output_of_a_nodes_workers_in_a_round_is_in_one_private_file(node: Node) -> None:
    node.write(0, b"one\ntwo\n")
    node.write(1, b"three\n", "err")
    wait_for(lambda: node.read(0) and node.read(1))
    assert (node.read(0), node.read(1)) == (["one\n", "two\n"], ["three\n"])
    assert list(node.path.parent.iterdir()) == [node.path]
    assert node.path.stat().st_mode & 0o077 == node.path.parent.stat().st_mode & 0o077 == 0


def test_no_file_is_created_before_there_is_output(node: Node) -> None:
    node.close()
    assert not node.logs.exists()


def test_an_unfinished_line_is_forwarded_and_its_rest_follows_later(node: Node) -> None:
    node.write(0, b"  1%\r  2%\r")
    wait_for(lambda: node.read(0) == ["  1%\r  2%\r"])
    node.write(0, b"100%\nlast")
    node.close()
    assert node.read(0) == ["  1%\r  2%\r100%\n", "last"]
    assert os.read(node.terminal, 1000) == b"".join(
        b"[rank0]: " + line + b"\n" for line in (b"  1%", b"  2%", b"100%", b"last")
    )


def test_the_end_of_the_output_is_kept_for_the_traceback_and_the_memory_of_the_rest_is_freed(node: Node) -> None:
    for number in range(200):
        node.write(1, b"%03d %s\n" % (number, b"x" * 50_000), "err")
    wait_for(lambda: node.output.size == 200 * 50_005)
    path = node.output.paths("err")[1]
    wait_for(lambda: os.stat(path).st_blocks * 512 < 2 << 20)
    node.write(1, b"ValueError: no luck\n", "err")
    assert stderr_tail(path).endswith("xxx\nValueError: no luck\n")
    node.close()
    assert [line[:3] for line in node.read(1)] == [f"{number:03d}" for number in range(200)] + ["Val"]


def test_a_stalled_file_system_blocks_no_worker_and_dropped_output_is_reported(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_LIMIT", 100_000)
    node.path.parent.mkdir(parents=True)
    os.mkfifo(node.path)  # opening it stalls until a process reads
    for number in range(30):
        node.write(0, b"%02d %s\n" % (number, b"x" * 10_000))
        wait_for(lambda number=number: node.output.size == (number + 1) * 10_004)
        assert os.read(node.terminal, 20_000).startswith(b"[rank0]: %02d x" % number), "the job's output goes on"
    written: list[bytes] = []

    def read() -> None:
        while b"29 x" not in b"".join(written):
            with node.path.open("rb") as file:
                written.append(file.read())

    reader = threading.Thread(target=read)
    reader.start()
    node.close()
    reader.join(10)
    text = b"".join(written)
    assert re.search(rb" rank0 err F elastic_hpc: \d{6} bytes of this node are left out here, as the run", text)
    assert re.findall(rb"out F (\d\d) x", text)[-3:] == [b"27", b"28", b"29"]


def test_if_no_process_reads_the_jobs_output_neither_the_workers_nor_their_log_stop(node: Node) -> None:
    for number in range(100):
        node.write(0, b"%02d %s\n" % (number, b"x" * 10_000))
    wait_for(lambda: len(node.read(0)) == 100)
    os.close(node.terminal)


def test_every_byte_arrives_whatever_the_workers_write_and_when(node: Node) -> None:
    chance = random.Random(18)
    written: dict[tuple[int, Stream], bytes] = {(0, "out"): b"", (0, "err"): b"", (1, "out"): b"", (1, "err"): b""}
    for _ in range(300):
        local, stream = source = chance.choice(list(written))
        text = bytes(chance.choices(b"\n\r \0x\xff", k=chance.choice([1, 30, 3000])))
        text += b"y" * chance.choice([0, 0, 0, 100_000])
        node.write(local, text, stream)
        written[source] += text
        time.sleep(chance.choice([0, 0, 0.01, 0.03]))
    node.output.finish()
    node.output.join(10)
    node.destinations[0].close(10)
    os.close(node.terminal)
    for (rank, stream), text in written.items():
        lines = Logs(node.logs, Wanted(ranks=(rank,), streams=(stream,))).written()
        assert "".join(line.written for line in lines) == text.decode(errors="replace")


def test_the_end_of_a_round_does_not_wait_for_a_process_that_keeps_writing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_REST", 0.3)
    over = threading.Event()

    def write() -> None:
        with open(node.output.paths("out")[1], "ab") as file:
            while not over.is_set():
                file.write(b"again\n" * 1000)
                over.wait(0.001)  # no more than the log file accepts

    writer = threading.Thread(target=write)
    writer.start()
    wait_for(lambda: node.output.size)
    node.output.finish()
    node.output.join(10)
    over.set()
    writer.join()
    assert not node.output._thread.is_alive()
    node.close()
    assert set(node.read(1)) == {"again\n"}


def test_a_folder_that_cannot_be_created_is_reported_once_and_retried(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_RETRY_INTERVAL", 0.05)
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    node.logs.touch()
    node.write(1, b"early\n")
    wait_for(said.getvalue)
    assert "n1.rank0-1.log: " in said.getvalue()
    assert "workers continue" in said.getvalue()
    node.logs.unlink()
    wait_for(lambda: node.read(1) == ["early\n"])
    assert said.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("tee", "local_ranks", "shown"),
    [
        (None, None, {0}),
        ("all", None, {0, 1, 2, 8}),
        ("3", None, {0, 1, 2, 8}),
        ("0:3,1:3", None, {0, 1, 2, 8}),
        ("0", None, {0}),
        ("1,8", None, {1, 8}),
        ("1-1", None, {1}),
        (None, "0", {0, 8}),
        ("0-2", "0", {0}),
    ],
)
def test_the_ranks_that_are_shown(tee: str | None, local_ranks: str | None, shown: set[int]) -> None:
    assert {rank for rank in (0, 1, 2, 8) if is_shown(tee, local_ranks, rank, rank % 8)} == shown


WATCHED = """
import os, sys, threading
if "elastic_hpc.agent" in sys.orig_argv:
    stat, folder = os.stat, os.environ["WATCHED"] + "/logs/0.1"
    def note(what, path):
        if isinstance(path, (str, bytes, os.PathLike)) and os.fspath(path).startswith(folder + "/"):
            os.write(record, f"{what} {threading.current_thread().name}\\n".encode())
    def noted(path, *args, **kwargs):
        note("stat", path)
        return stat(path, *args, **kwargs)
    record = os.open(os.environ["WATCHED"] + ".touched", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.stat = noted
    sys.addaudithook(lambda event, args: note("open", args[0]) if event == "open" else None)
"""
"""Records which threads of an agent check or open files of the first round."""

TRAIN = """
import os, sys, time
for step in range(30):
    print("step", step, flush=True)
    time.sleep(0.1)
print(f"all done, of {os.environ['RANK']}", file=sys.stderr)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    raise ValueError("no luck")
"""


def test_a_round_creates_one_file_and_checks_no_other_and_only_rank_0_is_shown(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "sitecustomize.py").write_text(WATCHED)
    run_dir = tmp_path / "elastic-logs" / "local.0"
    done = subprocess.run(
        [str(SRUN), "--local", "1", "--nproc-per-node", "4", "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "WATCHED": str(run_dir)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (run_dir / "logs" / "0.1").iterdir()] == ["local0.rank0-3.log"]
    touched = run_dir.with_name("local.0.touched").read_text()
    assert set(touched.splitlines()) == {"open log file"}, "by one thread, which workers do not wait for"
    assert "[rank0]: step 29\n" in done.stdout
    assert "[rank0]: all done, of 0\n" in done.stderr
    assert not re.search(r"\[rank[123]\]", done.stdout + done.stderr)
    assert "rank 1 on local0 failed: ValueError: no luck\nTraceback (most recent call last):\n" in done.stderr
    lines = list(Logs(run_dir / "logs", Wanted(ranks=range(4), rounds=(1,), streams=("out",))).written())
    assert sorted((line.rank, line.text) for line in lines) == sorted(
        (rank, f"step {step}") for rank in range(4) for step in range(30)
    )
    failure = next(event for event in RunDir(run_dir).events() if event["event"] == "failure")
    assert "no luck" in json.dumps(failure["traceback"])
