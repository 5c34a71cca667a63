"""The training script of test_shared_folder.py. It writes its steps to the folder of its first argument, its
checkpoints to the folder of its second argument, or else to the run directory. It runs as long as the first folder has
a file ``hold``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from elastic_hpc.training import CheckpointError, Checkpoints, report_progress

data, round_ = Path(sys.argv[1]), int(os.environ["ELASTIC_HPC_ROUND"])
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
checkpoints = Checkpoints(*sys.argv[2:])
step, goes_on = checkpoints.load(lambda path: int((path / "step").read_text())) or 0, torch.ones(())
record = (data / "steps.jsonl").open("a", buffering=1) if rank == 0 else None
while goes_on:
    step += 1
    report_progress(step)
    if record:
        fields = {"step": step, "time": time.time(), "round": round_, "world_size": world_size}
        record.write(json.dumps(fields) + "\n")
        goes_on.fill_(step < 60 or (data / "hold").exists())
    dist.broadcast(goes_on, 0)
    if step % 10 == 0:
        with contextlib.suppress(CheckpointError), checkpoints.save(step) as path:
            if rank == 0:
                (path / "step").write_text(str(step))
    time.sleep(0.02)
dist.destroy_process_group()
