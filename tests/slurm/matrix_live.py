"""matrix.py in place: it reports the moment that it has reached, and waits there while a test holds that moment. The
net's weight counts the steps, every rank records its own steps, and a file ``read.PID`` shows that PID has read a
checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elastic_hpc.training import live

MOMENTS = {15: "training", 59: "end"}
data = Path(__file__).parent


def at(moment: str) -> None:
    round_, rank = run.world.round, run.world.rank
    (data / f"at.{moment}.{round_}.{rank}").touch()
    while True:
        held = (data / f"hold.{moment}.{round_}").exists()
        if (data / f"raise.{round_}.{rank}").exists():
            raise RuntimeError("injected")
        if (data / f"eat.{round_}.{rank}").exists():
            eaten = []
            while True:
                eaten.append(b"x" * (32 << 20))
        if not held:
            return
        time.sleep(0.02)


class Saved:
    """A state that ``live`` requests while it writes a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        if run and run.step == 30:
            at("checkpoint")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def note_read(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and "/step-" in str(arguments[0]):
        (data / f"read.{os.getpid()}").touch()


sys.addaudithook(note_read)
net = nn.Linear(1, 1, bias=False)
nn.init.zeros_(net.weight)
optimizer = torch.optim.SGD(net.parameters(), lr=1)
run = None  # live() requests the states of the first world
run = live(net, optimizer, folder=data / "checkpoints", checkpoint_every=10, saved=Saved())
record = (data / "steps.jsonl").open("a", buffering=1)
for attempt in run.steps(until=60):
    with attempt as step:
        (data / f"at.start.{run.world.round}.{run.world.rank}").touch()
        if step in MOMENTS:
            at(MOMENTS[step])
        loss = -run.model(torch.ones(1, 1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fields = {"step": step + 1, "time": time.time(), "round": run.world.round, "world_size": run.world.size}
        record.write(json.dumps(fields | {"node": os.uname().nodename, "pid": os.getpid()}) + "\n")
        time.sleep(0.02)
(data / f"counted.{run.world.rank}").write_text(f"{net.weight.item():g}")
