"""What bin/mini-slurm consists of."""
