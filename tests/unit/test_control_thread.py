"""The control thread accesses no file, so that a stalled file system delays neither heartbeats nor a takeover."""

from __future__ import annotations

import asyncio
import json
import linecache
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import wait_for
from test_joiners import no_dial
from test_local import LISTEN, Local

from elastic_hpc import slurm
from elastic_hpc.agent.joiners import SlurmSource
from elastic_hpc.agent.log import _ToListener
from elastic_hpc.agent.threads import ThreadedReader, on_thread
from elastic_hpc.errors import ElasticError
from elastic_hpc.membership.roster import Host
from elastic_hpc.network.client import ask_leader
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv

AUDITED = Path(__file__).with_name("audited")


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The audit records of the agents that are started from now on."""
    monkeypatch.setenv("PYTHONPATH", str(AUDITED))
    monkeypatch.setenv("AUDIT_LOG", str(tmp_path / "audit"))
    return tmp_path / "audit"


def test_the_audit_records_accesses_to_files(audit: Path) -> None:
    touches = [
        "open('/dev/null')",
        "os.stat('/')",
        "os.pwrite(file, b'.', 0)",
        "os.listdir('/')",
        "import colorsys",
        "time.localtime()",
        "print('.')",
        "socket.getaddrinfo('localhost', 1)",
        "subprocess.run('true')",
        "bridge.held()",
    ]
    script = f"""
import os, socket, subprocess, sys, threading, time
file = os.open({str(audit.with_name("written"))!r}, os.O_RDWR | os.O_CREAT)
class bridge:
    _changed = threading.Condition()
    def held(self):
        with self._changed:
            os.stat("/")
bridge = bridge()
for line in {touches!r}:
    thread = threading.Thread(target=exec, args=(line, globals()), name="control" * ("held" not in line))
    thread.start()
    thread.join()
