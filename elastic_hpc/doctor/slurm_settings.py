"""What Slurm's settings at a site mean for elastic jobs. Pure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial

from elastic_hpc.doctor import delays, limits
from elastic_hpc.doctor.asked import Unknown, config, has, number, partition, setting, slurm_conf
from elastic_hpc.doctor.findings import Finding, Level
from elastic_hpc.options.durations import as_text
from elastic_hpc.slurm.settings import Facts, is_none

_TO_REQUEUE = 5
"""Seconds of the grace time that agents need for the requeue."""


def slurm_findings(facts: Facts, grace: timedelta, qos: str | None = None) -> list[Finding]:
    """What Slurm's settings mean for jobs with ``--grace`` in ``qos``, or that Slurm does not answer."""
    if not facts.answered:
        means = "Slurm does not answer: no job can be submitted from this machine"
        advice = (
            "you: try on a login node of the cluster, with Slurm's module loaded; if sinfo fails there, ask the "
            "administrator"
        )
        return [Finding(Level.BAD, "Slurm", facts.unknown["config"], means, advice)]
    checks: dict[str, Callable[[Facts], Finding | None]] = {
        "requeue": _requeue,
        "requeue delay": delays.requeue_delay,
        "KillOnBadExit": _kill_on_bad_exit,
        "SlurmdTimeout": delays.slurmd_timeout,
        "giving back": _giving_back,
        "KillWait": delays.kill_wait,
        "prolog": delays.prolog,
        "epilog": delays.epilog,
        "preemption": partial(_preemption, grace=grace, qos=qos),
        "memory": limits.memory,
        "limits": partial(limits.running_jobs, qos=qos),
        "job arrays": _arrays,
        "accounting": _accounting,
        "private data": _private_data,
        "pyxis": _pyxis,
        "expedited requeue": _expedited_requeue,
    }
    return [found for about, check in checks.items() if (found := _judged(about, check, facts))]


def _judged(about: str, check: Callable[[Facts], Finding | None], facts: Facts) -> Finding | None:
    try:
        return check(facts)
    except Unknown as reason:
        return Finding(Level.UNKNOWN, about, str(reason), "not judged", "try again, or ask the administrator")


def _requeue(facts: Facts) -> Finding:
    value, found = setting(facts, "JobRequeue")
    if value == "1":
        return Finding(Level.OK, "requeue", found, "Slurm can requeue jobs")
    means = (
        "elastic jobs have --requeue, which overrides this unless a submission filter removes it; then a new job with "
        "another ID continues in place of the old job"
    )
    advice = f"{slurm_conf('JobRequeue=1')}; --run checks whether --requeue is enough"
    return Finding(Level.WARN, "requeue", found, means, advice)


def _kill_on_bad_exit(facts: Facts) -> Finding:
    value, found = setting(facts, "KillOnBadExit")
    if value == "0":
        return Finding(Level.OK, "KillOnBadExit", found, "a step continues when one of its tasks fails")
    means = (
        "elastic-sbatch and elastic-srun override this; a step that you start yourself, for torchrun, ends when its "
        "first task fails"
    )
    return Finding(Level.NOTE, "KillOnBadExit", found, means, "you, in your own scripts: srun --kill-on-bad-exit=0")


def _giving_back(facts: Facts) -> Finding:
    value, accounting = setting(facts, "AccountingStorageType")
    if has(facts, "SchedulerParameters", "disable_job_shrink"):
        means = "a running job cannot return nodes to Slurm: resize, release and --yield-to release only joiners"
        advice = slurm_conf("SchedulerParameters without disable_job_shrink")
        return Finding(Level.WARN, "giving back", "SchedulerParameters has disable_job_shrink", means, advice)
    if not value.endswith("slurmdbd"):
        means = (
            "a job can return nodes once in a run; then Slurm refuses changes of the job, and a requeue takes minutes"
        )
        advice = slurm_conf("AccountingStorageType=accounting_storage/slurmdbd")
        return Finding(Level.NOTE, "giving back", accounting, means, advice)
    return Finding(Level.OK, "giving back", accounting, "a running job can return nodes to Slurm")


