"""What a job, and a user, may use at a site, as far as elastic jobs meet these limits. Pure."""

from __future__ import annotations

from elastic_hpc.doctor.asked import Unknown, config, has
from elastic_hpc.doctor.findings import Finding, Level
from elastic_hpc.slurm.settings import Facts

_UNLIMITED = frozenset({"", "0", "UNLIMITED"})


def memory(facts: Facts) -> Finding | None:
    """Only where Slurm gives a job less than the memory of its nodes, and keeps the job to that."""
    if "MEMORY" not in config(facts, "SelectTypeParameters") or "cgroup" not in config(facts, "TaskPlugin"):
        return None
    if facts.config.get("ConstrainRAMSpace", "").lower() == "no":  # only some versions show cgroup.conf
        return None
    given = (
        (f"{name} = {settings[name]}", f"{settings[name]} MiB {per}")
        for settings in (facts.partition, facts.config)
        for name, per in (("DefMemPerNode", "on each node"), ("DefMemPerCPU", "for each of its CPUs"))
        if settings.get(name, "") not in _UNLIMITED
    )
    if (first := next(given, None)) is None:
        return None
    found, amount = first
    means = f"without --mem a job has {amount}, and the kernel kills workers that need more, in each round again"
    advice = "you: --mem=0 for all memory of the nodes, or --mem=NG, or --mem-per-gpu=NG"
    return Finding(Level.NOTE, "memory", found, means, advice)


def running_jobs(facts: Facts) -> Finding | None:
    """Only where the user's associations limit the number of jobs: each joiner is a job."""
    if not has(facts, "AccountingStorageEnforce", "limits"):
        return None
    if reason := facts.unknown.get("limits"):
        raise Unknown(reason)
    here = [row for row in facts.limits if row["Cluster"] in {config(facts, "ClusterName"), ""}]
    limited = {row["Account"]: int(row["MaxJobs"]) for row in here if row["MaxJobs"]}
    if not limited:
        return None
    found = ", ".join(f"MaxJobs = {jobs} in account {account}" for account, jobs in sorted(limited.items()))
    if (least := min(limited.values())) <= 1:
        means = "a joiner of --grow is a job of its own: none starts while the job that asked for it runs"
        advice = "you: no --grow, but --spares or a larger MAX; administrator: sacctmgr modify user NAME set MaxJobs=N"
        return Finding(Level.WARN, "limits", found, means, advice)
    means = f"each joiner of --grow is a job of its own, and counts: {least - 1} at most beside the job that grows"
    return Finding(Level.NOTE, "limits", found, means, "you: count your other jobs too before you rely on --grow")
