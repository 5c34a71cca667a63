"""The job of a batch script that elastic-sbatch gets in place of a training script. Reads that file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from elastic_hpc.errors import UsageError
from elastic_hpc.from_batch.convert import from_batch
from elastic_hpc.job.spec import JobSpec, build
from elastic_hpc.options.sbatch import COMMAND_LINE, Given


def job_of_batch_script(
    path: str,
    args: Sequence[str],
    options: Sequence[tuple[str, str]],
    sbatch: Sequence[Given],
    torchrun: Sequence[Given],
) -> JobSpec:
    """The job of the batch script at ``path`` with its arguments ``args``. The other parameters are the options of the
    command line, see ``Request``. Raises UsageError.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"--from-batch {path}: {error.strerror}; expected a batch script that can be read") from None
    instead = {**dict(options), **{given.name: given.value or "" for given in sbatch}}
    request, environment = from_batch(content, path, args, os.environ, instead)
    job = build(replace(request, options=options, sbatch=sbatch, torchrun=torchrun))
    return replace(job, notes=(*job.notes, *_notes(job, environment)), repeatable=False)


def _notes(job: JobSpec, environment: str) -> list[str]:
    """Notes about what the user of the batch script may not expect. ``environment``: see ``from_batch``."""
    notes = []
    if job.launch.grow and any("SLURM_JOB" in line.value for line in job.setup):
        notes.append("--grow: each joiner is a Slurm job with its own $SLURM_JOB_ID")
    if environment and job.agent_python is None and job.container is None:
        other = "to use the Python that this line activates, install elastic_hpc there and add --python python"
        notes.append(f"{environment}: agents and workers run with {job.python}; {other}")
    nodes, source = job.launch.nodes, job.sources["nodes"]
    if nodes.min == nodes.max > 1 and source != COMMAND_LINE:
        fixed = f"{source}: the job needs all its {nodes.max} nodes; to let it run on fewer, for example"
        notes.append(f"{fixed}: --nodes {nodes.min // 2}:{nodes.max}")
    return notes
