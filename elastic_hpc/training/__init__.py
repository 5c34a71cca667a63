"""For training scripts, and none of it is needed: learn of a drain, tell the progress, share a batch, checkpoints.

Without an agent, under plain torchrun or python, the same script runs: no drain is ever asked for, progress is told to
nobody, and checkpoints are not fenced. Importing this imports no torch. Files and the process group are all that this
folder touches. The agent of a node reads what ``progress`` writes, and writes what ``drain`` looks for; start there.
"""

from elastic_hpc.training.checkpoint import CheckpointError, Checkpoints
from elastic_hpc.training.checkpoint_folder import FencedOut
from elastic_hpc.training.drain import drain_requested
from elastic_hpc.training.progress import Progress, read_progress, report_progress
from elastic_hpc.training.shares import Share, accumulation

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "FencedOut",
    "Progress",
    "Share",
    "accumulation",
    "drain_requested",
    "read_progress",
    "report_progress",
]
