"""Hugging Face Accelerate in place: it chooses the device, the precision and the backward pass, and ``live`` the rest.

elastic-sbatch --nodes 2:4 examples/live_accelerate.py       python examples/live_accelerate.py
"""

import argparse
import json
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn

from elastic_hpc.training import live

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300)
default = Path(os.environ.get("ELASTIC_HPC_RUN_DIR", "digits"))
parser.add_argument("--folder", type=Path, default=default, help="default: the run directory, else ./digits")
args = parser.parse_args()

device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32, device=device).flatten(1) / 16
labels = torch.tensor(digits.target, device=device)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
args.folder.mkdir(parents=True, exist_ok=True)
record = (args.folder / "steps.jsonl").open("a", buffering=1)  # rank 0 writes; another process may become rank 0

# live joins the world, and Accelerator finds it. Do not call prepare: Accelerator counts the ranks only once, but they
# change.
run = live(net, optimizer, folder=args.folder / "checkpoints", checkpoint_every=20)
accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
for attempt in run.steps(until=args.steps):
    with attempt as step:
        world = run.world
        batch = torch.randperm(len(labels), generator=torch.Generator().manual_seed(step))[:96]
        mine = batch[world.rank :: world.size]
        with accelerator.autocast():
            guesses = run.model(images[mine])
            loss = nn.functional.cross_entropy(guesses, labels[mine], reduction="sum") * world.size / len(batch)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if world.rank == 0:
            fields = {"step": step + 1, "loss": loss.item(), "pid": os.getpid(), "world_size": world.size}
            record.write(json.dumps({**fields, "round": world.round}) + "\n")
            if (step + 1) % 20 == 0:
                print(f"step {step + 1}: loss {loss:.4f}, {world.size} workers", flush=True)

if run.world.rank == 0 and not run.stopped:
    accuracy = (net(images).argmax(1) == labels).float().mean()
    print(f"step {run.step}: accuracy {accuracy:.4f}", flush=True)
