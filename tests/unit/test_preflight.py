"""Checks of a node, on real file systems, ports and name servers; only nvidia-smi is a script."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_hpc.agent import preflight
from elastic_hpc.agent.preflight import Problem, check


@pytest.fixture
def only(tmp_path: Path) -> Callable[..., list[Problem]]:
    """Problems that this machine does not have anyway."""
    usual = check(tmp_path)

    def found(**asked: Any) -> list[Problem]:
        return [problem for problem in check(tmp_path, **asked) if problem not in usual]

    return found


def isolated(setup: str, code: str, *, net: bool = False) -> Any:
    """Run ``code`` as root in its own mount namespace, after the shell code
    ``setup``. Returns the value of ``answer``.
    """
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root and unshare")
    code = f"import json\nfrom pathlib import Path\nfrom elastic_hpc.agent import preflight\n{code}\n"
    ends = "import os, sys\nprint(json.dumps(answer), flush=True)\nos._exit(0)"
    script = f'set -e\n{setup}\nexec "$0" -c "$1"'
    argv = ["unshare", "-mn" if net else "-m", "sh", "-c", script, sys.executable, code + ends]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    if not done.stdout:
        pytest.skip(f"cannot be set up here: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


PROBLEMS = "answer = [[p.what, p.fatal] for p in preflight.check(Path({!r}))]"


def test_a_healthy_node_has_no_problem(tmp_path: Path) -> None:
    assert not [problem for problem in check(tmp_path, command="test -d /") if problem.fatal]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_unwritable_run_directory_is_fatal(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "none", "No such file"), (tmp_path / "file", "Not a directory")):
        (problem,) = [problem for problem in check(path) if problem.fatal]
        assert problem.what.startswith(f"run directory {path}: {why}")
        assert "--log-dir DIR" in problem.what


def test_a_file_system_mounted_read_only_is_fatal(tmp_path: Path) -> None:
    answer = isolated(f"mount -t tmpfs -o ro x {tmp_path}", PROBLEMS.format(str(tmp_path)))
    assert [what for what, fatal in answer if fatal] == [
        f"run directory {tmp_path}: Read-only file system; choose a folder that all nodes share: --log-dir DIR"
    ]


@pytest.mark.parametrize(
    ("options", "expected", "fatal"),
    [
        ("size=8m", "8 MiB are free, expected 1024", True),
        ("size=100m", "100 MiB are free, expected 1024", False),
        ("size=2g,nr_inodes=2", "no inode is free", True),
    ],
)
def test_a_full_disk_is_reported_before_it_ends_the_job(
    tmp_path: Path, options: str, expected: str, *, fatal: bool
) -> None:
    fill = f"touch {tmp_path}/a; " if "nr_inodes" in options else ""
    code = f"""
import tempfile
tempfile.tempdir = {str(tmp_path)!r}
found = [*preflight._temp_dir(), *preflight._space("run directory", Path({str(tmp_path)!r}), "")]
answer = [[p.what, p.fatal] for p in found]
"""
    answer = isolated(f"mount -t tmpfs -o {options} x {tmp_path}; {fill}", code)
    assert [is_fatal for _, is_fatal in answer] == [fatal, fatal]
    for (what, _), name in zip(answer, ("temporary directory", "run directory"), strict=True):
        assert what.startswith(f"{name} {tmp_path}: {expected}")
    assert "set TMPDIR" in answer[0][0]


def test_a_hanging_file_server_is_a_problem_but_the_check_does_not_hang(tmp_path: Path) -> None:
    """A frozen file system: a writing process waits and cannot be killed, as with a dead NFS server."""
    disk = tmp_path / "disk"
    mount = f"truncate -s 32M {disk}.img; mkfs.ext4 -q {disk}.img; mkdir {disk}; mount -o loop {disk}.img {disk}"
    code = f"""
import subprocess, time
preflight.LIMIT = 1.0
subprocess.run(["fsfreeze", "-f", {str(disk)!r}], check=True)
try:
    started = time.monotonic()
    answer = [time.monotonic() - started < 0, [[p.what, p.fatal] for p in preflight.check(Path({str(disk)!r}))]]
    answer[0] = time.monotonic() - started
