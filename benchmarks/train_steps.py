"""The training script of grow.py, for any launcher: in short steps, so that a standstill and a repeated step show."""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from elastic_hpc.training import Checkpoints, drain_requested, report_progress

STEP = 0.02  # seconds without load, like a worker that waits for its GPU

began = time.time()
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--folder", type=Path, required=True)
parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
parser.add_argument("--listen", action="store_true", help="save and end when that is asked for")
args = parser.parse_args()

dist.init_process_group("gloo")
checkpoints = Checkpoints(args.folder / "checkpoints")
step = checkpoints.load(lambda path: int((path / "step").read_text())) or 0
record = None
if dist.get_rank() == 0:
    record = (args.folder / "steps.jsonl").open("a", buffering=1)
world = {"world_size": dist.get_world_size(), "round": int(os.environ.get("ELASTIC_HPC_ROUND", "0")), "began": began}


def save() -> None:
    with checkpoints.save(step) as path:
        if record:
            (path / "step").write_text(str(step))


while not (args.listen and drain_requested()):
    time.sleep(STEP)
    dist.all_reduce(torch.ones(1))
    step += 1
    report_progress(step)
    if record:
        record.write(json.dumps({"step": step, "time": time.time(), **world}) + "\n")
    if step % args.checkpoint_every == 0:
        save()
save()
dist.destroy_process_group()
