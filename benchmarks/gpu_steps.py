"""The training script of gpu.py: workers of one device over gloo, as NCCL accepts no two ranks on one GPU."""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from elastic_hpc.training import live

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--folder", type=Path, required=True)
parser.add_argument("--device", required=True)
args = parser.parse_args()

net = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
optimizer = torch.optim.AdamW(net.parameters())
record = (args.folder / "steps.jsonl").open("a", buffering=1)
# live chooses the backend by the device of the net, so the net moves to the GPU only now
run = live(net, optimizer, checkpoint_every=20, wrap=lambda net: DistributedDataParallel(net.to(args.device)))
for attempt in run.steps(until=10**9):
    with attempt as step:
        loss = run.model(torch.ones(64, 1024, device=args.device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fields = {"step": step + 1, "time": time.time(), "pid": os.getpid(), "rank": run.world.rank}
        record.write(json.dumps(fields | {"round": run.world.round, "loss": loss.item()}) + "\n")
