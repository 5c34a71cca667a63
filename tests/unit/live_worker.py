"""A worker that talks to its agent as ``training.live`` does, but without torch: it counts steps on its own.

Run it as a script. At each step it writes ``stepped.ROUND.RANK`` into the run directory (pid, world size, restarts,
step), when it has paused ``paused.ROUND.PID``, and it ends when the run directory has a file ``enough``. A file
``WHAT.PID`` there triggers an action of the worker: ``breaks`` and ``cannot``, send that message; ``leaves``, close the
connection and continue, as between two loops; ``returns``, connect again; ``shards``, close it permanently; ``deaf``,
answer no pause. A worker without a connection writes ``drained.PID`` at a drain request.
"""

from __future__ import annotations

import json
import marshal
import os
import socket
import time
from pathlib import Path
from typing import Any

from elastic_hpc.training.drain import enter_round, is_told_to_drain
from elastic_hpc.training.progress import note_in_place, report_progress


class Agent:
    """The connection with the agent."""

    def __init__(self) -> None:
        self.connect()
        if "RANK" not in os.environ:
            print("ready", flush=True)
            self.send({"is": "ready"})
            self.receive(None)

    def connect(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(os.environ["ELASTIC_HPC_LIVE"])
        self.send({"is": "live"})

    def send(self, message: dict[str, Any]) -> None:
        self.socket.send(json.dumps(message).encode())

    def receive(self, timeout: float | None) -> dict[str, Any]:
        """The agent's message within ``timeout`` seconds; empty if there is none. Ends this process if the agent has
        ended.
        """
        self.socket.settimeout(timeout)
        try:
            data, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 3)
        except (TimeoutError, BlockingIOError):
            return {}
        if not data:
            os._exit(0)
        message: dict[str, Any] = json.loads(data)
        if descriptors:
            out, err, memory = descriptors
            os.environ.update(marshal.loads(os.pread(memory, os.fstat(memory).st_size, 0)))
            os.dup2(out, 1)
            os.dup2(err, 2)
            for descriptor in descriptors:
                os.close(descriptor)
            enter_round()
        return message

    def pause(self, step: int, asked: dict[str, Any]) -> None:
        """Pause until the agent resumes this worker. ``asked``: the agent's request; empty if there was none."""
        if not asked:
            self.send({"is": "broken", "why": "RuntimeError: Connection closed by peer"})
        while (asked := asked or self.receive(None))["do"] == "pause":
            self.send({"is": "pausing", "seconds": 5})
            self.send({"is": "paused", "step": step})
            paused = f"paused.{os.environ['ELASTIC_HPC_ROUND']}.{os.getpid()}"
            Path(os.environ["ELASTIC_HPC_RUN_DIR"], paused).write_text("now" if asked["now"] else "at its step's end")
            asked = {}


def main() -> None:
    run, agent, step = Path(os.environ["ELASTIC_HPC_RUN_DIR"]), Agent(), 0
    here = True

    def told(what: str) -> bool:
        try:
            (run / f"{what}.{os.getpid()}").unlink()
        except FileNotFoundError:
            return False
        return True

    while not (run / "enough").exists():
        step += 1
        round, rank = os.environ["ELASTIC_HPC_ROUND"], os.environ["RANK"]
        what = f"{os.getpid()} {os.environ['WORLD_SIZE']} {os.environ['TORCHELASTIC_RESTART_COUNT']} {step}"
        (run / f"new.{os.getpid()}").write_text(what)
        (run / f"new.{os.getpid()}").rename(run / f"stepped.{round}.{rank}")
        report_progress(step)
        print(f"round {round} rank {rank} step {step}", flush=True)
        if told("breaks"):
            agent.pause(step, {})
        elif told("cannot"):
            agent.send({"is": "cannot", "why": "its state is torn"})
            time.sleep(60)
        elif told("leaves"):
            agent.socket.close()
            here = False
        elif told("shards"):
            note_in_place("the model is sharded")
            agent.socket.close()
            here = False
        elif told("returns"):
            agent.connect()
            here = True
        elif told("deaf"):
            time.sleep(600)
        elif not here:
            if is_told_to_drain():
                (run / f"drained.{os.getpid()}").touch()
            time.sleep(0.02)
        elif message := agent.receive(0.02):
            agent.pause(step, message)


if __name__ == "__main__":
    main()
