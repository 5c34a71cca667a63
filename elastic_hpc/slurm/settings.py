"""What the site has set."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import timedelta

from elastic_hpc.errors import SlurmError
from elastic_hpc.slurm import client

_SITE_SECONDS = 2  # for what is only nice to know before a submission


@dataclass(frozen=True)
class Site:
    """What the site decides about the end of jobs in a partition."""

    kill_wait: timedelta
    """From SIGTERM to SIGKILL, at the time limit and at scancel."""
    grace_time: timedelta
    """What a preempted job is given; zero for nothing."""
    over_time_limit: timedelta | None
    """What a job may run over its time limit; None for as long as it likes."""
    slurmd_timeout: timedelta
    """Silence after which a node is given up."""
    job_requeue: bool
    """Whether jobs may be requeued unless they say otherwise; ``--requeue`` of sbatch wins over it."""
    preempt_mode: str
    """OFF, CANCEL, REQUEUE, SUSPEND, ..."""
    warns_before_preemption: bool
    """Whether a preempted job gets the signal of ``--signal`` (``preempt_send_user_signal``)."""


def site(partition: str | None) -> Site:
    """Ask for the settings that hold in ``partition``, or the default one; of several, A,B, those of the first.

    Raises SlurmError if there is no such partition or no quick answer.
    """
    asked = [client.ask("scontrol", "show", "config"), client.ask("scontrol", "show", "partition", "--oneliner")]
    end = time.monotonic() + _SITE_SECONDS
    try:
        config, partitions = [client.answer(process, max(0.0, end - time.monotonic())) for process in asked]
    except TimeoutError:
        raise SlurmError(f"scontrol show config: no answer in {_SITE_SECONDS} s") from None
    finally:
        for process in asked:
            client.end(process)
    return _site(config, partitions, partition and partition.partition(",")[0])


def _site(config: str, partitions: str, name: str | None) -> Site:
    settings = dict(re.findall(r"^(\w+) *= (.*?) *$", config, re.MULTILINE))
    rows = client.records(partitions)
    rows = [row for row in rows if (row.get("PartitionName") == name if name else row.get("Default") == "YES")]
    if not rows:
        raise SlurmError(f"partition {name!r}: unknown to Slurm" if name else "no default partition")
    row = rows[0]
    try:
        over = settings["OverTimeLimit"] if row["OverTimeLimit"] == "NONE" else row["OverTimeLimit"]
        return Site(
            kill_wait=timedelta(seconds=_number(settings["KillWait"])),
            grace_time=timedelta(seconds=_number(row["GraceTime"])),
            over_time_limit=None if over.startswith("UNLIMITED") else timedelta(minutes=_number(over)),
            slurmd_timeout=timedelta(seconds=_number(settings["SlurmdTimeout"])),
            job_requeue=settings["JobRequeue"] == "1",
            preempt_mode="OFF" if settings["PreemptType"].endswith("none") else row["PreemptMode"],
            warns_before_preemption="preempt_send_user_signal" in settings["SlurmctldParameters"].lower(),
        )
    except (KeyError, ValueError) as error:
        raise SlurmError(f"scontrol show config: expected {error}") from None


def _number(text: str) -> int:
    return int(re.sub(r"\D.*", "", text))  # "30 sec"