finally:
    subprocess.run(["fsfreeze", "-u", {str(disk)!r}], check=True)
"""
    took, problems = isolated(mount, code)
    assert [f"run directory {disk}: no answer within 1 s; {preflight._SHARED}", True] in problems
    assert took < 5


def test_an_unusable_temporary_directory_is_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    (problem,) = preflight._temp_dir()
    assert problem.fatal
    assert "No usable temporary directory" in problem.what
    assert "TMPDIR" in problem.what


@pytest.mark.parametrize(("off", "said"), [(-60, "60 s behind the"), (90, "90 s ahead of the"), (3, None)])
def test_a_wrong_clock_is_a_warning(
    only: Callable[..., list[Problem]], monkeypatch: pytest.MonkeyPatch, off: float, said: str | None
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + off)
    found = only()
    assert [problem.fatal for problem in found] == ([False] if said else [])
    if said:
        assert said in found[0].what


def test_a_name_server_that_does_not_answer_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "resolv").write_text("nameserver 127.0.0.1\n")
    (tmp_path / "hosts").write_text("")
    setup = f"mount --bind {tmp_path}/resolv /etc/resolv.conf; mount --bind {tmp_path}/hosts /etc/hosts"
    code = f"""
import fcntl, os, socket, struct, time
with socket.socket() as up:
    fcntl.ioctl(up, 0x8914, struct.pack("16sh22x", b"lo", 0x41))
deaf = socket.socket(type=socket.SOCK_DGRAM)
deaf.bind(("127.0.0.1", 53))
os.environ.pop("RES_OPTIONS", None)
started = time.monotonic()
answer = [[p.what for p in preflight.check(Path({str(tmp_path)!r}))], time.monotonic() - started]
"""
    found, took = isolated(setup, code, net=True)
    (said,) = [what for what in found if "name server" in what]
    assert "RES_OPTIONS" in said
    assert "/etc/hosts" in said
    assert 2 <= took < 5


# the site's own check


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sh -c 'echo looking; echo GPU 3 is hot >&2; echo; exit 3'", "exit code 3, expected 0: GPU 3 is hot"),
        ("false", "exit code 1, expected 0: it wrote nothing"),
        ("no-such-check --all", "; expected a command that is on every node"),
        ("sh -c 'kill -9 $$'", "exit code -9"),
        ("sh 'unfinished", "No closing quotation"),
    ],
)
def test_a_failed_check_of_the_site_is_fatal(only: Callable[..., list[Problem]], command: str, said: str) -> None:
    (problem,) = only(command=command)
    assert problem.fatal
    assert problem.what.startswith("--preflight ")
    assert said in problem.what


def test_a_hanging_check_of_the_site_is_ended_with_all_its_processes(
    only: Callable[..., list[Problem]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(preflight, "COMMAND_LIMIT", 0.5)
    (problem,) = only(command=f"sh -c 'echo $$ > {tmp_path}/pid; sleep 600; true'")
    assert problem.fatal
    assert "not finished within" in problem.what
    deadline = time.monotonic() + 10
    while alive(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < deadline


def alive(group: int) -> list[str]:
    """Processes of a process group, except zombies."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.split()[0] == str(group) and line.split()[1][0] != "Z"]


def test_a_check_of_the_site_may_leave_processes_running(only: Callable[..., list[Problem]]) -> None:
    started = time.monotonic()
    assert only(command="sh -c 'sleep 5 & exit 0'") == []
    assert time.monotonic() - started < 4


