"""The shared file system of the tests behaves like NFS: two mounts of one server, and each fault."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sharedfs import Two

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: sudo make test")


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    made = Two(tmp_path)
    made.server.behave(attributes_s=600, names_s=600, write_back_s=600)  # stale data stays stale
    yield made
    made.server.close()


def run(code: str, path: Path) -> subprocess.Popen[str]:
    """Run in another process, because waiting for the server would block this one."""
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)


def until(look: Callable[[], object], deadline: float = 20.0) -> None:
    end = time.monotonic() + deadline
    while not look():
        assert time.monotonic() < end
        time.sleep(0.02)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def is_lost(path: Path) -> bool:
    try:
        path.read_bytes()
    except FileNotFoundError:
        return True
    return False


def test_a_new_file_of_another_node_is_not_visible_until_a_process_lists_the_folder_or_the_cache_expires(
    two: Two,
) -> None:
    assert is_lost(two.b / "new")
    (two.a / "new").write_text("text")
    assert is_lost(two.b / "new")
    assert not (two.b / "new").exists()
    assert os.listdir(two.b) == ["new"]
    assert (two.b / "new").read_text() == "text"
    assert is_lost(two.b / "second")
    (two.a / "second").write_text("text")
    assert is_lost(two.b / "second")
    two.server.behave(names_s=0.1)
    assert is_lost(two.b / "third")
    (two.a / "third").write_text("text")
    until((two.b / "third").exists)


def test_a_client_that_tries_to_create_an_existing_file_sees_it_from_then_on(two: Two) -> None:
    assert is_lost(two.b / "folder" / "file")
    (two.a / "folder").mkdir()
    assert not (two.b / "folder").exists()
    (two.b / "folder").mkdir(exist_ok=True)  # EEXIST makes the client forget the name
    assert (two.b / "folder").is_dir()


def test_the_size_is_stale_until_the_file_is_opened_or_the_cache_expires(two: Two) -> None:
    (two.a / "file").write_text("one")
    assert (two.b / "file").stat().st_size == 3
    (two.a / "file").write_text("one two")
    assert (two.b / "file").stat().st_size == 3
    with (two.b / "file").open() as file:
        assert file.read() == "one two"
        (two.a / "file").write_text("one two three")
        assert (file.read(), os.fstat(file.fileno()).st_size) == ("", 7)
        two.server.behave(attributes_s=0.1)
        until(lambda: file.read() == " three")


def test_written_data_is_visible_elsewhere_after_close_or_sync_or_the_write_back_time(two: Two) -> None:
    with (two.a / "file").open("wb", buffering=0) as file:
        file.write(b"one")
        assert (two.a / "file").read_bytes() == b"one"
        file.write(b"two")
        assert (two.there / "file").stat().st_size == 3
        assert (two.b / "file").read_bytes() == b"one"
        os.fsync(file.fileno())
        assert (two.b / "file").read_bytes() == b"onetwo"
        file.write(b"three")
        assert os.fstat(file.fileno()).st_size == 11
        assert (two.b / "file").read_bytes() == b"onetwo"
    assert (two.b / "file").read_bytes() == b"onetwothree"
    two.server.behave(write_back_s=0.1)
    with (two.a / "file").open("ab", buffering=0) as file:
        file.write(b"four")
        until(lambda: (two.b / "file").read_bytes() == b"onetwothreefour")


def test_a_file_that_another_node_removed_is_stale_and_a_replaced_file_is_found_by_its_name(two: Two) -> None:
    (two.a / "file").write_text("old")
    with (two.b / "file").open("rb", buffering=0) as theirs, (two.a / "file").open("rb", buffering=0) as ours:
        (two.a / "new").write_text("new")
        (two.a / "new").replace(two.a / "file")
        with pytest.raises(OSError, match="Stale") as stale:
            theirs.read()
        assert stale.value.errno == errno.ESTALE
        assert ours.read() == b"old", "the node that removes a file keeps the open ones"
    assert (two.b / "file").read_text() == "new"
    (two.a / "file").unlink()
    with pytest.raises(FileNotFoundError):
        (two.b / "file").read_text()


def test_a_server_that_forgets_all_files_makes_the_open_ones_stale(two: Two) -> None:
    (two.a / "folder").mkdir()
    (two.a / "folder" / "file").write_text("text")
    with (two.a / "folder" / "file").open("rb", buffering=0) as file:
        two.server.behave(epoch=1)
        assert (two.a / "folder" / "file").read_text() == "text"
        with pytest.raises(OSError, match="Stale"):
            file.read()


def test_processes_wait_in_state_d_for_a_stopped_server(two: Two) -> None:
    (two.a / "file").write_text("text")
    two.server.behave(stopped=True)
    codes = [
        "import os, sys; os.stat(sys.argv[1])",
        "import sys; print(open(sys.argv[1]).read())",
        "import sys; open(sys.argv[1] + '.new', 'w').write('new')",
    ]
    waiting = [run(code, two.a / "file") for code in codes]
    killed = run(codes[0], two.a / "file")
    for process in (*waiting, killed):
        until(lambda pid=process.pid: state(pid) == "D")
    waiting[0].send_signal(signal.SIGTERM)
    killed.kill()
    assert killed.wait(10) == -signal.SIGKILL, "as of NFS since Linux 2.6.25"
    assert [process.poll() for process in waiting[1:]] == [None, None]
    two.server.behave(stopped=False)
    answers = [process.communicate(timeout=10)[0] for process in (*waiting, killed)]
    assert answers == ["", "text\n", "", ""]
    assert [process.returncode for process in waiting] == [-signal.SIGTERM, 0, 0]
    assert (two.b / "file.new").read_text() == "new"


def test_cached_data_needs_no_server_and_a_killed_process_does_not_wait_to_close_its_files(two: Two) -> None:
    code = (
        "import sys, time; f = open(sys.argv[1], 'w'); f.write('text'); print('open', flush=True); sys.stdin.read(1); "
        "f.flush(); print('written', flush=True); time.sleep(600)"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(two.a / "file")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdin is not None
    with writer.stdin, writer.stdout:
        assert writer.stdout.readline() == "open\n"
        two.server.behave(stopped=True)
        writer.stdin.write(".")
        writer.stdin.flush()
        assert writer.stdout.readline() == "written\n"
        writer.kill()
        assert writer.wait(10) == -signal.SIGKILL
    two.server.behave(stopped=False, write_back_s=0.1)
    until(lambda: (two.there / "file").read_text() == "text")


def test_requests_about_names_and_attributes_can_be_slow(two: Two) -> None:
    (two.a / "file").write_text("text")
    two.server.behave(metadata_s=0.05)
    began = time.monotonic()
    (two.b / "file").read_text()
    asked = time.monotonic()
    (two.b / "file").stat()
    assert asked - began >= 0.15, "the folder, the name, the attributes at the time of the open"
    assert time.monotonic() - asked < 0.05, "what a client knows costs nothing"


def test_lines_that_two_nodes_append_overwrite_each_other(two: Two) -> None:
    with (two.a / "log").open("ab", buffering=0) as ours, (two.b / "log").open("ab", buffering=0) as theirs:
        ours.write(b"of a\n")
        theirs.write(b"of b\n")
    assert (two.there / "log").read_bytes() == b"of a\n"  # closed last
    for path in (two.a, two.b):  # one after another: each opens the file after the previous one has closed it
        with (path / "log").open("ab") as file:
            file.write(b"more\n")
    assert (two.there / "log").read_bytes() == b"of a\nmore\nmore\n"


def test_a_full_quota_is_reported_when_the_file_is_closed_or_synced(two: Two) -> None:
    two.server.behave(over_quota=False)
    file = os.open(two.a / "file", os.O_WRONLY | os.O_CREAT)
    second = os.open(two.a / "second", os.O_WRONLY | os.O_CREAT)
    two.server.behave(over_quota=True)
    assert (os.write(file, b"text"), os.write(second, b"text")) == (4, 4)
    with pytest.raises(OSError, match="quota") as full:
        os.fsync(file)
    assert full.value.errno == errno.EDQUOT
    os.close(file)
    with pytest.raises(OSError, match="quota"):
        os.close(second)
    for make in ((two.a / "folder").mkdir, (two.a / "third").touch):
        with pytest.raises(OSError, match="quota"):
            make()
    two.server.behave(over_quota=False)
    (two.a / "file").write_text("text")
    assert (two.b / "file").read_text() == "text"


def test_data_that_a_node_has_not_sent_is_lost_with_the_node(two: Two) -> None:
    file = os.open(two.a / "file", os.O_WRONLY | os.O_CREAT)
    os.write(file, b"safe")
    os.fsync(file)
    os.write(file, b"lost")
    two.clients[two.a].kill()
    two.clients[two.a].wait()
    with pytest.raises(OSError, match="not connected"):
        os.close(file)
    assert (two.b / "file").read_bytes() == b"safe"


def test_a_program_works_on_one_mount_as_on_a_local_folder(two: Two) -> None:
    script = (
        'set -e; cd "$0"; mkdir d; cp -r "$1" d/copy; diff -r "$1" d/copy;'
        " ln -s x y; echo text > x; ln x z; mv z w; "
        "test $(cat y) = text; cat w >> w2; rm y; chmod 640 x; chown 1:2 x; touch -d @7 x; stat -c '%a %u %g %Y' x; "
        "truncate -s 2 w; cat x; rm -r d x w; ls"
    )
    tests = Path(__file__).parent / "sites"
    done = subprocess.run(["sh", "-c", script, two.a, tests], capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout) == ("", "640 1 2 7\ntew2\n")
