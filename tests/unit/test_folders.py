"""A job accepts only folders for its run directory that no other user may change."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.record import folders
from elastic_hpc.record.folders import make_log_dir
from elastic_hpc.record.rundir import RunDir

OTHER = 4242


@pytest.fixture(params=[0o022, 0o002, 0])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """All existing folders belong to another user, new files belong to this user."""
    real = Path.stat

    def other(path: Path, **options: bool) -> os.stat_result:
        found = real(path, **options)
        fields = list(found)
        fields[stat.ST_UID] = OTHER
        return os.stat_result(fields) if stat.S_ISDIR(found.st_mode) else found

    monkeypatch.setattr(Path, "stat", other)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_folders_are_private_and_no_parent_folder_is_open_to_all_users(tmp_path: Path, umask: int) -> None:
    make_log_dir(tmp_path / "a" / "logs")
    rundir = RunDir(tmp_path / "a" / "logs" / "7").create().create()
    assert mode(rundir.path) == 0o700
    assert mode(tmp_path / "a") == mode(tmp_path / "a" / "logs") == 0o775 & ~umask
    assert mode(RunDir.new(tmp_path / "b", "local").path) == 0o700


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o722, 0o702, 0o1777])
def test_a_run_directory_that_others_may_write_to_is_refused_with_a_hint(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "run"
    path.mkdir()
    path.chmod(bits)
    says = rf"run directory {path}: owner \w+, mode {bits:04o}; expected .* \(mode 0700\); type: chmod go-w {path};"
    with pytest.raises(ElasticError, match=says):
        RunDir(path).create()
    subprocess.run(["chmod", "go-w", str(path)], check=True)
    RunDir(path).create()


def test_the_users_own_folder_that_others_may_read_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(path)
    assert RunDir(path).create().make_secret() == RunDir(tmp_path / "link").create().read_secret()


@pytest.mark.parametrize("bits", [0o777, 0o2777, 0o722, 0o702])
def test_a_log_dir_that_all_users_may_write_to_is_refused_with_a_hint(tmp_path: Path, bits: int) -> None:
    tmp_path.chmod(bits)
    with pytest.raises(UsageError, match=rf"--log-dir .*mode {bits:04o}; .* --log-dir {tmp_path}/\w+$") as refused:
        make_log_dir(tmp_path)
    with pytest.raises(UsageError, match="--log-dir"):
        RunDir.new(tmp_path, "local")
    typed = str(refused.value).rpartition(" ")[2]
    make_log_dir(typed)
    assert RunDir.new(typed, "local").path.parent == Path(typed)


@pytest.mark.parametrize("bits", [0o755, 0o775, 0o2770, 0o1777, 0o3777])
def test_a_log_dir_of_the_user_or_of_a_group_or_with_the_sticky_bit_is_accepted(tmp_path: Path, bits: int) -> None:
    tmp_path.chmod(bits)
    assert mode(RunDir.new(tmp_path, "local").path) & 0o777 == 0o700


@pytest.mark.usefixtures("foreign")
def test_folders_of_another_user_are_refused_except_a_log_dir_that_a_group_shares(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    says = f"owner {OTHER}, mode 0755; expected owner {folders._name(os.geteuid())}"
    with pytest.raises(ElasticError, match=f"run directory .*{says}.*--log-dir DIR"):
        RunDir(tmp_path).create()
    with pytest.raises(UsageError, match=f"--log-dir .*{says}.*--log-dir {tmp_path}/"):
        make_log_dir(tmp_path)
    tmp_path.chmod(0o2775)
    make_log_dir(tmp_path)
    with pytest.raises(ElasticError, match=f"run directory .*owner {OTHER}, mode 2775"):
        RunDir(tmp_path).create()


@pytest.mark.usefixtures("foreign")
def test_a_file_server_that_shows_one_owner_for_all_users_is_no_reason_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstat

    def squashed(descriptor: int) -> os.stat_result:
        fields = list(real(descriptor))
        fields[stat.ST_UID] = OTHER
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", squashed)
    path = tmp_path / "logs"
    path.mkdir(mode=0o755)
    make_log_dir(path)
    rundir = RunDir(path / "7").create().create()
    assert rundir.make_secret() == rundir.read_secret()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_link_and_a_secret_that_another_user_has_put_there_are_refused(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "run").create()
    rundir.make_secret()
    link = tmp_path / "link"
    link.symlink_to(rundir.path)
    os.lchown(link, OTHER, OTHER)
    with pytest.raises(ElasticError, match=f"link: owner {OTHER}.*remove that link"):
        RunDir(link).create()
    os.chown(rundir.path / "secret", OTHER, OTHER)
    with pytest.raises(
        ElasticError, match=f"secret: owner {OTHER}, mode 0600, 64 bytes; expected a file of mode 0600 of"
    ):
        rundir.read_secret()


def test_a_claim_that_could_not_be_written_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rundir = RunDir(tmp_path / "run").create()
    real = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda _descriptor, _mode: real(os.open("/dev/full", os.O_WRONLY), "w"))
    with pytest.raises(ElasticError, match="No space left"):
        rundir.make_secret()
    monkeypatch.undo()
    assert len(rundir.make_secret()) == 64
    assert rundir.claim("first", "n1")
    assert not rundir.claim("first", "n2")


def test_a_job_that_has_not_started_has_no_files_yet_and_no_folder(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "elastic-logs" / "7")
    assert (rundir.read("spec.json"), rundir.verdict(0), rundir.events(), rundir.heartbeat()) == (None, None, [], 0)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "7").write_text("a file where the folder should be")
    with pytest.raises(ElasticError, match=r"spec\.json: .*Not a directory"):
        RunDir(tmp_path / "7").read("spec.json")
