"""The commands: elastic-sbatch, elastic-srun, elastic-hpc."""
