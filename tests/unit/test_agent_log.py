"""The agent's own log on a shared file system that behaves like NFS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import wait_for
from sharedfs import Two

from elastic_hpc.record.folders import is_there

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root: sudo make test")

AGENT = """
import logging, sys
from elastic_hpc.agent.log import AgentLog
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv
log = AgentLog(RunDir(sys.argv[1]), AgentEnv("7", 0, "n1", 2, 0, 1, None, None, local=False))
for line in sys.stdin:
    logging.getLogger("elastic_hpc").info("%s", line.strip())
log.close()
"""


def test_an_agent_continues_when_its_output_file_is_on_a_full_disk() -> None:
    script = (
        "import runpy, sys\n"
        "from elastic_hpc.agent import main\n"
        "main.main = lambda: [print('some words', file=sys.stderr, flush=True), 7][1]\n"
        "runpy.run_module('elastic_hpc.agent', run_name='__main__')\n"
    )
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", script], stderr=full, check=False, timeout=60).returncode == 7


class Agent:
    """An agent that logs on ``a``; the test reads its log on ``b``."""

    def __init__(self, two: Two, stderr: Path) -> None:
        self._log, self.stderr = two.b / "logs" / "0.agent-n1.log", stderr
        with stderr.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", AGENT, str(two.a)], stdin=subprocess.PIPE, stderr=file, text=True
            )

    def log(self, text: str) -> None:
        """Log ``text``, and wait until it appears on stderr."""
        assert self.process.stdin
        print(text, file=self.process.stdin, flush=True)
        wait_for(lambda: text in self.stderr.read_text())

    def logged(self) -> list[str]:
        lines = self._log.read_text().splitlines() if is_there(self._log) else []
        return [line.rpartition(": ")[2] for line in lines]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    made = Two(tmp_path)
    made.server.behave(write_back_s=600)
    yield made
    made.server.close()


@pytest.fixture
def agent(two: Two, tmp_path: Path) -> Iterator[Agent]:
    made = Agent(two, tmp_path / "stderr")
    yield made
    made.process.kill()
    made.process.communicate()


def test_another_node_sees_immediately_what_an_agent_logs(agent: Agent) -> None:
    for count, text in enumerate(("one", "two"), 1):
        agent.log(text)
        wait_for(lambda count=count: agent.logged() == ["one", "two"][:count])


def test_no_line_is_lost_when_the_quota_is_temporarily_full(two: Two, agent: Agent) -> None:
    agent.log("one")
    wait_for(agent.logged)
    two.server.behave(over_quota=True)
    agent.log("two")
    wait_for(lambda: "Disk quota exceeded; workers continue" in agent.stderr.read_text())
    two.server.behave(over_quota=False)
    agent.log("three")
    wait_for(lambda: agent.logged() == ["one", "two", "three"])


def test_logging_continues_when_the_server_has_forgotten_the_open_files(two: Two, agent: Agent) -> None:
    agent.log("one")
    wait_for(agent.logged)
    two.server.behave(epoch=1)
    agent.log("two")
    wait_for(lambda: agent.logged() == ["one", "two"])


def test_stderr_continues_while_the_server_is_stopped_and_afterwards_the_file_has_all_lines(
    two: Two, agent: Agent
) -> None:
    agent.log("one")
    wait_for(agent.logged)
    two.server.behave(stopped=True)
    for text in ("two", "three", "four"):
        agent.log(text)
    two.server.behave(stopped=False)
    wait_for(lambda: agent.logged() == ["one", "two", "three", "four"])


def test_an_agent_that_leaves_has_written_its_log(two: Two, agent: Agent) -> None:
    agent.log("one")
    assert agent.process.stdin
    print("two", file=agent.process.stdin, flush=True)
    agent.process.stdin.close()
    assert agent.process.wait(20) == 0
    assert agent.logged() == ["one", "two"]
