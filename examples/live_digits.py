"""Train the conv net of train_digits.py in place: when nodes are lost or added, the workers of the others keep their
processes, and no step is lost.

elastic-sbatch --nodes 2:4 examples/live_digits.py       elastic-srun --local 4 examples/live_digits.py
torchrun --nproc-per-node 2 examples/live_digits.py      python examples/live_digits.py

That requires torch 2.14 and an agent of elastic_hpc. Otherwise the script restarts from a checkpoint, like
train_digits.py.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from elastic_hpc.training import live, report_progress

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=50)
parser.add_argument("--batch-size", type=int, default=96, help="of all workers together, however many there are")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--checkpoint-every", type=int, default=20, metavar="STEPS")
default = Path(os.environ.get("ELASTIC_HPC_RUN_DIR", "digits"))
parser.add_argument("--folder", type=Path, default=default, help="default: the run directory, else ./digits")
args = parser.parse_args()

device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1) / 16
labels = torch.tensor(digits.target, device=device)
shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
held_out, train = shuffled[:360], shuffled[360:]
torch.manual_seed(0)
layers = [nn.Conv2d(1, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
layers += [nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 10)]
net = nn.Sequential(*layers).to(device)
optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr)
args.folder.mkdir(parents=True, exist_ok=True)
record = (args.folder / "steps.jsonl").open("a", buffering=1)  # rank 0 writes; another process may become rank 0

run = live(net, optimizer, folder=args.folder / "checkpoints", checkpoint_every=args.checkpoint_every)
steps_per_epoch = math.ceil(len(train) / args.batch_size)
for attempt in run.steps(until=args.epochs * steps_per_epoch):
    with attempt as step:  # repeated, in a world of another size, if it was interrupted before the optimizer's step
        world = run.world
        epoch, number = divmod(step, steps_per_epoch)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))  # the same in every world
        batch = train[order[number * args.batch_size :][: args.batch_size]]
        mine = batch[world.rank :: world.size]
        # DDP averages gradients over the ranks. With this factor the average is the gradient of the batch's mean loss.
        loss = cross_entropy(run.model(images[mine]), labels[mine], reduction="sum") * world.size / len(batch)
        optimizer.zero_grad()
        loss.backward()
        mean = loss.detach() / world.size
        if world.size > 1:
            dist.all_reduce(mean)
        optimizer.step()  # after all collectives: this completes the step
        report_progress(step + 1, mean.item())
        if world.rank == 0:
            fields = {"step": step + 1, "time": time.time(), "loss": mean.item(), "pid": os.getpid()}
            fields |= {"world_size": world.size, "round": world.round, "restart": world.restarts}
            record.write(json.dumps(fields) + "\n")
            if (step + 1) % 20 == 0:
                print(f"epoch {epoch + 1}, step {step + 1}: loss {mean:.4f}, {world.size} workers", flush=True)

if run.world.rank == 0 and not run.stopped:
    accuracy = (net(images[held_out]).argmax(1) == labels[held_out]).float().mean()
    print(f"step {run.step}: accuracy {accuracy:.4f} on {len(held_out)} digits that were held out", flush=True)