# GPUs


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put an nvidia-smi on PATH with these answers about GPUs and the processes on them."""

    def install(gpus: str, apps: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncase $1 in\n--query-gpu=*)\n{gpus};;\n*)\n{apps};;\nesac\n")
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    monkeypatch.setattr(preflight, "_DYING", 0.5)
    return install


FOUR = "for i in 0 1 2 3; do echo $i, GPU-$i$i$i$i-abcd, Disabled; done"


@pytest.mark.parametrize(
    ("granted", "cuda_visible", "seen"),
    [
        (4, None, None),
        (4, "0,1,2,3", None),
        (2, "2,3", None),
        (2, "GPU-1111-abcd,GPU-2222", None),
        (2, None, None),  # the node's other GPUs are visible too
        (0, None, None),
        (8, None, "4 of the 8 granted GPUs can be seen (nvidia-smi lists 4, "),
        (4, "0,1,2", "3 of the 4 granted GPUs"),
        (2, "", "none of the 2 granted GPUs"),
        (1, "7", "none of the 1 granted GPUs"),
    ],
)
def test_all_granted_gpus_must_be_visible(
    only: Callable[..., list[Problem]],
    nvidia_smi: Callable[[str, str], None],
    granted: int,
    cuda_visible: str | None,
    seen: str | None,
) -> None:
    nvidia_smi(FOUR, "true")
    found = only(gpus=granted, cuda_visible=cuda_visible)
    assert [problem.fatal for problem in found] == ([True] if seen else [])
    if seen:
        assert found[0].what.startswith(seen)


@pytest.mark.parametrize(
    ("granted", "cuda_visible", "apps", "busy"),
    [
        (
            4,
            None,
            "echo GPU-2222-abcd, 4711, python train.py, old",
            "GPU 2 is used by process 4711 (python train.py, old)",
        ),
        (2, "0,1", "echo GPU-2222-abcd, 4711, python", None),  # of another job
        (2, None, "echo GPU-2222-abcd, 4711, python", None),  # the owner is not known
        (4, None, "echo GPU-2222-abcd, 4711, nvidia-cuda-mps-server", None),
        (
            4,
            None,
            "[ -e gone ] || { touch gone; echo GPU-0000-abcd, 9, python; }",
            None,
        ),  # the process was about to end
    ],
)
def test_processes_that_were_left_on_the_granted_gpus_are_fatal(
    only: Callable[..., list[Problem]],
    nvidia_smi: Callable[[str, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    granted: int,
    cuda_visible: str | None,
    apps: str,
    busy: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    nvidia_smi(FOUR, apps)
    found = only(gpus=granted, cuda_visible=cuda_visible)
    assert [problem.fatal for problem in found] == ([True] if busy else [])
    if busy:
        assert found[0].what.startswith(busy)


def test_parts_of_gpus_are_not_counted(
    only: Callable[..., list[Problem]], nvidia_smi: Callable[[str, str], None]
) -> None:
    nvidia_smi("echo 0, GPU-0000-abcd, Enabled", "echo GPU-0000-abcd, 9, python")
    assert only(gpus=3, cuda_visible="MIG-1,MIG-2,MIG-3") == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("echo 'No devices were found'; exit 6", "nvidia-smi: No devices were found; expected 4 GPUs"),
        ("echo 'Unable to determine the device handle: GPU is lost.' >&2; exit 15", "GPU is lost."),
        ("exit 9", "non-zero exit status 9"),
        ("echo 'Unable to determine the device handle for GPU3'", "device handle for GPU3"),
    ],
)
def test_a_sick_driver_is_fatal(
    only: Callable[..., list[Problem]], nvidia_smi: Callable[[str, str], None], answer: str, said: str
) -> None:
    nvidia_smi(answer, "true")
    (problem,) = only(gpus=4)
    assert problem.fatal
    assert said in problem.what


def test_a_driver_that_hangs_is_fatal(
    only: Callable[..., list[Problem]], nvidia_smi: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "GPU_LIMIT", 0.5)
    nvidia_smi("exec sleep 3", "true")
    (problem,) = only(gpus=4)
    assert problem.fatal
    assert "hangs" in problem.what


def test_gpus_of_other_vendors_are_not_checked(
    only: Callable[..., list[Problem]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(gpus=4) == [
        Problem("4 GPUs were granted but no nvidia-smi can be run: they were not checked", fatal=False)
    ]
