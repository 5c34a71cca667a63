"""``elastic-hpc clean``: which run directories it removes, and which it always keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import records

from elastic_hpc.cli.hpc import main
from elastic_hpc.job import cleaning, snapshot
from elastic_hpc.job.lookup import select
from elastic_hpc.record.registry import remember, remembered
from elastic_hpc.record.rundir import RunDir

LONG_AGO = time.time() - 40 * 86400


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home where Slurm answers but knows no job."""
    records.alone(tmp_path, monkeypatch)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    slurm_says(tmp_path)
    return tmp_path


def slurm_says(
    home: Path, *active: str, fails: bool = False, accounting: str = "(null)", ended: dict[str, str] | None = None
) -> None:
    """Let squeue answer with the jobs ``active`` and the ends of others; other clusters of the site do not answer."""
    mine = "\n".join(active)
    ours = "; ".join(f"case $* in *{id}*) echo '{id}|RUNNING|N/A|N/A|None';; esac" for id in active) or ":"
    ours += "".join(
        f"; case $* in *{id}*%T\\|*) echo '{id}|{state}|N/A|N/A|NonZeroExitCode';; *{id}*) echo {state};; esac"
        for id, state in (ended or {}).items()
    )
    fails_at = "*" if fails else "*--clusters=all*"
    (home / "squeue").write_text(
        f"#!/bin/sh\ncase $* in {fails_at}) echo squeue: error: no connection >&2; exit 1;; *--me*) echo '{mine}';; "
        f"*) {ours};; esac\n"
    )
    (home / "squeue").chmod(0o755)
    for name, text in (
        ("sacct", "exit 1"),
        ("scontrol", f"[ '{accounting}' ] && echo 'AccountingStorageType = {accounting}'"),
    ):
        (home / name).write_text(f"#!/bin/sh\n{text}\n")
        (home / name).chmod(0o755)


def job(home: Path, name: str, record: str = "faults", *, ended: bool = True, when: float = LONG_AGO) -> Path:
    folder = records.copy(record, home / "elastic-logs").rename(home / "elastic-logs" / name)
    if not ended:
        (folder / "verdict.json").unlink()
        (folder / "acted.0").unlink(missing_ok=True)
    remember(folder)
    return aged(folder, when)


def aged(folder: Path, when: float = LONG_AGO) -> Path:
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (when, when), follow_symlinks=False)
    return folder


def removable(**how: bool) -> dict[str, str]:
    """The names of the folders that would be removed, with the states."""
    found = cleaning.inventory(select([]), LONG_AGO + 60, **{"named": False, "with_files": False, **how})
    return {leftover.path.name: leftover.state for leftover in found.leftovers}


