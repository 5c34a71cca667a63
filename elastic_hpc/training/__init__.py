"""For training scripts: drain, progress, shares of a batch, checkpoints. A script may use any of these, or none.

Without an agent, under plain torchrun or python, the same script runs: no drain is requested, and no agent reads the
progress. Importing this package does not import torch. The package touches only files, the process group and the
agent's socket. The agent of a node reads what ``progress`` writes, and writes what ``drain`` and ``departures`` read;
start with these.
``checkpoint`` saves and loads in a ``checkpoint_folder``; ``fences`` say who owns the folder. ``shares`` divides a
batch among the ranks. ``audit`` compares the ranks. ``step_time`` measures the times that show a slow node.

``in_place``: a training loop whose workers keep their processes when the world changes. ``live_run`` is the loop,
``live_link`` the connection to the agent, ``reform`` the process group whose members change, ``live_step`` one step of
the loop, ``live_state`` what a rank has learned, ``live_checkpoints`` what the loop saves. ``lightning`` is a
strategy for Lightning's Trainer; only this module imports Lightning.
"""

from elastic_hpc.training.audit import Diverged, verify
from elastic_hpc.training.checkpoint import CheckpointError, CheckpointReader, Checkpoints
from elastic_hpc.training.departures import Leaving, leaving
from elastic_hpc.training.drain import drain_requested
from elastic_hpc.training.fences import FencedOut
from elastic_hpc.training.in_place import live
from elastic_hpc.training.progress import Progress, read_progress, report_progress
from elastic_hpc.training.shares import Share, accumulation
from elastic_hpc.training.step_time import time_steps

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "Checkpoints",
    "Diverged",
    "FencedOut",
    "Leaving",
    "Progress",
    "Share",
    "accumulation",
    "drain_requested",
    "leaving",
    "live",
    "read_progress",
    "report_progress",
    "time_steps",
    "verify",
]
