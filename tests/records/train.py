"""Imitates a training: steps with a loss, checkpoints, a drain. Fails when a test requests it."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from elastic_hpc.training import Checkpoints, drain_requested, report_progress

STEPS, EVERY = int(sys.argv[1]), 20
rank = int(os.environ["RANK"])
orders = Path(__file__).parent


def load_batch(step: int) -> None:
    if rank == 2 and (order := orders / "fail").exists():
        order.unlink()
        raise ValueError(f"sample {step * 7} of shard-0002 is damaged")


dist.init_process_group("gloo")
checkpoints = Checkpoints()
step = checkpoints.load(lambda path: int((path / "step").read_text())) or 0
print(f"{dist.get_world_size()} workers, going on after step {step}", flush=True)
while step < STEPS and not (drained := drain_requested()):
    load_batch(step)
    dist.all_reduce(torch.ones(1))
    time.sleep(0.05)
    step += 1
    report_progress(step, 0.1 + 2.2 * math.exp(-step / 200))
    if step % 10 == 0:
        print(f"step {step}", flush=True)
    if step % EVERY == 0:
        with checkpoints.save(step) as path:
            if rank == 0:
                (path / "step").write_text(str(step))
if step < STEPS:
    with checkpoints.save(step) as path:
        if rank == 0:
            (path / "step").write_text(str(step))
    print(f"saved at step {step}", file=sys.stderr, flush=True)
dist.destroy_process_group()
