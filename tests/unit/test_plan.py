"""``elastic-hpc plan``: when which sizes would start, and which MIN:MAX to request."""

from __future__ import annotations

import json
import os
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
import records

from elastic_hpc.cli.hpc import main
from elastic_hpc.cli.sbatch import main as submission
from elastic_hpc.errors import UsageError
from elastic_hpc.membership.nodes import count_names
from elastic_hpc.slurm.estimate import estimate
from elastic_hpc.slurm.states import Estimate
from elastic_hpc.view.plan import Advice, chosen, plan
from elastic_hpc.view.scaling import LINEAR, Scaling, efficiency, speeds

HOUR = 3600.0
NOW = 1e9


def starts(*hours_and_nodes: tuple[int, float | None, int]) -> list[Estimate]:
    """Slurm's answers for each MIN, up to 8 nodes."""
    return [Estimate(n, 8, None if hours is None else NOW + hours * HOUR, got) for n, hours, got in hours_and_nodes]


def planned(*answers: tuple[int, float | None, int], scaling: Scaling = LINEAR, hours: float | None = None) -> Advice:
    """``hours``: the duration of the training on the first size."""
    work = None if hours is None else hours * HOUR * scaling.speed(answers[0][0])
    return plan(starts(*answers), range(answers[0][0], 9), scaling, work, NOW)


@pytest.mark.parametrize(
    ("answer", "nodes", "starts"),
    [
        (  # as 22.05.8 writes it
            "sbatch: Job 15 to start at 2026-11-29T19:49:49 using 6 processors on nodes n[1-2,4] in partition main\n",
            3,
            "2026-11-29T19:49:49",
        ),
        ("sbatch: Job 9 to start at 2026-11-29T20:04:50 using 2 processors on nodes n4 in partition a b\n", 1, None),
        ("sbatch: Job 7 to start at 2026-11-29T20:04:50 using 8 processors on n[01-08]\n", 8, "2026-11-29T20:04:50"),
        (
            "sbatch: Job 7 to start at 2026-11-29T20:04:50 on cluster two using 4 processors on nodes r[1-2]n[1-3],x\n",
            7,
            "2026-11-29T20:04:50",
        ),
        ("sbatch: welcome, by job_submit\nsbatch: Job 7 to start at N/A using 4 processors on nodes n1\n", 1, ""),
        ("sbatch: Job 7 to start at Unknown using 0 processors on nodes (null) in partition main\n", None, ""),
        ("sbatch: verify: OK\n", 0, ""),
    ],
)
def test_slurms_answer_is_read_in_the_formats_of_all_versions(
    answer: str, nodes: int | None, starts: str | None
) -> None:
    found = estimate(2, 4, answer)
    if nodes is not None:
        assert found.nodes == nodes
    if starts is not None:
        assert found.starts == (datetime.fromisoformat(starts).timestamp() if starts else None)


def test_nodes_in_slurms_notation_are_counted() -> None:
    assert count_names("login,n[001-004,007],r[1-2]n[1-3]") == 12
    with pytest.raises(ValueError, match="no partner"):
        count_names("n[1-2")


def test_of_many_sizes_slurm_is_asked_about_only_a_few() -> None:
    assert chosen(range(4, 9)) == [4, 5, 6, 7, 8]
    assert chosen([4, 6, 8]) == [4, 6, 8]
    asked = chosen(range(1, 65))
    assert (len(asked), asked[0], asked[-1]) == (6, 1, 64)
    assert all(1.5 < b / a < 3 for a, b in pairwise(asked))


def test_without_a_length_the_plan_shows_from_which_length_on_waiting_pays_off() -> None:
    found = planned((2, 0, 2), (4, 3, 4))
    assert found.ask_for == "--nodes 2:8 --grow"
    assert found.rows[0].starts == "at once"
    assert found.rows[1].starts == "in 3 h"
    # a training of 6 h on 2 nodes is done after 6 h, or after 3 h of waiting and 3 h of training
    assert "without --grow 4:8 is done earlier if the training takes more than 6 h on 2" in found.why
    assert found.rows[0].done_in is None


def test_when_all_sizes_start_at_the_same_time_the_plan_uses_the_smallest_as_min() -> None:
    found = planned((2, 0, 8), (4, 0, 8), (8, 0, 8))
    assert (found.ask_for, found.why) == ("--nodes 2:8", ["it starts at once, on 8 nodes"])
    assert planned((2, 0, 8), (4, 0, 8), hours=8).ask_for == "--nodes 2:8"


def test_a_long_training_waits_for_more_nodes_and_a_short_one_does_not() -> None:
    short = planned((2, 0, 2), (8, 3, 8), hours=2)
    assert (short.ask_for, short.rows[0].done_in, short.rows[1].done_in) == ("--nodes 2:8", 2 * HOUR, 3.5 * HOUR)
    long = planned((2, 0, 2), (8, 3, 8), hours=40)
    assert long.rows[1].done_in == 13 * HOUR
    # with growth 3 of the 40 hours are done before the other nodes come: 37 / 4 hours remain
    assert long.rows[0].done_in_grown == (3 + 37 / 4) * HOUR
    assert long.ask_for == "--nodes 2:8 --grow"
    assert long.why == ["it is done in 12 h 15 min; without --grow 8:8 is done first, in 13 h"]


