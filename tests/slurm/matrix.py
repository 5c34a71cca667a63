"""The training script of test_faults.py: it reports the moment that it has reached, and waits there while a test holds
that moment.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from elastic_hpc.training import Checkpoints, report_progress

data, round_ = Path(__file__).parent, int(os.environ["ELASTIC_HPC_ROUND"])
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def at(moment: str) -> None:
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


at("start")
dist.init_process_group("gloo")
checkpoints = Checkpoints(data / "checkpoints")
step = checkpoints.load(lambda path: int((path / "step").read_text())) or 0
record = (data / "steps.jsonl").open("a", buffering=1) if rank == 0 else None
while step < 60:
    dist.all_reduce(torch.ones(1))
    step += 1
    report_progress(step)
    if record:
        fields = {"step": step, "time": time.time(), "round": round_, "world_size": world_size}
        record.write(json.dumps(fields) + "\n")
    if step % 10 == 0:
        with checkpoints.save(step) as path:
            if rank == 0:
                (path / "step").write_text(str(step))
            if step == 30:
                at("checkpoint")
    if step == 15:
        at("training")
    time.sleep(0.02)
at("end")
dist.destroy_process_group()
