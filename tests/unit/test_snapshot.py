"""The code of a job: the copy that elastic-sbatch stages, and how the batch script takes it. Real git, no
Slurm.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_hpc.cli.sbatch import main
from elastic_hpc.errors import SlurmError, UsageError
from elastic_hpc.job import snapshot
from elastic_hpc.job.script import render
from elastic_hpc.job.snapshot import WorkTree
from elastic_hpc.job.spec import JobSpec
from elastic_hpc.job.submission import prepared

GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always"]


def git(*arguments: str, cwd: Path) -> str:
    return subprocess.run([*GIT, *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work tree with a commit, a change that is not committed, and a file that git does not know."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "ELASTIC_", "GIT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    top = tmp_path / "it's mine"
    (top / "sub").mkdir(parents=True)
    git("init", "--quiet", "--initial-branch=topic", cwd=top)
    git("remote", "add", "origin", "https://user:hunter2@example.org/x.git", cwd=top)
    (top / "train.py").write_text("committed\n")
    (top / "sub" / "tool.sh").write_text("")
    (top / "sub" / "tool.sh").chmod(0o755)
    (top / "link").symlink_to("train.py")
    (top / "deleted.py").write_text("")
    git("add", ".", cwd=top)
    git("commit", "--quiet", "-m", "first", cwd=top)
    (top / "train.py").write_text("changed\n")
    (top / "untracked.py").write_text("pass")
    (top / "deleted.py").unlink()
    monkeypatch.chdir(top)
    return top


def of(script: str = "train.py", **options: object) -> JobSpec:
    return JobSpec.of(script, nodes=1, log_dir="../logs", **options)


def test_a_script_outside_the_folder_of_chdir_leads_to_its_copy_in_the_snapshot(project: Path) -> None:
    assert of(snapshot=True, chdir="sub").launch.script == "../train.py"


def test_a_program_of_the_work_tree_leads_to_its_copy_and_stays_a_path(project: Path) -> None:
    assert of("./sub/tool.sh", no_python=True, snapshot=True).launch.script == "./sub/tool.sh"
    assert of("bash", no_python=True, snapshot=True).launch.script == "bash"


def staged_in(project: Path) -> list[Path]:
    return sorted((project.parent / "logs").glob(".submission.*"))


def put_aside(project: Path, spec: JobSpec) -> tuple[str, Path]:
    """The batch script of a queued job, and its staged copy."""
    with prepared(spec) as script:
        pass
    (staged,) = staged_in(project)
    return os.fsdecode(script), staged


def start(project: Path, script: str, job: str = "7", **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the batch script on a node whose srun prints its working directory."""
    node = project.parent / "node"
    node.mkdir(exist_ok=True)
    for name, text in {"srun": "pwd -P; cat train.py", "scontrol": "echo n1"}.items():
        (node / name).write_text(f"#!/bin/sh\n{text}\n")
        (node / name).chmod(0o755)
    environ = {"PATH": f"{node}:{os.environ['PATH']}", "SLURM_JOB_ID": job, "SLURM_JOB_NUM_NODES": "1", **environ}
    (node / "script").write_text(script.partition("\nexec ")[0])
    command = ["bash", str(node / "script")]
    return subprocess.run(command, env=environ, cwd=project, text=True, capture_output=True, check=False, timeout=30)


def test_every_submission_records_revision_branch_and_changes_and_no_url(project: Path) -> None:
    script, staged = put_aside(project, of())
    facts: dict[str, Any] = json.loads((staged / "code.json").read_text())
    assert facts.pop("time") > 0
    assert facts == {
        "folder": str(project),
        "revision": git("rev-parse", "HEAD", cwd=project),
        "branch": "topic",
        "dirty": True,
        "diff_complete": True,
        "snapshot": False,
    }
    diff = (staged / "code.diff").read_text()
    assert "-committed\n+changed\n" in diff
    assert [path.stat().st_mode & 0o777 for path in (staged, *sorted(staged.iterdir()))] == [0o700, 0o600, 0o600]
    assert "hunter2" not in (staged / "code.json").read_text() + diff + script


def test_the_recorded_changes_lead_from_the_revision_to_what_was_there(project: Path, tmp_path: Path) -> None:
    (project / "data.bin").write_bytes(bytes(range(256)))
    git("add", "data.bin", cwd=project)
    _, staged = put_aside(project, of())
    git("clone", "--quiet", str(project), str(tmp_path / "clone"), cwd=tmp_path)
    git("apply", str(staged / "code.diff"), cwd=tmp_path / "clone")
    for name in ("train.py", "data.bin"):
        assert (tmp_path / "clone" / name).read_bytes() == (project / name).read_bytes()
    assert not (tmp_path / "clone" / "deleted.py").exists()


def test_a_clean_work_tree_is_recorded_as_clean(project: Path) -> None:
    git("commit", "--quiet", "-am", "second", cwd=project)
    git("checkout", "--quiet", "--detach", cwd=project)
    _, staged = put_aside(project, of())
    facts = json.loads((staged / "code.json").read_text())
    assert (facts["dirty"], facts["branch"], (staged / "code.diff").read_text()) == (False, None, "")


