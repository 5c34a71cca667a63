"""The end of a worker wakes its agent once, whenever the worker ends."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_hpc.workers.elastic_agent import ElasticAgent
from elastic_hpc.workers.lives import Lives


@pytest.fixture
def agent() -> Iterator[Any]:
    """The waiting part of an ``ElasticAgent``, with one worker that ends on request."""
    waits: Any = ElasticAgent.__new__(ElasticAgent)
    waits.worker = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    waits._pidfds, waits._ended = {waits.worker.pid: os.pidfd_open(waits.worker.pid)}, set()
    waits._control, waits._lives = SimpleNamespace(wake_fd=os.eventfd(0)), Lives("")
    yield waits
    waits.worker.communicate()
    for descriptor in (*waits._pidfds.values(), waits._control.wake_fd):
        os.close(descriptor)


def end(agent: Any) -> None:
    agent.worker.kill()
    os.waitid(os.P_PID, agent.worker.pid, os.WEXITED | os.WNOWAIT)


def waited(agent: Any) -> float:
    began = time.monotonic()
    agent._wait_for_news()
    return time.monotonic() - began


def test_a_worker_that_ends_after_its_agent_has_looked_and_before_it_waits_wakes_the_agent(agent: Any) -> None:
    end(agent)  # the connection of a live worker ends before its process, so the agent looks too early
    assert waited(agent) < 0.5


def test_an_agent_whose_worker_has_ended_waits_for_the_others(agent: Any) -> None:
    end(agent)
    agent._wait_for_news()
    assert waited(agent) > 0.5, "it does not spin"
