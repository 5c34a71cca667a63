"""``elastic-hpc logs``: what the workers wrote, in order, labelled, and followed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import records

from elastic_hpc.cli.hpc import main
from elastic_hpc.record.stamps import FILE, Stamper, Stamps
from elastic_hpc.record.worker_logs import LogLine, Logs, Wanted

FAULTS = records.FOLDER / "faults"


def read(folder: Path, wanted: Wanted | None = None) -> list[LogLine]:
    return list(Logs(folder, wanted or Wanted()).written())


class Round:
    """The output of one round on one node, written a piece at a time."""

    def __init__(self, logs: Path, name: str, node: str) -> None:
        self.folder = logs / name / node
        self.folder.mkdir(parents=True)

    def write(self, rank: int, text: str, when: float | None = None, stream: str = "out") -> None:
        path = self.folder / f"rank{rank}.{stream}"
        with path.open("a") as file:
            file.write(text)
        if when is not None:
            with (self.folder / FILE).open("a") as notes:
                notes.write(json.dumps({"time": when, path.name: path.stat().st_size}) + "\n")


def test_by_default_rank_0_and_what_any_rank_wrote_to_stderr() -> None:
    lines = read(FAULTS / "logs")
    assert {(line.rank, line.stream) for line in lines if line.stream == "out"} == {(0, "out")}
    assert {line.rank for line in lines if line.stream == "err"} == {0, 1, 2, 3}
    assert any("shard-0002 is damaged" in line.text and line.rank == 2 for line in lines)


def test_the_rounds_follow_each_other_also_over_a_requeue() -> None:
    lines = read(FAULTS / "logs")
    assert list(dict.fromkeys(line.round for line in lines)) == [1, 2, 3, 4]
    times = [line.time for line in lines]
    assert times == sorted(times)


def test_all_that_was_written_is_shown_when_all_is_asked_for() -> None:
    lines = read(FAULTS / "logs", Wanted(streams=("out", "err")))
    files = [path for path in FAULTS.glob("logs/*/*/rank*.*") if path.suffix in {".out", ".err"}]
    assert len(lines) == sum(len(path.read_text().splitlines()) for path in files)


def test_ranks_nodes_rounds_and_streams_are_chosen() -> None:
    assert {line.rank for line in read(FAULTS / "logs", Wanted(ranks=(1, 2)))} == {1, 2}
    assert {line.node for line in read(FAULTS / "logs", Wanted(nodes=("n[3-4]",)))} == {"n3", "n4"}
    assert {line.round for line in read(FAULTS / "logs", Wanted(rounds=(3,)))} == {3}
    assert {line.stream for line in read(FAULTS / "logs", Wanted(streams=("err",)))} == {"err"}


def test_lines_of_several_ranks_are_in_order_of_time(tmp_path: Path) -> None:
    first, second = Round(tmp_path, "0.1", "n1"), Round(tmp_path, "0.1", "n2")
    expected = []
    for number in range(50):
        one = random.Random(number).choice([(first, 0), (second, 1)])
        one[0].write(one[1], f"line {number}\n", 100.0 + number)
        expected.append((100.0 + number, one[1], f"line {number}"))
    assert [(line.time, line.rank, line.text) for line in read(tmp_path, Wanted(ranks=(0, 1)))] == expected


def test_round_10_comes_after_round_9(tmp_path: Path) -> None:
    for name in ("0.10", "1.11", "0.9"):
        Round(tmp_path, name, "n1").write(0, f"{name}\n", 1.0)
    assert [line.text for line in read(tmp_path)] == ["0.9", "0.10", "1.11"]


def test_when_nobody_noted_the_time_it_is_that_of_the_last_note_or_change(tmp_path: Path) -> None:
    one = Round(tmp_path, "0.1", "n1")
    one.write(0, "early\n", 5.0)
    one.write(0, "late\n")
    os.utime(one.folder / "rank0.out", (50.0, 50.0))
    assert [line.time for line in read(tmp_path)] == [5.0, 5.0]
    (one.folder / FILE).write_bytes(b"\xff{\n[]\n")
    assert [line.time for line in read(tmp_path)] == [50.0, 50.0]


def test_a_progress_bar_is_shown_as_it_was_last_and_odd_bytes_do_no_harm(tmp_path: Path) -> None:
    one = Round(tmp_path, "0.1", "n1")
    one.write(0, "  1%\r 50%\r100%\r\nno end", 1.0)
    with (one.folder / "rank0.err").open("wb") as file:
        file.write(b"\xff\xfe" + b"x" * 200_000)
    texts = [line.text for line in read(tmp_path)]
    assert texts[:2] == ["100%", "no end"] or texts[-2:] == ["100%", "no end"]
    assert sum(len(text) for text in texts if "x" in text) == 200_002


def test_the_stamper_notes_how_files_grow_and_what_was_written_last(tmp_path: Path) -> None:
    path = tmp_path / "rank0.out"
    path.write_text("")
    stamper, began = Stamper(), time.time()
    stamper.start([str(path), str(path), ""])
    path.write_text("one\n")
    end = time.monotonic() + 20
    while Stamps(path).at(4) > time.time() or not (tmp_path / FILE).exists() or not (tmp_path / FILE).read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    with path.open("a") as file:
        file.write("two\n")
    stamper.stop()
    while len((tmp_path / FILE).read_text().splitlines()) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert began <= Stamps(path).at(4) <= Stamps(path).at(8) <= time.time()
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0
    Stamper().start([])


def test_what_comes_is_followed_and_no_line_is_lost_or_shown_twice(tmp_path: Path) -> None:
    one = Round(tmp_path, "0.1", "n1")
    one.write(0, "a\nb", 1.0)
    logs = Logs(tmp_path, Wanted())
    assert [line.text for line in logs.written(follow=True)] == ["a"]
    one.write(0, "b\nc\n")
    Round(tmp_path, "0.2", "n1").write(0, "d\n")
    Round(tmp_path, "0.2", "n2").write(1, "not asked for\n")
    assert [(line.round, line.text, line.time) for line in logs.added(7.0)] == [
        (1, "bb", 7.0),
        (1, "c", 7.0),
        (2, "d", 7.0),
    ]
    assert list(logs.added(8.0)) == []
    one.write(0, "e")
    assert list(logs.added(9.0)) == []
    assert [line.text for line in logs.rest(9.0)] == ["e"]


def test_the_command_labels_each_line_and_heads_each_round(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(FAULTS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith("--- ")]
    assert [head.split(",")[0] for head in heads] == ["--- round 1", "--- round 2", "--- round 3", "--- round 4"]
    assert "3 nodes, 3 workers, after: n3 lost: nothing heard for 5 s" in heads[2]
    assert "run 2" in heads[3]
    assert all(line.startswith(("--- ", "rank ")) for line in lines)
    assert main(["logs", str(FAULTS), "-n", "9" * 30, "--round", "last"]) == 0
    capsys.readouterr()
    assert main(["logs", str(FAULTS), "-n", "3", "-t", "--round", "last"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[-1].endswith("rank 0| step 400")
    assert lines[-1][:2] == "20"


def test_following_a_job_that_is_over_shows_all_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(FAULTS), "-f", "--rank", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip().endswith("step 400")
    assert "COMPLETED: all workers finished" in captured.err


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    one = Round(tmp_path / "job" / "logs", "0.1", "n1")
    one.write(0, "line\n" * 100_000)
    command = [sys.executable, "-m", "elastic_hpc", "logs", str(tmp_path / "job")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "--- round 1\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1  # as rich has it


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--rank", "first"], "--rank 'first': expected numbers, for example --rank 0-3,8"),
        (["--round", "1-x"], "--round '1-x': expected numbers"),
        (["--lines", "-1"], "--lines -1: expected a number of lines"),
        (["--rank", "3-1"], "--rank '3-1': expected numbers, for example --rank 0-3,8; '3-1' ends before it begins"),
        (["--rank", "-1"], "--rank '-1': expected numbers"),
        (["--rank", ""], "--rank '': expected numbers"),
        (["--round", ""], "--round '': expected numbers"),
        (["--node", "n[3-1]"], "--node 'n[3-1]': expected names in Slurm's notation, for example --node 'n[10-12]'"),
        (["--node", "n[1"], "--node 'n[1': expected names in Slurm's notation"),
        (["--rank", "99"], "--rank 99: nothing was written there; the logs have rounds 1-4, ranks 0-3, nodes n[1-4]"),
        (["--round", "99"], "--round 99: nothing was written there; the logs have rounds 1-4"),
        (["--node", "n[10-12]"], "--node n[10-12]: nothing was written there; the logs have rounds 1-4"),
        (["--rank", "1", "--round", "2", "--node", "n9"], "--rank 1 --node n9 --round 2: nothing was written there"),
        (["--rank", "99", "-f"], "--rank 99: nothing was written there; the logs have rounds 1-4"),
    ],
)
def test_bad_input_is_told_with_what_to_type(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *value = argv
    assert main(["logs", str(FAULTS), f"{name}={value[0]}", *value[1:]]) == 2
    assert complaint in capsys.readouterr().err


def test_a_stream_to_which_nothing_was_written_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Round(tmp_path / "job" / "logs", "0.1", "n1")
    one.write(1, "line\n")
    one.write(1, "", stream="err")
    assert main(["logs", str(tmp_path / "job"), "--stderr"]) == 2
    assert "--stderr: nothing was written there; the logs have rounds 1, ranks 1, nodes n1" in capsys.readouterr().err
    assert main(["logs", str(tmp_path / "job")]) == 0
    assert "rank 0 has written nothing, nor any rank to stderr" in capsys.readouterr().err
    assert main(["logs", str(tmp_path / "job"), "--rank=0-999999999999", "--node=n[1-999999999999]"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "rank 1| line"