def test_a_large_change_is_truncated_and_that_is_reported(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_MAX_DIFF", 1000)
    (project / "train.py").write_text("x = 1\n" * 100_000)
    _, staged = put_aside(project, of())
    facts = json.loads((staged / "code.json").read_text())
    assert (facts["dirty"], facts["diff_complete"]) == (True, False)
    assert (staged / "code.diff").stat().st_size == 1000


def test_a_slow_git_does_not_delay_the_submission(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = of()
    (project.parent / "bin").mkdir()
    slow = project.parent / "bin" / "git"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(snapshot, "_SECONDS", 0.3)
    _, staged = put_aside(project, spec)
    facts = json.loads((staged / "code.json").read_text())
    assert (facts["revision"], facts["dirty"], facts["diff_complete"]) == (None, None, False)


@pytest.mark.parametrize("why", ["no work tree", "no git"])
def test_without_git_or_a_work_tree_nothing_is_recorded_and_the_job_is_submitted(
    project: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "no git":
        monkeypatch.setenv("PATH", str(project))
    else:
        shutil.rmtree(project / ".git")
    with prepared(of()) as script:
        assert b".submission." not in script
    assert staged_in(project) == []


def test_a_snapshot_has_the_tracked_files_in_their_current_state_including_submodules(
    project: Path, tmp_path: Path
) -> None:
    library = tmp_path / "library"
    library.mkdir()
    git("init", "--quiet", cwd=library)
    (library / "lib.py").write_text("")
    git("add", ".", cwd=library)
    git("commit", "--quiet", "-m", "x", cwd=library)
    git("submodule", "--quiet", "add", str(library), "vendor/lib", cwd=project)
    (project / "vendor" / "lib" / "lib.py").write_text("changed there\n")
    _, staged = put_aside(project, of(snapshot=True))
    copy = staged / "code"
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_symlink() or path.is_file()}
    assert files == {"train.py", "sub/tool.sh", "link", ".gitmodules", "vendor/lib/lib.py"}
    assert (copy / "train.py").read_text() == "changed\n"
    assert (copy / "vendor" / "lib" / "lib.py").read_text() == "changed there\n"
    assert os.readlink(copy / "link") == "train.py"
    assert os.access(copy / "sub" / "tool.sh", os.X_OK)


def test_the_job_runs_in_the_copy_in_every_run_whatever_is_edited_later(project: Path) -> None:
    script, staged = put_aside(project, of(snapshot=True))
    (project / "train.py").write_text("edited after the submission\n")
    run_dir = project.parent / "logs" / "7"
    for run in range(2):
        done = start(project, script)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{run_dir}/code\nchanged\n", ""), run
        assert not staged.exists()
    assert {"code", "code.diff", "code.json"} < {path.name for path in run_dir.iterdir()}


def test_a_job_that_was_killed_while_it_took_the_code_takes_the_rest_next_time(project: Path) -> None:
    script, staged = put_aside(project, of(snapshot=True))
    run_dir = project.parent / "logs" / "7"
    run_dir.mkdir()
    (run_dir / "code").mkdir()
    (run_dir / "code" / "train.py").write_text("cha")
    assert start(project, script).stdout == f"{run_dir}/code\nchanged\n"
    assert not staged.exists()
    staged.mkdir()  # killed right before it cleaned up
    shutil.copy2(run_dir / "code.json", staged / "code.json")
    assert start(project, script).stdout == f"{run_dir}/code\nchanged\n"
    assert not staged.exists()


def test_the_working_directory_has_the_same_place_in_the_copy_and_set_up_lines_run_outside(project: Path) -> None:
    (project / "sub" / "train.py").write_text("below\n")
    git("add", ".", cwd=project)
    script, _ = put_aside(project, of(chdir="sub", snapshot=True, setup=["pwd"]))
    assert start(project, script).stdout == f"{project}\n{project.parent}/logs/7/code/sub\nbelow\n"


@pytest.mark.parametrize("chdir", [None, "sub"])
def test_a_script_given_by_an_absolute_path_is_the_one_in_the_copy(project: Path, chdir: str | None) -> None:
    spec = of(str(project / "train.py"), chdir=chdir, snapshot=True)
    assert spec.launch.script == ("../train.py" if chdir else "train.py")
    assert of(str(project / "train.py")).launch.script == str(project / "train.py")


def test_each_task_of_an_array_gets_the_code_and_the_last_one_cleans_up(project: Path) -> None:
    script, staged = put_aside(project, of(array="1-2", snapshot=True))
    for task in ("1", "1", "2"):
        assert staged.exists()
        tasks = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2"}
        assert start(project, script, **tasks).stdout == f"{project.parent}/logs/5_{task}/code\nchanged\n"
    assert not staged.exists()


def test_a_task_that_continues_as_a_job_of_its_own_leaves_the_copy_for_the_other_tasks(project: Path) -> None:
    script, staged = put_aside(project, of(array="1-2", snapshot=True))
    tasks = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1"}
    start(project, script, **tasks, SLURM_ARRAY_TASK_COUNT="2")
    again = {"ELASTIC_HPC_CONTINUE": str(project.parent / "logs" / "5_1"), "SLURM_ARRAY_TASK_COUNT": "1"}
    assert start(project, script, **{**tasks, "SLURM_ARRAY_JOB_ID": "6"}, **again).stdout.endswith("changed\n")
    assert staged.exists()


def test_a_joiner_runs_in_the_copy_of_the_job_that_it_joins(project: Path) -> None:
    script, _ = put_aside(project, of(snapshot=True))
    start(project, script)
    run_dir = project.parent / "logs" / "7"
    (project / "train.py").write_text("edited\n")
    assert start(project, script, "8", ELASTIC_HPC_JOIN=str(run_dir)).stdout == f"{run_dir}/code\nchanged\n"


def test_the_printed_script_run_by_hand_reports_that_it_has_no_copy(project: Path) -> None:
    done = start(project, render(of(snapshot=True)))
    assert done.returncode == 1
    assert "the snapshot of this job is missing; submit the job again with elastic-sbatch --snapshot" in done.stderr


def test_a_refused_job_leaves_nothing_behind_and_one_that_may_be_queued_keeps_its_code(project: Path) -> None:
    with pytest.raises(UsageError), prepared(of(snapshot=True)):
        raise UsageError("Slurm refused the job: no")
    with prepared(of(snapshot=True), will_run=False):
        pass
    assert staged_in(project) == []
    with pytest.raises(SlurmError), prepared(of(snapshot=True)):
        raise SlurmError("no answer")
    with pytest.raises(KeyboardInterrupt), prepared(of(snapshot=True)):
        raise KeyboardInterrupt
    assert len(staged_in(project)) == 2


def test_a_dry_run_leaves_no_trace_and_differs_only_in_the_name_of_the_staged_copy(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["-N1", "--log-dir", "../logs", "--snapshot", "train.py"]
    assert main(["--dry-run", *argv]) == 0
    printed = capsys.readouterr().out
    assert not (project.parent / "logs").exists()
    assert git("status", "--porcelain", "--ignored", cwd=project) == "D deleted.py\n M train.py\n?? untracked.py"
    script, staged = put_aside(project, of(snapshot=True))
    from_python = re.sub(r" Python(?=[;\n])", " command line", script).replace(staged.name, ".submission.TOKEN")
    (text, *_), (shown, *_) = (both.partition("# elastic-sbatch --resume") for both in (from_python, printed))
    assert text == shown


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("untracked.py", {}, "script 'untracked.py' with --snapshot: git does not track it .* git add untracked.py"),
        ("../outside.py", {}, "script '../outside.py' with --snapshot: git does not track it"),
        ("train.py", {"chdir": ".."}, "is in no work tree of git"),
        ("train.py", {"template": "torchrun"}, "--snapshot: plain torchrun has no use for it"),
        ("train.py", {"snapshot": "yes"}, "--snapshot 'yes': expected on or off"),
    ],
)
def test_a_folder_that_cannot_be_a_snapshot_is_refused(
    project: Path, script: str, options: dict[str, Any], message: str
) -> None:
    (project.parent / "outside.py").write_text("pass")
    with pytest.raises(UsageError, match=message):
        of(script, **{"snapshot": True, **options})


def test_a_snapshot_needs_a_work_tree(project: Path) -> None:
    shutil.rmtree(project / ".git")
    with pytest.raises(UsageError, match=r"--snapshot: .* is in no work tree of git"):
        of(snapshot=True)
    assert of(snapshot=False).code is None


def test_a_template_that_does_not_use_the_copy_is_refused_and_other_jobs_record_nothing(project: Path) -> None:
    (project / "my.j2").write_text("#!/bin/sh\n")
    with (
        pytest.raises(UsageError, match=r"--template \./my\.j2 with --snapshot: .* include snapshot\.j2"),
        prepared(of(template="./my.j2", snapshot=True)),
    ):
        pass
    for template in ("./my.j2", "torchrun"):
        with prepared(of(template=template)):
            pass
    assert staged_in(project) == []


def test_a_file_may_switch_snapshots_on_and_the_command_line_switches_them_off(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "elastic_hpc.toml").write_text("snapshot = true\n")
    for argv, on in ([], True), (["--snapshot=off"], False):
        assert main(["--dry-run", "-N1", *argv, "train.py"]) == 0
        assert ('cd "$run_dir"/code || {' in capsys.readouterr().out) == on
    assert main(["--dry-run", "-N1", "--snapshot", "on", "train.py"]) == 2
    assert "expected the value after '=', for example --snapshot=on" in capsys.readouterr().err


def test_files_that_cannot_be_copied_end_the_submission_with_their_name(project: Path) -> None:
    spec = of(snapshot=True)
    assert spec.code
    gone = replace(spec, code=WorkTree(str(project / "gone"), "."))
    with pytest.raises(UsageError, match=r"--snapshot: git does not list the files of .*gone"), prepared(gone):
        pass
    assert staged_in(project) == []
