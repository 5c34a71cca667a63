"""What Slurm's settings at a site mean for elastic jobs. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import timedelta

from elastic_hpc.doctor.findings import Finding, Level
from elastic_hpc.options.durations import as_text
from elastic_hpc.slurm.settings import Facts, is_none

_QUICK = 60
"""Seconds of SlurmdTimeout up to which a lost node is noticed soon."""
_KILL_WAIT = 25
"""Least seconds of KillWait for the 20 s that agents give the workers after SIGTERM."""
_TO_REQUEUE = 5
"""Seconds of the grace time that agents need for the requeue itself."""


class _Unknown(Exception):
    """Slurm has not said what a check needs."""


def slurm_findings(facts: Facts, grace: timedelta) -> list[Finding]:
    """What Slurm's settings mean for jobs with ``--grace``; or that Slurm cannot be asked."""
    if not facts.answered:
        means = "it cannot be asked: nothing can be submitted from here, and nothing is known of this site"
        advice = (
            "you: try on a login node of the cluster, with Slurm's module loaded; if sinfo fails there, ask the "
            "administrator"
        )
        return [Finding(Level.BAD, "Slurm", facts.unknown["config"], means, advice)]
    return [_judged(about, check, facts, grace) for about, check in _CHECKS]


def _judged(about: str, check: Callable[[Facts, timedelta], Finding], facts: Facts, grace: timedelta) -> Finding:
    try:
        return check(facts, grace)
    except _Unknown as reason:
        return Finding(Level.UNKNOWN, about, str(reason), "not judged", "try again, or ask the administrator")


def _config(facts: Facts, name: str) -> str:
    return _value(facts.config, name, facts.unknown.get("config"), "scontrol show config")


def _setting(facts: Facts, name: str) -> tuple[str, str]:
    """A setting's value, and the setting as a finding shows it."""
    value = _config(facts, name)
    return value, f"{name} = {value}"


def _partition(facts: Facts, name: str) -> str:
    return _value(facts.partition, name, facts.unknown.get("partition"), "scontrol show partition")


def _value(settings: Mapping[str, str], name: str, reason: str | None, command: str) -> str:
    if reason is not None or name not in settings:
        raise _Unknown(reason or f"{command} does not say {name}")
    return settings[name]


def _number(text: str, name: str) -> int:
    match = re.match(r"\d+", text)
    if match is None:
        raise _Unknown(f"{name} = {text}: expected a number")
    return int(match[0])


def _slurm_conf(line: str) -> str:
    return f"administrator, slurm.conf: {line}"


def _requeue(facts: Facts, _: timedelta) -> Finding:
    value, found = _setting(facts, "JobRequeue")
    if value == "1":
        return Finding(Level.OK, "requeue", found, "jobs may come back through the queue")
    means = (
        "jobs ask with --requeue, which Slurm may ignore; then a new job with another id goes on in the place of one "
        "that must come back"
    )
    advice = f"{_slurm_conf('JobRequeue=1')}; --run tells whether --requeue is enough"
    return Finding(Level.WARN, "requeue", found, means, advice)


def _kill_on_bad_exit(facts: Facts, _: timedelta) -> Finding:
    value, found = _setting(facts, "KillOnBadExit")
    if value == "0":
        return Finding(Level.OK, "KillOnBadExit", found, "a step goes on when one of its tasks fails")
    means = (
        "elastic-sbatch and elastic-srun overrule it; a step that you start yourself, for torchrun, ends with its "
        "first task that fails"
    )
    return Finding(Level.NOTE, "KillOnBadExit", found, means, "you, in scripts of your own: srun --kill-on-bad-exit=0")


def _slurmd_timeout(facts: Facts, _: timedelta) -> Finding:
    value, found = _setting(facts, "SlurmdTimeout")
    seconds = _number(value, "SlurmdTimeout")
    if seconds == 0:
        means = "Slurm never gives up a silent node: a job that has lost one cannot end until an administrator acts"
        return Finding(Level.WARN, "SlurmdTimeout", found, means, _slurm_conf("SlurmdTimeout=300"))
    if seconds <= _QUICK:
        return Finding(Level.OK, "SlurmdTimeout", found, "Slurm soon notices that a node is lost")
    means = (
        "training goes on after --heartbeat-timeout, and at the end the nodes that work are free within seconds; but a "
        f"job that has lost its first node stays COMPLETING, or waits in the queue, for {seconds} s and more: only "
        "Slurm or an operator can end that"
    )
    advice = _slurm_conf(f"SlurmdTimeout={_QUICK}, where that does not give up nodes that are only busy")
    return Finding(Level.NOTE, "SlurmdTimeout", found, means, advice)


def _kill_wait(facts: Facts, _: timedelta) -> Finding:
    value, found = _setting(facts, "KillWait")
    if _number(value, "KillWait") >= _KILL_WAIT:
        return Finding(Level.OK, "KillWait", found, "after SIGTERM workers have the 20 s that agents give them")
    means = (
        "after SIGTERM (scancel, a preemption without warning) Slurm kills before the 20 s are over that agents give "
        "the workers to save"
    )
    return Finding(Level.WARN, "KillWait", found, means, f"{_slurm_conf('KillWait=30')}; you: save often")


