"""When Slurm would start a job that is not submitted: ``sbatch --test-only``."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence

from elastic_hpc.environment import for_a_new_job
from elastic_hpc.errors import SlurmError
from elastic_hpc.membership.nodes import count_names
from elastic_hpc.slurm import client
from elastic_hpc.slurm.job import epoch
from elastic_hpc.slurm.states import Estimate
from elastic_hpc.slurm.submit import refusal

_SECONDS = 30
# "Job 7 to start at 2026-11-29T20:14:57 using 2 processors on nodes n[1-2] in partition main"; long ago "on n[1-2]";
# on one of several clusters "to start at TIME on cluster NAME using".
_ANSWER = re.compile(r"\bJob \d+ to start at (\S+)(?: on cluster \S+)? using \d+ \w+ on (?:nodes )?(\S+)")


def estimates(
    script: bytes, ranges: Sequence[tuple[int, int]], environ: Mapping[str, str], options: Sequence[str] = ()
) -> list[Estimate]:
    """When Slurm would start the batch script ``script`` on MIN to MAX nodes, for each pair in ``ranges``, with
    ``options``, which override the script's. Requests all estimates at once. Raises UsageError if Slurm refuses them
    all, SlurmError if Slurm does not answer.
    """
    if shutil.which("sbatch") is None:
        raise SlurmError("sbatch: not found; is this a login node of the cluster, and is Slurm's module loaded?")
    with tempfile.NamedTemporaryFile(suffix=".sbatch") as file:
        file.write(script)
        file.flush()
        commands = [("sbatch", "--test-only", f"--nodes={least}-{most}", *options, file.name) for least, most in ranges]
        answers = client.answers(
            _SECONDS,
            *commands,
            environ=client.clean_environment(for_a_new_job(environ)),
            stderr=subprocess.STDOUT,  # where sbatch writes the answer
        )
    found, refusals = [], []
    for (least, most), command, answer in zip(ranges, commands, answers, strict=True):
        if not isinstance(answer, SlurmError):
            found.append(estimate(least, most, answer))
            continue
        reason = str(answer).removeprefix(f"{' '.join(command)}: ").removeprefix("allocation failure: ")
        refusals.append(refusal(reason))
        if isinstance(refusals[-1], SlurmError):
            raise refusals[-1]
        found.append(Estimate(least, most, refused=reason))
    if len(refusals) == len(found):
        raise refusals[0]
    return found


def estimate(least: int, most: int, answer: str) -> Estimate:
    """The estimate in ``answer`` of ``sbatch --test-only``. Without a time, or with N/A, Slurm gives no estimate."""
    match = _ANSWER.search(answer)
    if match is None:
        return Estimate(least, most)
    try:
        nodes = count_names(match[2])
    except ValueError:
        nodes = 0
    return Estimate(least, most, epoch(match[1]), nodes)
