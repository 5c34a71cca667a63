"""train_steps.py in place: the same short steps, with workers that keep their processes when the world changes."""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from elastic_hpc.training import live

STEP = 0.02  # seconds without load, like a worker that waits for its GPU

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--folder", type=Path, required=True)
parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
args = parser.parse_args()

net = nn.Linear(1, 1)
optimizer = torch.optim.SGD(net.parameters())
record = (args.folder / "steps.jsonl").open("a", buffering=1)
run = live(net, optimizer, folder=args.folder / "checkpoints", checkpoint_every=args.checkpoint_every)
world, began = None, 0.0
for attempt in run.steps(until=10**9):
    with attempt as step:
        if run.world != world:
            world, began = run.world, time.time()
        time.sleep(STEP)
        dist.all_reduce(torch.ones(1))
        optimizer.step()
        if run.world.rank == 0:
            fields = {"step": step + 1, "time": time.time(), "began": began, "pid": os.getpid()}
            record.write(json.dumps(fields | {"world_size": run.world.size, "round": run.world.round}) + "\n")