def _preemption(facts: Facts, grace: timedelta) -> Finding:
    if is_none(_config(facts, "PreemptType")) or _partition(facts, "PreemptMode") == "OFF":
        kind = f"PreemptType = {_config(facts, 'PreemptType')}, PreemptMode = {_partition(facts, 'PreemptMode')}"
        return Finding(Level.OK, "preemption", kind, "jobs of this partition are not preempted")
    mode, given = _partition(facts, "PreemptMode"), _partition(facts, "GraceTime")
    warned = "preempt_send_user_signal" in _config(facts, "SlurmctldParameters").lower()
    seconds = _number(given, "GraceTime")
    signal = "with" if warned else "without"
    found = f"PreemptMode = {mode}, GraceTime = {given} s, {signal} preempt_send_user_signal"
    if {"SUSPEND", "GANG"} & set(mode.split(",")):
        means = "a suspended job stands still with all its agents and may take its nodes for lost when it goes on"
        advice = "you: --partition with one that is not suspended; " + _slurm_conf("PreemptMode=REQUEUE")
        return Finding(Level.WARN, "preemption", found, means, advice)
    then = "Slurm puts the job back into the queue" if mode == "REQUEUE" else "Slurm cancels, the agents requeue"
    if warned and seconds >= grace.total_seconds():
        return Finding(Level.OK, "preemption", found, f"workers are told and have --grace {as_text(grace)}; {then}")
    grace_time = f"GraceTime={as_text(grace)} in the partition"
    if warned:
        means = f"workers are told, but have {seconds} s and not --grace {as_text(grace)}; {then}"
        advice = f"you: --grace {_grace(seconds)}; {_slurm_conf(grace_time)}"
        return Finding(Level.WARN, "preemption", found, means, advice, {"grace": _grace(seconds)} if seconds else {})
    hurry = f", with --grace {_grace(seconds)} for the agents to requeue in time" if mode != "REQUEUE" else ""
    means = (
        "no warning comes before SIGTERM, which reaches the workers too: those that listen have at most "
        f"{min(20, seconds or 20)} s to save, others die at once; {then}"
    )
    advice = f"you: save often{hurry}; {_slurm_conf(f'SlurmctldParameters=preempt_send_user_signal, and {grace_time}')}"
    return Finding(Level.WARN, "preemption", found, means, advice)


def _grace(seconds: int) -> int:
    return max(1, seconds - _TO_REQUEUE)


def _arrays(facts: Facts, _: timedelta) -> Finding:
    value, found = _setting(facts, "MaxArraySize")
    if (size := _number(value, "MaxArraySize")) > 1:
        return Finding(Level.OK, "job arrays", found, f"--array takes indices up to {size - 1}")
    return Finding(
        Level.NOTE, "job arrays", found, "there are none here", "you: submit the jobs one by one, without --array"
    )


def _accounting(facts: Facts, _: timedelta) -> Finding:
    value, found = _setting(facts, "AccountingStorageType")
    if value.endswith("slurmdbd"):
        return Finding(Level.OK, "accounting", found, "Slurm remembers jobs that have ended")
    age = _config(facts, "MinJobAge")
    means = f"Slurm forgets a job {age} after its end; what is known then is in its run directory"
    advice = "you: keep the run directories (--log-dir)"
    return Finding(Level.NOTE, "accounting", f"{found}, MinJobAge = {age}", means, advice)


def _private_data(facts: Facts, _: timedelta) -> Finding:
    value, found = _setting(facts, "PrivateData")
    hidden = set(value.replace(" ", "").split(","))
    if "nodes" in hidden:
        means = (
            "Slurm shows users no states of nodes: a job avoids the nodes that failed under it, and does not know "
            "which others are down"
        )
        advice = "you: nothing; administrator, who wants jobs to see them: PrivateData without nodes"
        return Finding(Level.NOTE, "private data", found, means, advice)
    return Finding(
        Level.OK, "private data", found, "your jobs see the states of nodes, which they need after a requeue"
    )


def _pyxis(facts: Facts, _: timedelta) -> Finding:
    if "srun_help" in facts.unknown:
        raise _Unknown(facts.unknown["srun_help"])
    if "--container-image" in facts.srun_help:
        return Finding(Level.OK, "pyxis", "srun has --container-image", "--container-image works with any image")
    means = "--container-image works only where apptainer is"
    advice = "you: --container-runtime apptainer with an image IMAGE.sif"
    return Finding(Level.NOTE, "pyxis", "srun has no --container-image: the plugin is not loaded here", means, advice)


_CHECKS: tuple[tuple[str, Callable[[Facts, timedelta], Finding]], ...] = (
    ("requeue", _requeue),
    ("KillOnBadExit", _kill_on_bad_exit),
    ("SlurmdTimeout", _slurmd_timeout),
    ("KillWait", _kill_wait),
    ("preemption", _preemption),
    ("job arrays", _arrays),
    ("accounting", _accounting),
    ("private data", _private_data),
    ("pyxis", _pyxis),
)
