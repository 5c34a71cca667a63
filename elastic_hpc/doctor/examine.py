"""Examines a site for elastic jobs: its configuration files, Slurm's settings, the folder of the run directories and,
with a job, the nodes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from elastic_hpc import slurm
from elastic_hpc.doctor import log_dir, probe_job
from elastic_hpc.doctor.findings import Finding, Level, worst_first
from elastic_hpc.doctor.nodes import run_findings
from elastic_hpc.doctor.slurm_settings import slurm_findings
from elastic_hpc.errors import ElasticError, SlurmError, UsageError
from elastic_hpc.job.config import Configuration, load
from elastic_hpc.options.sbatch import Given, last
from elastic_hpc.options.spec import LaunchSpec


def examine(
    partition: str | None, folder: str | None, nodes: int, sbatch: Sequence[Given], tell: Callable[[str], None]
) -> tuple[list[Finding], bool]:
    """All findings, worst first, and whether Slurm answered. ``partition``, and ``folder`` of the run directories: None
    for the values of the configuration files. ``nodes``: the number of nodes that a job with the options ``sbatch``
    examines, 0 for no job. ``tell`` is called with what the job waits for.

    Raises UsageError if Slurm does not know the partition.
    """
    settings, findings = _configuration()
    partition = partition or last(settings.sbatch, "partition")
    grace = settings.options["grace"].value if "grace" in settings.options else LaunchSpec.grace
    facts = slurm.facts(partition)
    if partition and "unknown to Slurm" in facts.unknown.get("partition", ""):
        raise UsageError(f"--partition {partition}: unknown to Slurm; see sinfo")
    qos = last([*settings.sbatch, *sbatch], "qos")
    findings += slurm_findings(facts, grace, qos)
    configured = settings.options["log-dir"].value if "log-dir" in settings.options else "elastic-logs"
    folder = os.path.abspath(folder or configured)
    observed = _of_nodes(nodes, folder, sbatch, tell) if nodes and facts.answered else [log_dir.check(folder)]
    subjects = {finding.about for finding in observed}  # observations override findings on the settings
    return worst_first([*observed, *(finding for finding in findings if finding.about not in subjects)]), facts.answered


def _configuration() -> tuple[Configuration, list[Finding]]:
    about = "configuration files"
    try:
        settings = load(os.environ, Path.cwd())
    except ElasticError as error:
        means = "elastic-sbatch refuses every job"
        return Configuration(), [Finding(Level.BAD, about, str(error), means, "you: fix this file")]
    sources = [setting.source for setting in settings.options.values()] + [given.source for given in settings.sbatch]
    if not sources:
        return settings, [Finding(Level.OK, about, "no settings found", "elastic-sbatch uses its defaults")]
    found = ", ".join(dict.fromkeys(sources))
    return settings, [Finding(Level.OK, about, found, "elastic-sbatch can read them")]


def _of_nodes(nodes: int, folder: str, sbatch: Sequence[Given], tell: Callable[[str], None]) -> list[Finding]:
    try:
        return run_findings(probe_job.run(nodes, folder, sbatch, tell), folder)
    except SlurmError as error:
        return [Finding(Level.UNKNOWN, "nodes", str(error), "no node was checked", "you: try again")]
    except ElasticError as error:
        means = "no node was checked; Slurm may refuse the jobs of elastic-sbatch too"
        return [Finding(Level.BAD, "nodes", str(error), means)]
