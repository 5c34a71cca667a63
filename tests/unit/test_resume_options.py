"""``--resume``: the options that a batch script records at its submission, and those
that apply when the job continues.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from elastic_hpc import Job, UsageError, render
from elastic_hpc.cli import sbatch
from elastic_hpc.environment import FIRST_RUN, SPENT
from elastic_hpc.job import recorded
from elastic_hpc.job.look import may_be_recent
from elastic_hpc.job.lookup import find, select
from elastic_hpc.job.resume import Anew, Resumption
from elastic_hpc.job.spec import JobSpec
from elastic_hpc.record.events import append_event
from elastic_hpc.record.registry import remember
from elastic_hpc.record.rundir import RunDir

FAILED = {"outcome": "failed", "cause": "budget", "reason": "used up", "failure": None, "run": 1}
ODD = [
    *(
        "--nodes=2:4",
        "--grow",
        "--grow-partition=spot",
        "--env=A=b=c",
        "--grace=60",
        "--signal=USR1@200",
        "--exclusive",
    ),
    *("-p", "gpu", "--array=0-3", "--dependency=afterok:1", "--begin=now+60", "--python"),
]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script, and a Slurm that submits each job as 99 and knows no other."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "squeue").write_text(
        f'#!/bin/sh\ncat {tmp_path}/queue 2>/dev/null && exit\necho "Invalid job id" >&2; exit 1\n'
    )
    (programs / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (programs / "sbatch").write_text(
        f'#!/bin/sh\ncd {tmp_path}; cat > taken; echo "$*" > words; env > env; cd - >> words; echo 99\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "state"))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("train.py").write_text("pass\n")
    return tmp_path


def ended(place: Path, *words: str, verdict: dict | None = FAILED) -> RunDir:
    """Job 17, which has run twice."""
    rundir = RunDir(place / "elastic-logs" / "17").create()
    job = sbatch.job_of(*sbatch.read([*words, f"--log-dir={place}/elastic-logs", "train.py", "--lr", "a b\n$c"]))
    (rundir.path / "script.sbatch").write_text(render(job))
    rundir.write("spec.json", {"job": "17", "folder": str(place / "work"), "script": "train.py"})
    rundir.write("state.json", {"restarts": 3, "requeues": 1, "round": 5})
    rundir.write_bounds([1, 2])
    rundir.write("endpoint.json", {"run": 1})
    append_event(rundir.path, "n1", 1.0, "start", {"run": 0, "job": "17", "granted": 2})
    append_event(rundir.path, "n1", 2.0, "start", {"run": 1, "job": "17", "granted": 2})
    if verdict:
        rundir.write("verdict.json", verdict)
    return rundir


def test_a_batch_script_records_the_options_of_its_submission(place: Path) -> None:
    job = sbatch.job_of(*sbatch.read([*ODD, "python3 -X dev", "-m", "train", "--lr", "a b\n$c", "ü\udcff"]))
    known = recorded.read(os.fsencode(render(job)), "job 17")
    assert known
    assert dict(known.layer.options) == {
        "nodes": "2:4", "grow": "on", "env": "A=b=c", "grace": "60", "python": "python3 -X dev",
    }  # fmt: skip
    assert {str(given) for given in known.layer.sbatch} == {
        *("--partition=gpu", "--exclusive", "--grow-partition=spot", "--job-name=train", "--signal=B:USR1@200"),
    }
    assert (known.script, known.module, known.no_python) == ("train", True, False)
    assert known.script_args == ["--lr", "a b\n$c", "ü\udcff"]


def test_an_option_that_was_changed_by_hand_is_no_longer_known(place: Path) -> None:
    script = os.fsencode(render(JobSpec.of("train.py", nodes=2)))
    assert recorded.read(script, "job 17")
    assert recorded.read(script.replace(b"--no-kill", b"--no-kill --export=ALL", 1), "job 17") is None
    assert b"--resume" not in os.fsencode(render(JobSpec.of("train.py", nodes=2, template="torchrun")))


def taken(place: Path) -> str:
    """The submitted script with unwrapped commands, because their wrapping depends on this checkout's path."""
    return (place / "taken").read_text().replace("\\\n  ", "")