"""
    subprocess.run([sys.executable, "-c", script, "elastic_hpc.agent"], check=True, timeout=60)
    noted = [line.split(" in ")[0] for line in audit.read_text().splitlines()]
    for name in ("open", "os.stat", "os.pwrite", "os.listdir", "import", "time.localtime", "write"):
        assert any(line.startswith(f"the control thread: {name} ") for line in noted), (name, noted)
    assert any("socket.getaddrinfo" in line for line in noted)
    assert any("subprocess.Popen" in line for line in noted)
    assert any(line.startswith("with the lock: os.stat") for line in noted)


def test_no_agent_accesses_a_file_on_its_control_thread(tmp_path: Path, audit: Path) -> None:
    """Start, rounds, a failure, a loss, growth, strangers, a take-over, a request, the verdict and the end."""
    job = Local(tmp_path, "--local=3", "--nodes=1:3", "--heartbeat-timeout=2", "--max-restarts=9", script=LISTEN)
    try:
        os.kill(job.stepped(1, 2)[0], signal.SIGKILL)
        job.stepped(2, 2)
        agent = job.agent(2)
        words = Path(f"/proc/{agent}/cmdline").read_bytes().split(b"\0")[:-1]
        environ = dict(e.split(b"=", 1) for e in Path(f"/proc/{agent}/environ").read_bytes().split(b"\0") if b"=" in e)
        os.kill(agent, signal.SIGKILL)
        job.wait_for(lambda: job.events("lost") and len(job.events("round")) == 3)
        with (tmp_path / "again").open("w") as output:
            again = subprocess.Popen(words, env=environ, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        job.wait_for(lambda: len(job.events("round")[-1]["nodes"]) == 3)
        led = json.loads((job.run_dir / "endpoint.json").read_text())
        with socket.create_connection(("127.0.0.1", led["port"])) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n")
            stranger.recv(10000)
        job.wait_for(lambda: job.events("stranger"))
        os.kill(job.agent(0), signal.SIGKILL)
        job.wait_for(lambda: job.events("take_over") and len(job.events("round")[-1]["nodes"]) == 2)
        job.stepped(job.events("round")[-1]["round"], 1)
        job.wait_for(lambda: json.loads((job.run_dir / "endpoint.json").read_text())["node"] != 0)
        ask_leader(RunDir(job.run_dir), "save-and-stop")
        job.process.wait(timeout=60)
        again.wait(timeout=60)
        assert job.verdict()["reason"] == "stopped by the user; the workers saved and stopped"
    finally:
        job.process.terminate()
        job.process.terminate()
        job.process.wait(timeout=60)
    assert "this node leads now" in (job.run_dir / "logs" / "0.agent-local1.log").read_text()
    noted = audit.read_text().splitlines()
    assert noted.count("an event loop began") == 4
    assert set(noted) == {"an event loop began"}


def test_no_source_file_is_read_for_a_traceback_where_it_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = _ToListener(records)
    log = logging.getLogger("test_control_thread")
    log.propagate = False
    log.addHandler(handler)
    with monkeypatch.context() as patch:
        patch.setattr(linecache, "updatecache", pytest.fail)
        linecache.clearcache()
        try:
            int("many")
        except ValueError:
            log.exception("%s failed", "a task")
    log.removeHandler(handler)
    text = logging.Formatter().format(records.get_nowait())
    assert text.startswith("a task failed\nTraceback")
    assert 'int("many")' in text


HOST = Host(3, "n3", ("127.0.0.1",), 1)


def test_commands_that_do_not_return_do_not_block_other_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run directory, for the output of a new agent, stalls; the agent still reads Slurm's queue and the secret."""
    stalled, waiting = threading.Event(), threading.Semaphore(0)

    def restart(_source: SlurmSource, _host: Host) -> bool:
        waiting.release()
        return stalled.wait(60)

    monkeypatch.setattr(SlurmSource, "_restart", restart)
    monkeypatch.setattr(slurm, "joiners", lambda job: [job])
    source = SlurmSource(AgentEnv("7", 0, "n0", 99, 0, 1, None, None, local=False), RunDir(tmp_path), {}, no_dial)

    async def run() -> Any:
        restarts = [asyncio.ensure_future(source.restart(HOST)) for _ in range(100)]
        await asyncio.to_thread(lambda: waiting.acquire(timeout=10))
        try:
            return await asyncio.wait_for(source.joiners(), 10)
        finally:
            stalled.set()
            await asyncio.gather(*restarts)

    before = threading.active_count()
    assert asyncio.run(run()) == ["7"]
    assert threading.active_count() < before + 50, "nor do they become as many threads as there are nodes"


def test_a_file_is_read_once_at_a_time_however_many_readers_wait() -> None:
    calls: list[int] = []
    stalled = threading.Event()

    def read() -> int:
        calls.append(1)
        stalled.wait(60)
        return len(calls)

    async def run() -> None:
        reader = ThreadedReader(read, 0.05)
        late = await asyncio.gather(*(reader.read() for _ in range(100)), return_exceptions=True)
        assert {str(error) for error in late} == {"the file system has not answered for 0.05 s"}
        with pytest.raises(ElasticError):
            await reader.read()
        stalled.set()
        wait_for(lambda: threading.active_count() == before)
        assert await asyncio.gather(*(reader.read() for _ in range(100))) == [1] * 100
        assert await reader.read() == 2

    before = threading.active_count()
    asyncio.run(run())


def test_a_call_that_never_returns_does_not_keep_the_process_from_ending() -> None:
    script = "import asyncio, time\nfrom elastic_hpc.agent.threads import on_thread\n"
    script += "async def main():\n    asyncio.ensure_future(on_thread(time.sleep, 600))\n    await asyncio.sleep(0.1)\n"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", script + "asyncio.run(main())"], check=True, timeout=60)
    assert time.monotonic() - began < 60


def test_an_exception_of_a_call_is_raised_where_the_call_is_awaited() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(on_thread(lambda: 1 // 0))
