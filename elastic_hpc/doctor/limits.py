"""What a job, and a user, may use at a site: the limits that elastic jobs may reach. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from elastic_hpc.doctor.asked import Unknown, config, has
from elastic_hpc.doctor.findings import Finding, Level
from elastic_hpc.slurm.settings import Facts

_UNLIMITED = frozenset({"", "0", "UNLIMITED"})


def memory(facts: Facts) -> Finding | None:
    """A finding only if Slurm gives a job less than the memory of its nodes, and enforces the limit."""
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
    means = f"without --mem a job has {amount}, and the kernel kills workers that need more, in every round"
    advice = "you: --mem=0 for all memory of the nodes, or --mem=NG, or --mem-per-gpu=NG"
    return Finding(Level.NOTE, "memory", found, means, advice)


def running_jobs(facts: Facts, qos: str | None) -> Finding | None:
    """A finding only if the user's associations, or the QOS of the user's jobs, limit the number of jobs."""
    if not has(facts, "AccountingStorageEnforce", "limits"):
        return None
    limited = {
        f"MaxJobs = {row['MaxJobs']} in account {row['Account']}": row["MaxJobs"] for row in associations(facts)
    } | {
        f"MaxJobsPerUser = {row['MaxJobsPerUser']} in QOS {row['Name']}": row["MaxJobsPerUser"]
        for row in of_jobs(facts, qos, facts.partition.get("QoS", ""))
    }
    limits = {found: int(jobs) for found, jobs in limited.items() if jobs}
    if not limits:
        return None
    found, least = ", ".join(sorted(limits)), min(limits.values())
    if least <= 1:
        means = "each joiner of --grow is a separate job: no joiner starts while the job that needs it runs"
        advice = "you: --spares or a larger MAX instead of --grow; administrator: a higher limit, with sacctmgr"
        return Finding(Level.WARN, "limits", found, means, advice)
    means = f"each joiner of --grow is a separate job, and counts: at most {least - 1} run beside the job that grows"
    return Finding(Level.NOTE, "limits", found, means, "you: count your other jobs too before you rely on --grow")


def associations(facts: Facts) -> list[Mapping[str, str]]:
    """The user's associations with this cluster."""
    if reason := facts.unknown.get("associations"):
        raise Unknown(reason)
    return [row for row in facts.associations if row["Cluster"] == config(facts, "ClusterName")]


def of_jobs(facts: Facts, qos: str | None, *others: str) -> list[Mapping[str, str]]:
    """The QOS ``qos`` of the user's jobs, or the QOS that they have by default, and ``others``."""
    if reason := facts.unknown.get("qos"):
        raise Unknown(reason)
    names = {qos} if qos else {row["DefaultQOS"] or "normal" for row in associations(facts)}
    if not (found := [row for row in facts.qos if row["Name"] in {*names, *others}]):
        raise Unknown(f"sacctmgr shows no QOS {', '.join(names) or 'and no association of yours'}")
    return found