def _preemption(facts: Facts, grace: timedelta, qos: str | None) -> Finding:
    kind, found = setting(facts, "PreemptType")
    if kind == "preempt/qos":
        where, preempted = _preempted_qos(facts, qos)
    else:
        mode, preempted = partition(facts, "PreemptMode"), None
        where, found = f"partition {partition(facts, 'PartitionName')}", f"{found}, PreemptMode = {mode}"
        if not is_none(kind) and mode != "OFF":
            preempted = mode, number(partition(facts, "GraceTime"), "GraceTime")
    if preempted is None:
        return Finding(Level.OK, "preemption", found, f"jobs in {where} are not preempted")
    mode, seconds = preempted
    warned = "preempt_send_user_signal" in config(facts, "SlurmctldParameters").lower()
    signal = "with" if warned else "without"
    found = f"{where}: PreemptMode = {mode}, GraceTime = {seconds} s, {signal} preempt_send_user_signal"
    if {"SUSPEND", "GANG"} & set(mode.split(",")):
        means = "a suspended job pauses with all its agents, and continues where it was when Slurm resumes it"
        return Finding(Level.OK, "preemption", found, means)
    then = "Slurm requeues the job" if mode == "REQUEUE" else "Slurm cancels the job, and the agents requeue it"
    if warned and seconds >= grace.total_seconds():
        means = f"the workers get a signal, and have {as_text(grace)} (--grace) to save; {then}"
        return Finding(Level.OK, "preemption", found, means)
    grace_time = f"GraceTime={as_text(grace)} in {where}"
    if warned:
        means = f"the workers get a signal, but have only {seconds} s to save, not {as_text(grace)} (--grace); {then}"
        advice = f"you: --grace {_grace(seconds)}; {slurm_conf(grace_time)}"
        return Finding(Level.WARN, "preemption", found, means, advice, {"grace": _grace(seconds)} if seconds else {})
    hurry = f", with --grace {_grace(seconds)}, so that the agents can requeue in time" if mode != "REQUEUE" else ""
    means = (
        "Slurm sends SIGTERM without a warning, also to the workers: workers that handle it have at most "
        f"{min(20, seconds or 20)} s to save, others end at once; {then}"
    )
    advice = f"you: save often{hurry}; {slurm_conf(f'SlurmctldParameters=preempt_send_user_signal, and {grace_time}')}"
    return Finding(Level.WARN, "preemption", found, means, advice)


def _preempted_qos(facts: Facts, qos: str | None) -> tuple[str, tuple[str, int] | None]:
    """The QOS of jobs, as a finding names it; and the mode and the grace time in seconds of its preemption, None if no
    other QOS preempts it. If jobs may have several QOS, one of those that are preempted.
    """
    own = limits.of_jobs(facts, qos)
    preempted = {name for row in facts.qos for name in row["Preempt"].split(",")}
    for row in own:
        if row["Name"] in preempted:
            mode = config(facts, "PreemptMode") if row["PreemptMode"] == "cluster" else row["PreemptMode"].upper()
            hours, minutes, seconds = (number(part, "GraceTime") for part in row["GraceTime"].split(":"))
            return f"QOS {row['Name']}", (mode, 3600 * hours + 60 * minutes + seconds)
    return f"QOS {', '.join(row['Name'] for row in own)}", None


def _grace(seconds: int) -> int:
    return max(1, seconds - _TO_REQUEUE)


def _arrays(facts: Facts) -> Finding:
    value, found = setting(facts, "MaxArraySize")
    if (size := number(value, "MaxArraySize")) > 1:
        return Finding(Level.OK, "job arrays", found, f"--array takes indices up to {size - 1}")
    means, advice = "Slurm has no job arrays here", "you: submit the jobs one by one, without --array"
    return Finding(Level.NOTE, "job arrays", found, means, advice)


def _accounting(facts: Facts) -> Finding:
    value, found = setting(facts, "AccountingStorageType")
    if value.endswith("slurmdbd"):
        return Finding(Level.OK, "accounting", found, "Slurm remembers jobs that have ended")
    age = config(facts, "MinJobAge")
    means = f"Slurm forgets a job {age} after its end; then only its run directory has the job's end"
    advice = "you: keep the run directories (--log-dir)"
    return Finding(Level.NOTE, "accounting", f"{found}, MinJobAge = {age}", means, advice)


def _private_data(facts: Facts) -> Finding:
    value, found = setting(facts, "PrivateData")
    hidden = set(value.replace(" ", "").split(","))
    if "nodes" in hidden:
        means = (
            "Slurm does not show users the states of nodes. A job avoids the nodes that failed under it, but does not "
            "know which others are down or drained, unless a notice or --health-dir says so. --yield-to has no effect"
        )
        advice = slurm_conf("PrivateData without nodes, so that jobs can see them")
        return Finding(Level.NOTE, "private data", found, means, advice)
    means = "your jobs see the states of nodes, which they need after a requeue"
    return Finding(Level.OK, "private data", found, means)


def _pyxis(facts: Facts) -> Finding:
    if "srun_help" in facts.unknown:
        raise Unknown(facts.unknown["srun_help"])
    if "--container-image" in facts.srun_help:
        return Finding(Level.OK, "pyxis", "srun has --container-image", "--container-image works with any image")
    means = "--container-image works only with apptainer, or with an OCI bundle if the site has an oci.conf"
    advice = "you: --container-runtime apptainer with an image IMAGE.sif"
    return Finding(Level.NOTE, "pyxis", "srun has no --container-image: the plugin is not loaded here", means, advice)


def _expedited_requeue(facts: Facts) -> Finding | None:
    """A finding only if the administrator has allowed it, so that users can use it."""
    if not has(facts, "SlurmctldParameters", "enable_expedited_requeue"):
        return None
    means = "elastic jobs requeue themselves; with --requeue=expedite, Slurm would requeue and hold a job that failed"
    advice = "you: leave out --requeue=expedite, which elastic-sbatch refuses"
    found = "SlurmctldParameters has enable_expedited_requeue"
    return Finding(Level.NOTE, "expedited requeue", found, means, advice)