def test_jobs_that_ended_long_ago_are_removed_and_forgotten(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, broken, new = job(home, "11"), job(home, "12", "broken"), job(home, "13", when=time.time() - 1200)
    assert main(["clean", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[2] for line in out.splitlines()[:2]] == ["COMPLETED", "FAILED"]
    assert str(old) in out
    assert str(new) not in out
    assert "to be removed: 2 folders, " in out
    assert old.is_dir()
    assert main(["clean", "--yes"]) == 0
    assert capsys.readouterr().out.endswith("removed: 2 of 2\n")
    assert (old.exists(), broken.exists(), new.exists()) == (False, False, True)
    assert remembered() == [new]
    assert main(["clean", "--yes"]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"
    assert main(["clean", "--yes", "--older-than", "15m"]) == 0
    assert not new.exists()


def test_a_job_that_is_submitted_to_a_removed_folder_is_known_again(home: Path) -> None:
    old = job(home, "11")
    assert main(["clean", "--yes"]) == 0
    remember(old)
    assert remembered() == [old]


def test_jobs_that_are_active_by_their_record_or_by_slurm_stay(home: Path) -> None:
    job(home, "11", ended=False)
    job(home, "12")  # ended by its record, but in the queue again
    job(home, "13_4")
    job(home, "14")
    assert removable() == {"12": "COMPLETED", "13_4": "COMPLETED", "14": "COMPLETED"}
    slurm_says(home, "11", "12", "13_5")
    assert removable() == {"14": "COMPLETED"}


def test_a_resumed_job_stays_while_the_job_that_continues_is_active(home: Path) -> None:
    folder = job(home, "11")
    (folder / "acted.1").write_text("15")
    aged(folder)
    slurm_says(home, "15")
    assert removable() == {}


def test_without_an_answer_from_slurm_the_folder_stays(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(home, "11")
    slurm_says(home, fails=True)
    assert removable() == {}
    assert main(["clean", "--dry-run"]) == 0
    assert "kept: 1 because Slurm did not answer (squeue --me" in capsys.readouterr().out


def test_a_job_of_unknown_end_is_removed_only_if_it_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = job(home, "11", ended=False)
    assert main(["clean", "--dry-run"]) == 0
    assert "kept: 1 whose end is unknown" in capsys.readouterr().out
    assert main(["clean", "--yes", "11"]) == 0
    assert not folder.exists()


def test_checkpoints_stay_unless_the_user_includes_them(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = job(home, "11")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "1").touch()
    (folder / "best.pt").write_bytes(bytes(3_000_000))
    aged(folder)
    assert main(["clean", "--yes"]) == 0
    assert "kept: 1 with files of the script, such as checkpoints; --with-checkpoints" in capsys.readouterr().out
    assert main(["clean", "--yes", "--with-checkpoints"]) == 0
    out = capsys.readouterr().out
    assert f"{folder}  (with best.pt checkpoints)" in out
    assert "to be removed: 1 folder, 3." in out
    assert not folder.exists()


def test_all_files_that_we_write_into_a_run_directory_are_known_as_ours(home: Path) -> None:
    folder = job(home, "11")
    for name in (
        *("secret", "heartbeat", "events.n1.jsonl", "first.11.0.0", "left", "script.sbatch", "code.json", "code.diff"),
        *("code.json.~1~", "unfit.n2.json", "turn.0.1", "acts.0", "over", "once-more", "running", ".state.json.n1.5"),
        *("warning.json", "starts.json", "node.0.lock", "host.lock", "began.0.n1", "code.files.json"),
        "code.files.json.~2~",
    ):
        (folder / name).touch()
    (folder / "notices").mkdir()
    (folder / "notices" / "segment_health_check.n1").touch()
    for name in ("conclude.log", "0.join-7.log", "0.again-n2.log", "0.1/n1.stacks", "0.1/n1.rank0,2-3.log"):
        (folder / "logs" / name).touch()
    aged(folder)
    assert removable() == {"11": "COMPLETED"}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "code/checkpoints/last.pt",
            "logs/tb/events.1",
            "logs/0.1/best.pt",
            ".ckpt/1",
            "first.pt",
            "acts.npz",
            "code/a",
        ),
        *("best.lock", ".hydra/config.yaml", "results/1/x", "code.~1~/a", "notices/a", "logs/last"),
    ],
)
def test_a_file_that_we_do_not_write_keeps_the_folder(home: Path, name: str) -> None:
    folder = job(home, "11")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    aged(folder)
    assert removable() == {}
    assert removable(with_files=True) == {"11": "COMPLETED"}


def test_a_large_file_with_the_name_of_a_mark_keeps_the_folder(home: Path) -> None:
    folder = job(home, "11")
    (folder / "first.1").write_bytes(bytes(5000))
    aged(folder)
    assert removable() == {}


def test_in_a_copy_of_the_code_only_the_copied_files_are_ours(home: Path) -> None:
    work, folder = home / "work", job(home, "11")
    (work / "sub").mkdir(parents=True)
    (work / "train.py").write_text("pass")
    (work / "sub" / "last.csv").write_text("1")
    (work / "link").symlink_to("train.py")
    subprocess.run(["git", "init", "-q", work], check=True)
    subprocess.run(["git", "-C", work, "add", "."], check=True)
    snapshot.put_aside(snapshot.WorkTree(str(work), "."), home / "staged", snapshot=True)
    subprocess.run(f"cp -a {home}/staged/code* {folder}", shell=True, check=True)
    (folder / "code" / "__pycache__").mkdir()
    (folder / "code" / "__pycache__" / "train.cpython-311.pyc").touch()

    def kept() -> str:
        return " ".join(cleaning.remains(folder).files)

    assert kept() == ""
    (folder / "code" / "sub" / "last.csv").write_text("1\n2\n")
    assert kept() == "code/sub/last.csv"
    (folder / "code" / "ckpt.pt").touch()
    assert kept() == "code/ckpt.pt code/sub/last.csv"
    (folder / "code.files.json").write_text("[[]]")
    assert "code/train.py" in kept()


@pytest.mark.parametrize("ended", [True, False])
def test_a_job_with_a_sign_of_life_stays_even_if_it_is_named(home: Path, *, ended: bool) -> None:
    folder = job(home, "11", ended=ended)
    (folder / "heartbeat").touch()
    assert main(["clean", "--yes", "--with-checkpoints", "11"]) == 0
    assert folder.exists()
    aged(folder, time.time() - 3600)
    (folder / "logs" / "0.1" / "n1.rank0.log").touch()
    assert main(["clean", "--yes", "11"]) == 0
    assert folder.exists()


def test_a_job_of_unknown_end_stays_for_a_day_even_if_it_is_named(home: Path) -> None:
    folder = job(home, "11", ended=False, when=time.time() - 3600)
    assert main(["clean", "--yes", "11"]) == 0
    assert folder.exists()


def test_without_an_answer_about_other_clusters_all_jobs_stay_at_a_site_with_several_clusters(home: Path) -> None:
    job(home, "11")
    slurm_says(home, accounting="accounting_storage/slurmdbd")
    assert removable() == {}
    slurm_says(home, accounting="")  # scontrol fails too
    assert removable() == {}


def test_a_job_that_is_being_resumed_stays(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = job(home, "11")
    (folder / "resuming").touch()
    aged(folder)
    assert main(["clean", "--yes", "11"]) == 0
    assert "kept: 1 being resumed" in capsys.readouterr().out
    assert folder.exists()


def test_an_interrupted_removal_is_resumed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = job(home, "11")
    job(home, "12", when=time.time())

    def fails(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(cleaning.shutil, "rmtree", fails)
        assert main(["clean", "--yes"]) == 1
    assert not folder.exists(), "a half-removed job is not resumed"
    (rest,) = folder.parent.glob(".removed.*")
    assert main(["clean", "--yes"]) == 0
    assert not rest.exists()


def test_control_characters_in_names_do_not_reach_the_terminal(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = job(home, "11")
    (folder / "a\x1b[2Jb\nc.pt").touch()
    aged(folder)
    assert main(["clean", "--dry-run", "--with-checkpoints"]) == 0
    assert "(with a\\x1b[2Jb\\nc.pt)" in capsys.readouterr().out


def test_links_are_not_followed(home: Path) -> None:
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data").write_text("precious")
    folder = job(home, "11")
    (folder / "logs" / "link").symlink_to(elsewhere)
    (folder.parent / "15").symlink_to("11")
    link = folder.parent / "12"
    link.symlink_to(job(elsewhere, "16"))
    remember(link)
    aged(folder)
    assert main(["clean", "--yes", "--with-checkpoints"]) == 0
    assert not folder.exists()
    assert not (folder.parent / "15").is_symlink()
    assert link.is_symlink()
    assert (elsewhere / "data").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder away")
def test_another_users_folder_stays(home: Path) -> None:
    os.chown(job(home, "11"), 65534, 65534)
    assert removable() == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_an_unreadable_folder_is_skipped(home: Path) -> None:
    code = "import os; from elastic_hpc.job.lookup import select; os.seteuid(65534); print(len(select([])))"
    environ = {**os.environ, "XDG_STATE_HOME": str(home / "none"), "PYTHONPATH": str(Path(__file__).parents[2])}
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # tmp_path is closed to others
        Path(place).chmod(0o755)
        for name in ("11", "12"):
            folder = Path(place, "elastic-logs", name)
            folder.mkdir(parents=True)
            (folder / "spec.json").write_text("{}")
        folder.chmod(0o700)
        done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=place, capture_output=True, check=False)
    assert done.stdout == b"1\n", done.stderr


@pytest.mark.parametrize(("state", "gone"), [("FAILED", True), ("CANCELLED", True), ("", False), ("RUNNING", False)])
def test_a_job_that_failed_before_its_start_is_removed(home: Path, state: str, *, gone: bool) -> None:
    folder = home / "elastic-logs" / "17"
    folder.mkdir(parents=True)
    (folder / "script.sbatch").write_text("#!/bin/bash\n# made by elastic-sbatch 0.1\n")
    remember(aged(folder))
    slurm_says(home, *(["17"] if state == "RUNNING" else []), ended={"17": state} if gone else {})
    assert main(["clean", "--yes"]) == 0
    assert folder.exists() != gone


def test_the_batch_script_of_another_program_keeps_the_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = home / "elastic-logs" / "17"
    folder.mkdir(parents=True)
    (folder / "script.sbatch").write_text("#!/bin/bash\n")
    remember(aged(folder))
    slurm_says(home, ended={"17": "FAILED"})
    assert main(["clean", "--yes", "17"]) == 0
    assert "kept: 1 without a job's record or batch script: 17\n" in capsys.readouterr().out
    assert folder.exists()


def test_a_folder_without_a_record_stays(home: Path) -> None:
    (home / "elastic-logs" / "17" / "logs").mkdir(parents=True)
    remember(home / "elastic-logs" / "17")
    aged(home / "elastic-logs" / "17")
    assert removable() == {}


def test_copies_of_code_are_removed_when_no_job_can_be_waiting_for_them(home: Path) -> None:
    job(home, "11", when=time.time())
    for name in (".submission.a", ".submission.b"):
        (home / "elastic-logs" / name / "code").mkdir(parents=True)
    aged(home / "elastic-logs" / ".submission.a")
    slurm_says(home, "20")
    assert removable() == {}
    slurm_says(home)
    assert removable() == {".submission.a": "code"}


def answers(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], str]) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: answer())