def test_a_resumed_job_keeps_its_options_unless_the_user_gives_new_ones(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rundir = ended(place, "--nodes=2:4", "--max-restarts=7", "--time=60", "--partition=gpu", "--env=A=1")
    (rundir.path / "left").touch()
    (rundir.path / "over").write_text("1")
    Path("elastic_hpc.toml").write_text("nodes = 9\n[sbatch]\npartition = 'other'\n")
    monkeypatch.setenv("SBATCH_ACCOUNT", "other")
    monkeypatch.chdir(place)
    assert sbatch.main(["--resume", str(rundir.path), "--time=30", "--env=B=2"]) == 0
    script = taken(place)
    for line in ("--time=30", "--partition=gpu", "--nodes=2-4"):
        assert f"#SBATCH {line} " in script
    assert "account" not in script
    assert "export A=1\nexport B=2" in script
    assert "--max-restarts 7" in script
    assert r"train.py --lr $'a b\n$c'" in script
    assert (place / "words").read_text() == f"--parsable --nodes=1-2\n{place}/work\n"
    given = dict(line.partition("=")[::2] for line in (place / "env").read_text().splitlines() if "=" in line)
    assert (given[FIRST_RUN], given[SPENT]) == ("2", "3,1")
    assert not list(rundir.path.glob("left")) + list(rundir.path.glob("over")) + list(rundir.path.glob("resuming"))


def test_a_resumed_job_is_found_by_both_ids_and_is_one_job(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rundir = ended(place, "--nodes=2")
    remember(rundir.path)
    job = Job(rundir.path)
    assert job.resume(max_restarts=20) == "99"
    (place / "queue").write_text("99|PENDING|N/A|N/A|Resources\n")
    monkeypatch.chdir("/")
    assert find("99") == find("17") == rundir.path
    assert [one.path for one in select([])] == [rundir.path]
    assert may_be_recent(rundir)
    assert (job.status().state, job.slurm_id, job.status().done) == ("PENDING", "99", False)
    assert "it was resumed as Slurm job 99, and had ended before: used up" in job._look().view.note
    with pytest.raises(UsageError, match="job 17 is PENDING: it has not ended"):
        job.resume()


def test_new_bounds_replace_those_of_a_resize(place: Path) -> None:
    rundir = ended(place, "--nodes=2:4")
    Job(rundir.path).resume(nodes=(3, 4))
    assert "--nodes" not in (place / "words").read_text()
    assert "bounds" not in (rundir.read("state.json") or {})


def test_an_edited_script_is_submitted_as_it_is(place: Path) -> None:
    rundir = ended(place, "--nodes=2:4")
    script = rundir.path / "script.sbatch"
    script.write_text(script.read_text().replace("exec ", "echo mine; exec "))
    with pytest.raises(UsageError, match=r"edit .*script\.sbatch, then type: elastic-sbatch --resume 17"):
        Job(rundir.path).resume(max_restarts=20)
    assert Job(rundir.path).resume(time="2:00:00") == "99"
    assert (place / "taken").read_text() == script.read_text()
    assert (place / "words").read_text().startswith("--parsable --nodes=1-2 --time=2:00:00\n")


@pytest.mark.parametrize(
    ("verdict", "queue", "words", "refusal"),
    [
        ({**FAILED, "outcome": "finished"}, "", [], "has finished; to continue the training, give the script other"),
        (None, "17|RUNNING|N/A|N/A|None", [], "to stop it first: elastic-hpc stop 17"),
        (FAILED, "17|COMPLETING|N/A|N/A|None", [], "is COMPLETING in Slurm; run the same command again"),
        (FAILED, "", ["--log-dir=x"], "--log-dir with --resume"),
        (FAILED, "", ["--array=1"], "--array with --resume"),
        (FAILED, "", ["--ntasks=4"], "--ntasks=4: with a task count"),
        (FAILED, "", ["--from-batch=job.sh"], "--from-batch job.sh with --resume"),
    ],
)
def test_a_job_that_cannot_be_resumed_is_refused_with_a_hint(
    place: Path, capsys: pytest.CaptureFixture[str], verdict: dict, queue: str, words: list[str], refusal: str
) -> None:
    rundir = ended(place, "--nodes=2:4", verdict=verdict)
    if queue:
        (place / "queue").write_text(queue + "\n")
    assert sbatch.main(["--resume", str(rundir.path), *words]) == 2
    assert refusal in capsys.readouterr().err
    assert not (place / "taken").exists()


def test_a_finished_job_trains_on_with_other_arguments(place: Path) -> None:
    rundir = ended(place, "--nodes=2:4", verdict={**FAILED, "outcome": "finished"})
    assert sbatch.main(["--resume", str(rundir.path), "-Q", "train.py", "--steps", "200"]) == 0
    assert "-- train.py --steps 200" in taken(place)


def test_only_the_owner_resumes_a_job(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rundir = ended(place, "--nodes=2")
    monkeypatch.setattr(os, "geteuid", lambda: rundir.path.stat().st_uid + 1)
    with pytest.raises(UsageError, match="who alone can resume it"):
        Job(rundir.path).resume()


def test_a_command_that_another_one_has_overtaken_does_not_resume_the_job_again(place: Path) -> None:
    rundir = ended(place, "--nodes=2")
    slow, fast = (Resumption(rundir.path, Anew("test", [], [], [])) for _ in range(2))
    with fast.submission():
        fast.submitted("99")
    (place / "queue").write_text("99|PENDING|N/A|N/A|None\n")
    with pytest.raises(UsageError, match="job 17 is PENDING"), slow.submission():
        raise AssertionError("the job would be submitted twice")


def test_two_commands_do_not_resume_one_job(place: Path) -> None:
    rundir = ended(place, "--nodes=2")
    (rundir.path / "resuming").touch()
    with pytest.raises(UsageError, match="is being resumed or removed by another command"):
        Job(rundir.path).resume()
    assert json.loads((rundir.path / "verdict.json").read_text()) == FAILED
