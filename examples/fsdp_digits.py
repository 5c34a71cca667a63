"""FSDP: a small net on handwritten digits, sharded over the ranks, which continues at any size: each checkpoint is
sharded too, and is redistributed when it is loaded.

elastic-sbatch --nodes 2:4 examples/fsdp_digits.py       torchrun --nproc-per-node 2 examples/fsdp_digits.py
"""

import argparse
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from elastic_hpc.training import Checkpoints, accumulation, drain_requested, report_progress

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300)
args = parser.parse_args()

device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32, device=device).flatten(1) / 16
labels = torch.tensor(digits.target, device=device)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 120), nn.ReLU(), nn.Linear(120, 10)).to(device)
mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
for layer in (net[0], net[2], net):
    fully_shard(layer, mesh=mesh)
optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
checkpoints = Checkpoints()  # in the run directory; loads only complete ones, and an earlier round cannot save


def load(path: Path) -> int:
    weights, moments = get_state_dict(net, optimizer)
    state = {"net": weights, "optimizer": moments, "step": torch.zeros(())}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(net, optimizer, model_state_dict=state["net"], optim_state_dict=state["optimizer"])
    return int(state["step"])


step = checkpoints.load(load) or 0
if dist.get_rank() == 0:
    print(f"{dist.get_world_size()} workers, continuing after step {step}", flush=True)
stop = False
while step < args.steps and not stop:
    batch = torch.randperm(len(labels), generator=torch.Generator().manual_seed(step))[:96]  # the same in every world
    share = accumulation(len(batch), len(batch))
    mine = batch[share.slices[0]]
    loss = nn.functional.cross_entropy(net(images[mine]), labels[mine], reduction="sum") * share.scale
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    report_progress(step, loss.item())
    stop = drain_requested() or step == args.steps
    if step % 20 == 0 and dist.get_rank() == 0:
        print(f"step {step}", flush=True)
    if step % 20 == 0 or stop:
        weights, moments = get_state_dict(net, optimizer)
        with checkpoints.save(step) as path:
            dcp.save({"net": weights, "optimizer": moments, "step": torch.tensor(float(step))}, checkpoint_id=path)

with torch.no_grad():
    accuracy = (net(images).argmax(1) == labels).float().mean()
if dist.get_rank() == 0 and step == args.steps:
    print(f"step {step}: accuracy {accuracy:.4f}", flush=True)
net = optimizer = loss = None  # threads of the process groups may abort while Python shuts down (pytorch 190489)
gc.collect()
dist.destroy_process_group()
