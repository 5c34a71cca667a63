"""A command of the user on a node of the job, in the environment of the agent there: ``elastic-hpc shell``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from elastic_hpc.environment import OF_A_JOB, RUN_DIR, for_a_new_job
from elastic_hpc.workers import proc

_OF_THE_STEP = (
    "SLURM",
    "PMI",
    "SRUN_",
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "GPU_DEVICE",
)
"""Prefixes of variables that describe a job step: those of this step replace the agent's."""
_OF_THE_TERMINAL = ("TERM", "LINES", "COLUMNS", "LANG", "LC_")


def enter(run_dir: str, command: Sequence[str]) -> NoReturn:
    """Replace this process by ``command``; if empty, by the user's shell."""
    agent, workers = find(run_dir)
    environ = dict(os.environ)
    if agent is None:
        print("elastic-hpc: no agent of the job runs on this node: the environment is your own", file=sys.stderr)
    else:
        environ = environment(proc.environment(agent), os.environ)
        with contextlib.suppress(OSError):
            os.chdir(f"/proc/{agent}/cwd")
    environ[RUN_DIR] = run_dir
    if not command:
        shown = ", ".join(f"rank {rank}: pid {pid}" for rank, pid in sorted(workers.items())) or "none"
        print(f"workers on {os.uname().nodename}: {shown}", file=sys.stderr)
    words = list(command) or [os.environ.get("SHELL") or "/bin/sh"]
    try:
        os.execvpe(words[0], words, environ)  # noqa: S606 - the user's own command
    except OSError as error:
        print(f"elastic-hpc: {words[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


def find(run_dir: str) -> tuple[int | None, dict[int, int]]:
    """The agent of the job on this node, None if there is none, and its workers, by rank."""

    def is_the_jobs(path: str) -> bool:
        return "/" in path and os.path.realpath(path) == os.path.realpath(run_dir)

    agents, workers = set[int](), dict[int, int]()
    for pid in proc.all_pids():
        words, environ = proc.command_line(pid), proc.environment(pid)
        if "elastic_hpc.agent" in words and os.path.basename(words[0]) != "srun" and any(map(is_the_jobs, words)):
            agents.add(pid)
        elif environ.get("RANK", "").isdecimal() and is_the_jobs(environ.get(RUN_DIR, "")):
            workers[int(environ["RANK"])] = min(pid, workers.get(int(environ["RANK"]), pid))  # not its children
    # the process that starts the agent in a container has the words too, but the environment outside the container
    return next((pid for pid in sorted(agents) if proc.parent(pid) not in agents), None), workers


def environment(agents: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """``agents``, the environment of the agent, for a command in this job step, whose environment is ``own``."""
    kept = {name: value for name, value in for_a_new_job(agents).items() if not name.startswith(_OF_THE_STEP)}
    here = {name: value for name, value in own.items() if name.startswith((*_OF_THE_STEP, *_OF_THE_TERMINAL))}
    return {name: value for name, value in {**kept, **here}.items() if name not in OF_A_JOB}
