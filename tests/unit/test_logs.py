"""``elastic-hpc logs``: the output of the workers, ordered, labelled, and followed."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import records

from elastic_hpc.cli.hpc import main
from elastic_hpc.options import moments
from elastic_hpc.record.worker_logs import LogLine, Logs, Stream, Wanted, file_name, label

FAULTS = records.FOLDER / "faults"


def read(folder: Path, wanted: Wanted | None = None) -> list[LogLine]:
    return list(Logs(folder, wanted or Wanted()).written())


class Round:
    """The output of one round on one node, written piece by piece."""

    def __init__(self, logs: Path, name: str, node: str, *ranks: int) -> None:
        self.path = logs / name / file_name(node, ranks or (0, 1))
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, rank: int, text: str | bytes, when: float = 1.0, stream: Stream = "out") -> None:
        written = text.encode() if isinstance(text, str) else text
        with self.path.open("ab") as file:
            for line in written.splitlines(keepends=True):
                full = line.endswith(b"\n")
                file.write(label(rank, stream, when, full=full) + line.removesuffix(b"\n") + b"\n")


def test_by_default_rank_0_and_the_stderr_of_all_ranks_are_shown() -> None:
    lines = read(FAULTS / "logs")
    assert {(line.rank, line.stream) for line in lines if line.stream == "out"} == {(0, "out")}
    assert {line.rank for line in lines if line.stream == "err"} == {0, 1, 2, 3}
    assert any("shard-0002 is damaged" in line.text and line.rank == 2 for line in lines)


def test_rounds_are_shown_in_order_even_across_a_requeue() -> None:
    lines = read(FAULTS / "logs")
    assert list(dict.fromkeys(line.round for line in lines)) == [1, 2, 3, 4]
    times = [line.time for line in lines]
    assert times == sorted(times)


def test_all_output_is_shown_if_the_user_requests_all() -> None:
    lines = read(FAULTS / "logs", Wanted(streams=("out", "err")))
    assert len(lines) == sum(len(path.read_text().splitlines()) for path in FAULTS.glob("logs/*/*.rank*.log")) > 0


def test_ranks_nodes_rounds_and_streams_can_be_selected() -> None:
    assert {line.rank for line in read(FAULTS / "logs", Wanted(ranks=(1, 2)))} == {1, 2}
    assert {line.node for line in read(FAULTS / "logs", Wanted(nodes=("n[3-4]",)))} == {"n3", "n4"}
    assert {line.round for line in read(FAULTS / "logs", Wanted(rounds=(3,)))} == {3}
    assert {line.stream for line in read(FAULTS / "logs", Wanted(streams=("err",)))} == {"err"}


def test_lines_of_several_ranks_are_ordered_by_time(tmp_path: Path) -> None:
    first, second = Round(tmp_path, "0.1", "n1", 0), Round(tmp_path, "0.1", "n2", 1)
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


def test_a_progress_bar_is_shown_in_its_last_state_and_invalid_bytes_do_no_harm(tmp_path: Path) -> None:
    one = Round(tmp_path, "0.1", "n1")
    one.write(0, "  1%\r 50%\r100%\r\nno end", 1.0)
    one.write(0, b"\xff\xfe" + b"x" * 60_000, 2.0, "err")
    one.write(0, b"y" * 60_000, 2.0, "err")
    with one.path.open("ab") as file:
        file.write(b"torn, as the disk was full\n\n" + label(0, "out", 3.0)[:9])
    texts = [line.text for line in read(tmp_path)]
    assert texts == ["100%", "\N{REPLACEMENT CHARACTER}" * 2 + "x" * 60_000 + "y" * 60_000, "no end"]


def test_a_line_written_in_parts_is_one_line_even_if_several_ranks_write_at_once(tmp_path: Path) -> None:
    one = Round(tmp_path, "0.1", "n1")
    one.write(0, b"load" + "…".encode()[:1])
    one.write(1, "load")
    one.write(0, "err", stream="err")
    one.write(0, "…".encode()[1:] + b" done\n")
    one.write(1, "ed\n", 3.0)
    lines = read(tmp_path, Wanted(ranks=(0, 1)))
    assert [(line.rank, line.stream, line.written) for line in lines] == [
        (0, "out", "load… done\n"), (1, "out", "loaded\n"), (0, "err", "err"),
    ]  # fmt: skip


def test_new_output_is_followed_and_no_line_is_lost_or_shown_twice(tmp_path: Path) -> None:
    one = Round(tmp_path, "0.1", "n1")
    one.write(0, "a\nb", 1.0)
    logs = Logs(tmp_path, Wanted())
    assert [line.text for line in logs.written(follow=True)] == ["a"]
    one.write(0, "b\nc\n")
    Round(tmp_path, "0.2", "n1").write(0, "d\n")
    Round(tmp_path, "0.2", "n2", 2).write(2, "not asked for\n")
    assert [(line.round, line.text) for line in logs.added()] == [(1, "bb"), (1, "c"), (2, "d")]
    assert list(logs.added()) == []
    one.write(0, "e")
    assert list(logs.added()) == []
    assert [line.text for line in logs.rest()] == ["e"]


def test_rounds_that_ended_long_ago_are_not_read_again(tmp_path: Path) -> None:
    rounds = [Round(tmp_path, f"0.{number}", "n1") for number in (1, 2, 9, 10)]
    for number, one in enumerate(rounds):
        one.write(0, f"{number}\n" if number else "no end")
    logs = Logs(tmp_path, Wanted())
    assert [line.text for line in logs.added()] == ["no end", "1", "2", "3"]
    assert logs.size == 2
    rounds[0].path.unlink()
    rounds[2].write(0, "late\n")
    rounds[3].write(0, "new\n")
    assert [line.text for line in logs.added()] == ["late", "new"]


def test_only_the_end_of_huge_logs_is_read(tmp_path: Path) -> None:
    for name in ("0.1", "0.2", "0.3", "0.4"):
        of_round = Round(tmp_path, name, "n1", 0)
        of_round.write(0, f"first of {name}\n" if name in {"0.1", "0.4"} else f"{name}\n" * 50)
    with of_round.path.open("ab") as file:
        file.truncate((3 << 30) - 500_000)  # 3 GB in a sparse file
        file.seek(0, 2)
        file.write(b"\n")
    of_round.write(0, "x" * 400 + "\n", when=2.0)
    of_round.write(0, "the end\nbegun", when=3.0)
    logs = Logs(tmp_path, Wanted())
    lines = logs.last(20)
    assert [line.text[:8] for line in lines[-3:]] == ["0.3", "x" * 8, "the end"]
    assert len(lines) == 20
    of_round.write(0, " again\n", when=4.0)
    Round(tmp_path, "0.3", "n1", 0).write(0, "late\n")
    assert [line.text for line in logs.added()] == ["late", "begun again"]
    few = Logs(tmp_path, Wanted()).last(103)
    assert [line.text for line in few[:2]] == ["0.2", "0.2"]
    assert list(Logs(tmp_path / "none", Wanted()).last(5)) == []


def test_the_command_labels_each_line_and_prints_a_heading_for_each_round(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(FAULTS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith("--- ")]
    assert [head.split(",")[0] for head in heads] == ["--- round 1", "--- round 2", "--- round 3", "--- round 4"]
    assert "3 nodes, 3 workers, after: n3 lost: no heartbeat for 5 s" in heads[2]
    assert "run 2" in heads[3]
    assert all(line.startswith(("--- ", "rank ")) for line in lines)
    assert main(["logs", str(FAULTS), "-n", "9" * 9, "--round", "last"]) == 0
    capsys.readouterr()
    assert main(["logs", str(FAULTS), "-n", "3", "-t", "--round", "last"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[-1].endswith("rank 0| step 400")
    assert lines[-1][:2] == "20"


def test_following_an_ended_job_shows_all_output_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(FAULTS), "-f", "--rank", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip().endswith("step 400")
    assert "COMPLETED: all workers finished" in captured.err


def test_a_reader_that_closes_early_is_no_error(tmp_path: Path) -> None:
    one = Round(tmp_path / "job" / "logs", "0.1", "n1")
    one.write(0, "line\n" * 100_000)
    command = [sys.executable, "-m", "elastic_hpc", "logs", str(tmp_path / "job")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "--- round 1\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1  # as rich writes it


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--rank", "first"], "--rank 'first': expected numbers, for example --rank 0-3,8"),
        (["--round", "1-x"], "--round '1-x': expected numbers"),
        (["--lines", "-1"], "--lines '-1': expected a whole number, 0 or more"),
        (
            ["--rank", "3-1"],
            "--rank '3-1': expected numbers, for example --rank 0-3,8, or all; '3-1' ends before it begins",
        ),
        (["--rank", "-1"], "--rank '-1': expected numbers"),
        (["--rank", ""], "--rank '': expected numbers"),
        (["--round", ""], "--round '': expected numbers"),
        (["--node", "n[3-1]"], "--node 'n[3-1]': expected names in Slurm's notation, for example --node 'n[10-12]'"),
        (["--node", "n[1"], "--node 'n[1': expected names in Slurm's notation"),
        (["--rank", "99"], "--rank 99: nothing was written there; the logs have rounds 1-4, ranks 0-3, nodes n[1-4]"),
        (["--round", "99"], "--round 99: nothing was written there; the logs have rounds 1-4"),
        (["--node", "n[10-12]"], "--node n[10-12]: nothing was written there; the logs have rounds 1-4"),
        (["--rank", "1", "--round", "2", "--node", "n9"], "--rank 1 --node n9 --round 2: nothing was written there"),
        (["--since", "soon"], "--since 'soon': expected how long ago, for example 90 (seconds), 10m or 2d, or a time"),
        (["--since", "2026-13-01"], "--since '2026-13-01': expected how long ago"),
        (["--grep", "(x"], "--grep '(x': expected a regular expression of Python; missing )"),
        (["--rank", "99", "-f"], "--rank 99: nothing was written there; the logs have rounds 1-4"),
    ],
)
def test_bad_input_is_reported_with_a_hint(argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *value = argv
    code = 1 if "nothing was written" in complaint else 2
    assert main(["logs", str(FAULTS), f"{name}={value[0]}", *value[1:]]) == code
    assert complaint in capsys.readouterr().err


def test_an_empty_stream_is_reported_as_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Round(tmp_path / "job" / "logs", "0.1", "n1", 1)
    one.write(1, "line\n")
    assert main(["logs", str(tmp_path / "job"), "--stderr"]) == 1
    assert "--stderr: nothing was written there; the logs have rounds 1, ranks 1, nodes n1" in capsys.readouterr().err
    assert main(["logs", str(tmp_path / "job")]) == 0
    assert "rank 0 wrote nothing, and no rank wrote to stderr" in capsys.readouterr().err
    assert main(["logs", str(tmp_path / "job"), "--rank=0-999999999999", "--node=n[1-999999999999]"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "rank 1| line"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", -90), ("10m", -600), ("1h30m", -5400), ("2d", -2 * 86400),
        ("12:00", 0), ("11:59:30", -30), ("12:00:01", 1 - 86400), ("2026-11-28", -43200),
        ("2026-11-28T11:00", -3600), ("2026-11-28 11:00:30", -3570), ("2026-11-28T13:00Z", 3600),
        ("2026-11-28T13:00+01:00", 0),
    ],
)  # fmt: skip
def test_since_accepts_a_duration_a_time_of_day_or_a_date(
    text: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    now = 1795867200.0  # 2026-11-28 12:00 UTC
    assert moments.parse(text, now) - now == expected


def test_lines_since_a_moment_are_shown_complete_even_if_written_in_parts(tmp_path: Path) -> None:
    one = Round(tmp_path, "0.1", "n1", 0, 1)
    one.write(0, "old\n", 99.9)
    one.write(1, "old beginning, ", 99.9)
    one.write(0, "still old\n", 99.9994)
    one.write(1, "new end\n", 100.0)
    one.write(0, "new\n", 100.0)
    one.write(0, "no end", 101.0)
    wanted = Wanted(ranks=(0, 1), since=100.0)
    assert [line.text for line in read(tmp_path, wanted)] == ["old beginning, new end", "new", "no end"]


def test_matching_lines_are_shown_as_they_come(tmp_path: Path) -> None:
    one = Round(tmp_path, "0.1", "n1")
    one.write(0, "loss 1\nstep 1\r", 1.0)
    logs = Logs(tmp_path, Wanted(pattern=re.compile("^loss")))
    assert [line.text for line in logs.written(follow=True)] == ["loss 1"]
    one.write(0, "loss 2\nno loss\nloss 3")
    assert [line.text for line in logs.added()] == ["loss 2"]
    assert [line.text for line in logs.rest()] == ["loss 3"]


def test_the_command_selects_by_time_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(FAULTS), "--rank=all", "--grep", "(?i)DAMAGED$"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("---")]
    assert len(lines) == 1
    assert lines[0].endswith("sample 476 of shard-0002 is damaged")
    assert main(["logs", str(FAULTS), "--since", "2000-01-01"]) == 0
    everything = capsys.readouterr().out
    assert main(["logs", str(FAULTS)]) == 0
    assert capsys.readouterr().out == everything
    assert main(["logs", str(FAULTS), "--since=1s", "--grep=x", "--rank=1", "-f"]) == 1
    assert re.search(r"--since 20\S+ \S+ --grep 'x' --rank 1: no such line; the logs have", capsys.readouterr().err)


def test_for_a_job_without_output_the_command_reports_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = records.copy("cancelled", tmp_path)
    shutil.rmtree(folder / "logs")
    assert main(["logs", str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "the workers of job cancelled have written nothing; it is CANCELLED" in captured.err