def test_growth_is_not_advised_if_it_hardly_saves_time() -> None:
    found = planned((2, 0, 2), (8, 0.05, 8), hours=400)
    assert found.ask_for == "--nodes 8:8"
    assert found.why == ["it is done in 4 d 4 h, 2:8 in 16 d 16 h"]


def test_the_plan_does_not_wait_for_nodes_that_do_not_speed_up_the_training() -> None:
    flat = Scaling({2: 1.0, 4: 1.0, 8: 0.9})
    found = planned((2, 0, 2), (4, 1, 4), (8, 2, 8), scaling=flat, hours=10)
    assert found.ask_for == "--nodes 2:8"
    assert found.rows[0].done_in_grown == 10 * HOUR
    assert planned((2, 0, 2), (8, 2, 8), scaling=flat).why[1:] == []


def test_a_size_that_is_refused_or_has_no_estimate_is_marked_and_not_advised() -> None:
    refused = Estimate(8, 8, refused="Requested node configuration is not available")
    found = plan([*starts((2, 0, 2), (4, None, 0)), refused], range(2, 9), LINEAR, HOUR, NOW)
    assert [row.starts for row in found.rows] == [
        "at once",
        "no estimate",
        "refused",
    ]
    assert found.ask_for == "--nodes 2:8"
    nothing = planned((2, None, 0), (4, None, 0), hours=1)
    assert nothing.ask_for == ""
    assert nothing.why[0].startswith("Slurm gives no estimate")


def test_a_world_has_only_sizes_that_the_job_may_have() -> None:
    found = plan(starts((4, 0, 7)), [4, 6, 8], LINEAR, 12 * HOUR, NOW)
    assert found.rows[0].starts_with == 6
    assert found.rows[0].done_in == 2 * HOUR


def test_speeds_between_known_sizes_follow_a_power_law_and_beyond_them_grow_at_most_linearly() -> None:
    known = Scaling({2: 10.0, 8: 20.0})
    assert known.speed(4) == pytest.approx(200**0.5)
    assert known.speed(32) == pytest.approx(40)
    assert known.speed(1) == pytest.approx(10 / 2**0.5)
    assert Scaling({2: 1.0, 4: 8.0}).speed(8) == 16
    assert Scaling({2: 2.0, 4: 1.0}).speed(8) == 1
    assert Scaling({3: 6.0}).speed(5) == 10


def test_the_record_of_an_earlier_job_gives_its_speed_by_the_number_of_nodes() -> None:
    story = records.story("grown")
    found = speeds(story)
    assert list(found) == sorted({len(round.nodes) for round in story.rounds if round.first is not None})
    assert all(1 < speed < 100 for speed in found.values())
    shares = efficiency({2: 10.0, 4: 15.0})
    assert shares == {2: 1.0, 4: 0.75}


@pytest.mark.parametrize("text", ["", "# nothing", "4", "4 fast", "0 1", "4 -1", "4 1 2", "4 inf"])
def test_a_file_with_anything_but_sizes_and_speeds_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected lines of NODES STEPS_PER_SECOND, for example"):
        Scaling.parse(text)
    assert Scaling.parse("# nodes, steps/s\n2, 1\n\n4 1.9  # measured\n").known == {2: 1.0, 4: 1.9}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a script, and an sbatch that records its arguments and its input."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("train.py").write_text("print()\n")
    return tmp_path


def sbatch(here: Path, body: str) -> None:
    path = here / "bin" / "sbatch"
    path.write_text(f'#!/bin/sh\necho "$@" >> {here}/calls\ncp "$3" {here}/script.$2\n{body}\n')
    path.chmod(0o755)


FREE = "echo sbatch: Job 7 to start at $(date +%FT%T) using 4 processors on 'nodes n[1-2] in partition a' >&2"
LATER = "echo 'sbatch: Job 8 to start at 2099-01-01T00:00:00 using 8 processors on nodes n[1-4] in partition a' >&2"
BUSY = f'case "$2" in --nodes=2-*) {FREE};; *) {LATER};; esac'


def test_plan_accepts_the_options_of_elastic_sbatch_and_submits_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch(here, BUSY)
    assert main(["plan", "-N", "2:4", "--scaling", "linear", "-p", "gpu", "train.py", "--json", "--work", "3"]) == 0
    calls = (here / "calls").read_text().splitlines()
    assert sorted(call.rpartition(" ")[0] for call in calls) == [f"--test-only --nodes={k}-4" for k in (2, 3, 4)]
    script = (here / "script.--nodes=3-4").read_text()
    assert "#SBATCH --partition=gpu" in script
    assert "train.py --json --work 3" in script.replace("\\\n  ", ""), "where it wraps depends on this checkout's path"
    shown = capsys.readouterr().out
    assert "2:4      at once" in shown
    assert "ask for --nodes 2:4 --grow" in shown
    assert "2099-01-01 00:00" in shown
    assert sorted(path.name for path in Path().iterdir()) == ["train.py"]


