"""A training script that starts quickly, for tests in which the model does not matter. It writes each step and a
checkpoint to the run directory, and runs as long as its working directory has a file ``hold``.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

run_dir, hold = Path(os.environ["ELASTIC_HPC_RUN_DIR"]), Path("hold")
rank, world_size, round_, restart = (
    int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "ELASTIC_HPC_ROUND", "TORCHELASTIC_RESTART_COUNT")
)
checkpoint = run_dir / "checkpoint"
dist.init_process_group("gloo")
at = torch.tensor(int(checkpoint.read_text()) if rank == 0 and checkpoint.exists() else 0)
dist.broadcast(at, 0)  # only rank 0 reads, so that all ranks continue from the same step
step, goes_on = int(at), torch.ones(())
record = (run_dir / "steps.jsonl").open("a", buffering=1) if rank == 0 else None
while goes_on:
    step += 1
    if record:
        fields = {"step": step, "time": time.time(), "world_size": world_size, "round": round_, "restart": restart}
        record.write(json.dumps(fields) + "\n")
        if step % 10 == 0:
            temporary = checkpoint.with_suffix(".tmp")
            temporary.write_text(str(step))
            temporary.replace(checkpoint)
        goes_on.fill_(step < 60 or hold.exists())
    dist.broadcast(goes_on, 0)
    time.sleep(0.02)
dist.destroy_process_group()
