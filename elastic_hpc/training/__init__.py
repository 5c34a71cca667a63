"""For training scripts: drain, progress, shares of a batch, checkpoints. A script may use any of these, or none.

Without an agent, under plain torchrun or python, the same script runs: no drain is requested, and no agent reads the
progress. Importing this package imports no torch. It touches files and the process
group only. The agent of a node reads what ``progress`` writes, and writes what ``drain`` looks for; start with these.
``checkpoint`` saves and loads in a ``checkpoint_folder``; ``fences`` say who owns the folder. ``shares``: of a batch.
"""

from elastic_hpc.training.checkpoint import CheckpointError, CheckpointReader, Checkpoints
from elastic_hpc.training.drain import drain_requested
from elastic_hpc.training.fences import FencedOut
from elastic_hpc.training.progress import Progress, read_progress, report_progress
from elastic_hpc.training.shares import Share, accumulation

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "Checkpoints",
    "FencedOut",
    "Progress",
    "Share",
    "accumulation",
    "drain_requested",
    "read_progress",
    "report_progress",
]