def test_clean_asks_and_accepts_only_yes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = job(home, "11")
    for answer in ("", "n", "what?"):
        answers(monkeypatch, lambda answer=answer: answer)
        assert main(["clean"]) == 0
        assert folder.exists()
    answers(monkeypatch, lambda: "y")
    assert main(["clean"]) == 0
    assert not folder.exists()


def test_a_job_whose_resume_begins_while_another_job_is_removed_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = job(home, "11"), job(home, "12")
    removes = cleaning.shutil.rmtree

    def then_resumed(path: Path) -> None:
        removes(path)
        assert RunDir(second).claim("resuming", "")

    monkeypatch.setattr(cleaning.shutil, "rmtree", then_resumed)
    assert main(["clean", "--yes"]) == 1
    assert not first.exists()
    assert second.exists()
    assert "it is being resumed: not removed" in capsys.readouterr().err


def test_a_job_that_is_resumed_while_clean_asks_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = job(home, "11")

    def resumed() -> str:
        RunDir(folder).write("endpoint.json", {**json.loads((folder / "endpoint.json").read_text()), "run": 7})
        return "y"

    answers(monkeypatch, resumed)
    assert main(["clean"]) == 1
    assert folder.exists()
    assert "it has changed: not removed" in capsys.readouterr().err
    assert not (folder / "resuming").exists()


def test_without_a_terminal_clean_removes_nothing_unless_told_to(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = job(home, "11")
    assert main(["clean"]) == 2
    assert "expected --yes to remove without a question, or --dry-run" in capsys.readouterr().err
    assert folder.exists()
