"""Train a conv net on scikit-learn's handwritten digits. It can be killed at any moment, and continues at any size.

elastic-sbatch --nodes 2:4 examples/train_digits.py       elastic-srun --local 4 examples/train_digits.py
torchrun --nproc-per-node 2 examples/train_digits.py      python examples/train_digits.py
"""

import argparse
import gc
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from elastic_hpc.training import report_progress

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=50)
parser.add_argument("--batch-size", type=int, default=96, help="of all workers together, however many there are")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--checkpoint-every", type=int, default=20, metavar="STEPS")
default = Path(os.environ.get("ELASTIC_HPC_RUN_DIR", "digits"), "checkpoint.pt")
parser.add_argument("--checkpoint", type=Path, default=default, help="default: in the run directory, else in ./digits")
args = parser.parse_args()

# The launcher's variables differ from one round to the next. Without a launcher there is one process.
alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "ELASTIC_HPC_ROUND": 0, "TORCHELASTIC_RESTART_COUNT": 0}
rank, world_size, local_rank, round_, restart = (int(os.environ.get(name, alone[name])) for name in alone)
device = torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
if world_size > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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

# Steps done and samples consumed: with the model and the optimizer, a world of any size can continue from these.
step, consumed, end = 0, 0, args.epochs * len(train)
saved = [torch.load(args.checkpoint, map_location="cpu") if rank == 0 and args.checkpoint.exists() else None]
if world_size > 1:
    dist.broadcast_object_list(saved, device=device)  # only rank 0 reads, so that all ranks continue from the same step
if saved[0]:
    net.load_state_dict(saved[0]["net"])
    optimizer.load_state_dict(saved[0]["optimizer"])
    step, consumed = saved[0]["step"], saved[0]["consumed"]
model = DistributedDataParallel(net) if world_size > 1 else net
if rank == 0:
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    record = args.checkpoint.with_name("steps.jsonl").open("a", buffering=1)
    world = {"world_size": world_size, "round": round_, "restart": restart}
    print(f"{world_size} workers, continuing after step {step}", flush=True)

while consumed < end:
    epoch, position = divmod(consumed, len(train))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))  # the same in every world
    batch = train[order[position : position + args.batch_size]]
    mine = batch[rank::world_size]
    # DDP averages gradients over the ranks. With this factor the average is the gradient of the batch's mean loss.
    loss = cross_entropy(model(images[mine]), labels[mine], reduction="sum") * world_size / len(batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step, consumed, mean = step + 1, consumed + len(batch), loss.detach() / world_size
    if world_size > 1:
        dist.all_reduce(mean)
    report_progress(step, mean.item())
    if rank == 0:
        record.write(json.dumps({"step": step, "time": time.time(), "loss": mean.item(), **world}) + "\n")
        if step % 20 == 0:
            print(f"epoch {epoch + 1}, step {step}: loss {mean:.4f}, {world_size} workers", flush=True)
        if step % args.checkpoint_every == 0 or consumed == end:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "consumed": consumed}
            with (temporary := args.checkpoint.with_suffix(".tmp")).open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, args.checkpoint)  # a reader finds the old or the new checkpoint, never a part of one

if rank == 0:
    accuracy = (net(images[held_out]).argmax(1) == labels[held_out]).float().mean()
    print(f"step {step}: accuracy {accuracy:.4f} on {len(held_out)} digits that were held out", flush=True)
if world_size > 1:
    model = loss = None  # DDP keeps gloo's threads alive, which may abort while Python shuts down (pytorch 190489)
    gc.collect()
    dist.destroy_process_group()
