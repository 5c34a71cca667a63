"""Elastic PyTorch jobs on Slurm: start with MIN nodes, use up to MAX, survive the loss of nodes."""

__version__ = "0.1.0"
