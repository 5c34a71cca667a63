"""What delays the starts and the ends of jobs at a site: programs of the site, and lost nodes. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from elastic_hpc.doctor.asked import config, has, number, setting, slurm_conf
from elastic_hpc.doctor.findings import Finding, Level
from elastic_hpc.slurm.settings import Facts, is_none, version

_QUICK = 60
"""The most seconds of SlurmdTimeout with which Slurm soon notices a lost node."""
_KILL_WAIT = 25
"""The least seconds of KillWait for the 20 s that agents give the workers after SIGTERM."""
_CRED_EXPIRE = 120
"""Slurm's default for the seconds that a requeued job waits after its completion."""
_ENDLESS = 65534
"""What Slurm shows as PrologEpilogTimeout if none is set."""
_LIMIT = slurm_conf("PrologEpilogTimeout=300, which ends a program that hangs")


def prolog(facts: Facts) -> Finding | None:
    names = [name for name in ("Prolog", "PrologSlurmctld") if not is_none(config(facts, name))]
    if not names:
        return None
    shown, limit = _ends_after(facts, "Prolog")
    hangs = "Slurm drains the node, and may requeue the job" if limit else "nothing ends it"
    means = (
        "agents start when the prolog has ended, also after a requeue and on a replacement (--grow). A job with MIN "
        "nodes starts without a node whose prolog takes half a minute longer. Below MIN, a job waits 300 s for a "
        f"replacement. If the prolog hangs, {hangs}"
    )
    advice = "you: --wait-for-nodes, if the prolog takes minutes" + ("" if limit else f"; {_LIMIT}")
    return Finding(Level.NOTE, "prolog", ", ".join([*_shown(facts, names), shown]), means, advice)


def epilog(facts: Facts) -> Finding | None:
    names = [name for name in ("Epilog", "EpilogSlurmctld") if not is_none(config(facts, name))]
    wait = number(config(facts, "CompleteWait"), "CompleteWait")
    if not names and not wait:
        return None
    found, advice, (shown, limit) = _shown(facts, names), list[str](), _ends_after(facts, "Epilog")
    means = "the nodes of a job are free, also for its own requeue, when the epilog has ended on them"
    if names:
        found.append(shown)
        advice = ["you: --run measures how long the epilog takes", *([] if limit else [_LIMIT])]
    if wait:
        found.append(f"CompleteWait = {wait} s")
        means = f"while a job completes, Slurm may start no other job, requeued job or joiner for up to {wait} s"
    if (delay := _requeue_delay(facts)) > _QUICK:
        means += f"; a requeued job that takes more than half a minute to complete starts {delay} s after that"
    return Finding(Level.NOTE, "epilog", ", ".join(found), means, "; ".join(advice))


def requeue_delay(facts: Facts) -> Finding | None:
    """A finding only if there is something to set: before 25.11 a site cannot change the delay of requeues alone."""
    delay = _requeue_delay(facts)
    if not (advice := _quicker_requeue(facts, delay)):
        return None
    means = (
        "a requeued job starts after about 10 s. If its agents cannot wait until it has completed, because its first "
        f"node is lost or its epilog is long, it starts {delay} s after its completion"
    )
    return Finding(Level.NOTE, "requeue delay", "SchedulerParameters without requeue_delay", means, advice)


def slurmd_timeout(facts: Facts) -> Finding:
    value, found = setting(facts, "SlurmdTimeout")
    seconds = number(value, "SlurmdTimeout")
    keeps = has(facts, "SchedulerParameters", "disable_job_shrink")
    if keeps:
        found += ", SchedulerParameters has disable_job_shrink"
    if seconds == 0:
        means = (
            "Slurm never declares a silent node down: a job that has lost a node ends only when an administrator acts"
        )
        return Finding(Level.WARN, "SlurmdTimeout", found, means, slurm_conf("SlurmdTimeout=300"))
    if seconds <= _QUICK:
        return Finding(Level.OK, "SlurmdTimeout", found, "Slurm soon notices that a node is lost")
    means = (
        "training continues without a lost node after --heartbeat-timeout, and at the end the other nodes are free "
        f"within seconds. But a job that has lost {'a' if keeps else 'its first'} node stays COMPLETING, or waits in "
        f"the queue, for {seconds} s and more: only Slurm or an operator can end that"
    )
    advice = slurm_conf(f"SlurmdTimeout={_QUICK}, unless nodes that are only busy answer later")
    if keeps:
        advice += "; or SchedulerParameters without disable_job_shrink: then a job can release lost nodes but its first"
    return Finding(Level.NOTE, "SlurmdTimeout", found, means, advice)


def kill_wait(facts: Facts) -> Finding:
    value, found = setting(facts, "KillWait")
    if number(value, "KillWait") >= _KILL_WAIT:
        return Finding(Level.OK, "KillWait", found, "after SIGTERM workers have the full 20 s to save")
    means = (
        "after SIGTERM (scancel, or a preemption without warning) agents give the workers 20 s to save, but Slurm "
        "kills them sooner"
    )
    return Finding(Level.WARN, "KillWait", found, means, f"{slurm_conf('KillWait=30')}; you: save often")


def _shown(facts: Facts, names: Sequence[str]) -> list[str]:
    return [setting(facts, name)[1] for name in names]


def _ends_after(facts: Facts, program: str) -> tuple[str, int]:
    """The time limit of a prolog or an epilog, as a finding shows it, and in seconds; 0 for none."""
    name = f"{program}Timeout"
    name = name if name in facts.config else "PrologEpilogTimeout"
    value = config(facts, name)
    seconds = 0 if is_none(value.lower()) else number(value, name)
    seconds = 0 if seconds == _ENDLESS else seconds
    return f"{name} = {f'{seconds} s' if seconds else 'none'}", seconds


def _requeue_delay(facts: Facts) -> int:
    """Seconds from the completion of a requeued job to its start, unless its start was set before."""
    for name, option in (("SchedulerParameters", "requeue_delay"), ("AuthInfo", "cred_expire")):
        if found := re.search(rf"\b{option}=(\d+)", config(facts, name)):
            return int(found[1]) + 1
    return _CRED_EXPIRE + 1


def _quicker_requeue(facts: Facts, delay: int) -> str:
    """How to shorten that delay, if Slurm can."""
    can = version(config(facts, "SLURM_VERSION")) >= (25, 11)
    return slurm_conf("SchedulerParameters=requeue_delay=5") if can and delay > _QUICK else ""