def test_plan_prints_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch(here, BUSY)
    assert main(["plan", "--json", "--work=1h", "-N", "2:4", "train.py"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["ask_for"]) == (1, "--nodes 2:4")
    assert [row["nodes"] for row in found["rows"]] == ["2:4", "3:4", "4:4"]
    assert found["rows"][0]["done_in"] == pytest.approx(3600, abs=5)


def test_if_growth_comes_from_another_partition_slurm_is_asked_there_about_the_nodes_above_min(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch(here, f'case "$*" in *--nodes=2-2*low*) {LATER};; *) {FREE};; esac')
    argv = ["--work=10h", "-N", "2:4", "-p", "safe", "--grow", "--grow-partition", "low", "train.py"]
    assert main(["plan", *argv]) == 0
    calls = (here / "calls").read_text().splitlines()
    low = "--partition=low"
    assert sorted(call.rpartition(" ")[0] for call in calls) == [
        f"--test-only --nodes=1-1 {low}", "--test-only --nodes=2-2", f"--test-only --nodes=2-2 {low}"
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert "grows to  3 nodes at once, 4 nodes in " in shown
    assert "2:4      at once" in shown
    assert "ask for --nodes 2:4 --grow\n  it is done in 6 h 40 min; without further nodes in 10 h" in shown
    assert main(["plan", "--json", *argv]) == 0
    assert [grown["nodes"] for grown in json.loads(capsys.readouterr().out)["growth"]] == [3, 4]


def test_for_a_job_that_grows_with_other_options_in_its_own_partition_slurm_is_asked_with_both_sets(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch(here, f'case "$*" in *constraint=old*) echo Invalid feature >&2; exit 1;; esac\n{BUSY}')
    with_grow = ["-N", "2:4", "--grow", "--grow-constraint", "old", "train.py"]
    assert main(["plan", *with_grow]) == 2
    assert "the jobs by which the job grows (--constraint=old): Slurm refused" in capsys.readouterr().err
    assert main(["plan", "-N", "2:4", "--grow", "--grow-time", "1:00:00", "train.py"]) == 0
    shown = capsys.readouterr().out
    assert "2:4      at once" in shown
    assert "4:4      in " in shown
    assert "grows to  3 nodes in " in shown


def test_if_sbatch_refuses_all_sizes_the_error_names_the_source_of_the_option(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch(here, "echo allocation failure: Invalid partition name specified >&2; exit 1")
    monkeypatch.setenv("SBATCH_PARTITION", "nope")
    assert main(["plan", "-N", "2:4", "train.py"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("elastic-hpc: Slurm refused the job: Invalid partition name specified (--partition=nope")
    assert "SBATCH_PARTITION" in told


def test_a_size_that_slurm_refuses_is_a_row_of_the_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuses = "echo allocation failure: Requested node configuration is not available >&2; exit 1"
    sbatch(here, f'case "$2" in --nodes=4-*) {refuses};; esac\n{FREE}')
    assert main(["plan", "-N", "2:4", "train.py"]) == 0
    shown = capsys.readouterr().out
    assert "4:4      refused" in shown
    assert "4:4 is refused: Requested node configuration is not available" in shown


def test_a_controller_that_does_not_answer_is_no_refusal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch(here, "echo 'allocation failure: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    assert main(["plan", "-N", "2:4", "train.py"]) == 1
    assert "sbatch: Unable to contact slurm controller" in capsys.readouterr().err


def test_an_earlier_job_gives_the_scaling_and_the_steps(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch(here, BUSY)
    job = records.copy("grown", here)
    assert main(["plan", "--json", "--scaling", f"{job}/", "-N", "2:4", "train.py"]) == 0
    found = json.loads(capsys.readouterr().out)
    speed = Scaling(speeds(records.story("grown"))).speed(2)
    assert found["rows"][0]["done_in"] == pytest.approx(400 / speed, abs=2)


def test_the_test_of_a_job_of_several_sizes_points_to_the_plan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch(here, FREE)
    hint = "elastic-hpc plan with the same options says when each size of 2:4 would start"
    assert submission(["--test-only", "-N", "2:4", "train.py"]) == 0
    assert hint in capsys.readouterr().err
    for options in (["--test-only", "-Q", "-N", "2:4"], ["--test-only", "-N", "4"], ["-N", "2:4"]):
        assert submission([*options, "train.py"]) == 0
        assert "elastic-hpc plan" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--parsable", "-N", "2:4", "train.py"], "--parsable: elastic-hpc plan submits nothing"),
        (["--scaling", "nope", "-N", "2:4", "train.py"], "--scaling 'nope': expected linear, a file, or a job"),
        (["--work", "soon", "-N", "2:4", "train.py"], "--work 'soon': expected a time above 0"),
        (["-N", "2:4"], "expected SCRIPT"),
        (["train.py"], "--nodes: missing"),
    ],
)
def test_options_that_plan_cannot_use_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], argv: list[str], told: str
) -> None:
    sbatch(here, FREE)
    assert main(["plan", *argv]) == 2
    assert told in capsys.readouterr().err
    assert not (here / "calls").exists()
