"""The training script of test_grow.py: it trains until the test requests its end, and loses no step if it can save
first.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from elastic_hpc.training import Checkpoints, drain_requested, report_progress

data, round_ = Path(__file__).parent, int(os.environ["ELASTIC_HPC_ROUND"])
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
checkpoints = Checkpoints(data / "checkpoints")
step = checkpoints.load(lambda path: int((path / "step").read_text())) or 0
record = (data / "steps.jsonl").open("a", buffering=1) if rank == 0 else None
finish = torch.zeros(1)
while not finish and not drain_requested():
    step += 1
    report_progress(step)
    if record:
        finish[0] = (data / "finish").exists()
        fields = {"step": step, "time": time.time(), "round": round_, "world_size": world_size}
        record.write(json.dumps(fields) + "\n")
    dist.broadcast(finish, 0)
    if step % 100 == 0:
        with checkpoints.save(step) as path:
            if rank == 0:
                (path / "step").write_text(str(step))
    time.sleep(0.02)
with checkpoints.save(step) as path:
    if rank == 0:
        (path / "step").write_text(str(step))
dist.destroy_process_group()
