"""Slurm's settings at this site."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from elastic_hpc.errors import SlurmError
from elastic_hpc.slurm import client

_SITE_SECONDS = 2  # before a submission, which continues without the answers
_FACTS_SECONDS = 15  # for a command that is about the answers
_CONFIG = ("scontrol", "show", "config")
_PARTITIONS = ("scontrol", "show", "partition", "--oneliner")
_SRUN = ("srun", "--help")
_ASSOCIATION = ("Cluster", "Account", "MaxJobs", "DefaultQOS")
_QOS = ("Name", "MaxJobsPerUser", "Preempt", "PreemptMode", "GraceTime")


@dataclass(frozen=True)
class Site:
    """The site's settings for the end of jobs in a partition."""

    kill_wait: timedelta
    """From SIGTERM to SIGKILL, at the time limit and at scancel."""
    grace_time: timedelta
    """Time from the preemption of a job until Slurm kills it; zero for none."""
    job_requeue: bool
    """Whether jobs may be requeued by default; ``--requeue`` of sbatch overrides this."""
    preempt_mode: str
    """OFF, CANCEL, REQUEUE, SUSPEND, ..."""
    warns_before_preemption: bool
    """Whether a preempted job gets the signal of ``--signal`` (``preempt_send_user_signal``)."""


@dataclass(frozen=True)
class Facts:
    """What Slurm says about itself and one partition, by Slurm's names and in its own words."""

    config: Mapping[str, str] = field(default_factory=dict)
    partition: Mapping[str, str] = field(default_factory=dict)
    srun_help: str = ""
    """The output of ``srun --help``, with the options of the loaded plugins."""
    associations: Sequence[Mapping[str, str]] = ()
    """The user's associations, by sacctmgr's names; a value that is not set is empty."""
    qos: Sequence[Mapping[str, str]] = ()
    """All QOS, in the same way."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """The fields above for which Slurm did not answer, and why."""

    @property
    def answered(self) -> bool:
        """Whether Slurm answers."""
        return not {"config", "partition"} <= self.unknown.keys()


def site(partition: str | None) -> Site:
    """The settings of ``partition``: None means the default partition; of several, A,B, the first counts.

    Raises SlurmError if there is no such partition or no quick answer.
    """
    config, partitions = map(_raised, client.answers(_SITE_SECONDS, _CONFIG, _PARTITIONS))
    return _site(_settings(config), _row(partitions, partition))


def has_epilog() -> bool:
    """Whether a program runs when a job ends, on its nodes or beside slurmctld. Raises SlurmError."""
    settings = _settings(client.run(*_CONFIG))
    return not all(is_none(settings.get(name, "")) for name in ("Epilog", "EpilogSlurmctld"))


def lets_shrink() -> bool:
    """Whether a user may give nodes of a running job back. Raises SlurmError."""
    return "disable_job_shrink" not in _settings(client.run(*_CONFIG)).get("SchedulerParameters", "").lower()


def notices_within(seconds: float) -> bool:
    """Whether Slurm notices the loss of a node within ``seconds`` (``SlurmdTimeout``). Raises SlurmError."""
    settings = _settings(client.run(*_CONFIG))
    try:
        return 0 < _number(settings["SlurmdTimeout"]) <= seconds  # 0: never
    except (KeyError, ValueError) as error:
        raise SlurmError(f"scontrol show config: expected {error}") from None


def facts(partition: str | None) -> Facts:
    """Everything that Slurm answers without a job; ``partition``: as for ``site``."""
    found: dict[str, str] = {}
    unknown: dict[str, str] = {}
    commands = {"config": _CONFIG, "partition": _PARTITIONS, "srun_help": _SRUN}
    commands |= {"associations": _shown("associations", _ASSOCIATION, f"users={_user()}"), "qos": _shown("qos", _QOS)}
    for name, answer in zip(commands, client.answers(_FACTS_SECONDS, *commands.values()), strict=True):
        if isinstance(answer, SlurmError):
            unknown[name] = str(answer)
        else:
            found[name] = answer
    row: Mapping[str, str] = {}
    if "partition" in found:
        try:
            row = _row(found["partition"], partition)
        except SlurmError as error:
            unknown["partition"] = str(error)
    associations, qos = (
        [dict(zip(names, line.split("|"), strict=False)) for line in found.get(what, "").splitlines()]
        for what, names in (("associations", _ASSOCIATION), ("qos", _QOS))
    )
    return Facts(_settings(found.get("config", "")), row, found.get("srun_help", ""), associations, qos, unknown)


def _shown(what: str, names: Sequence[str], *which: str) -> tuple[str, ...]:
    command = ("sacctmgr", "--noheader", "--parsable2", "--readonly", "show", what)
    return (*command, *which, f"format={','.join(names)}")


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container without the site's users
        return str(os.getuid())


def _raised(answer: str | SlurmError) -> str:
    if isinstance(answer, SlurmError):
        raise answer
    return answer


_PROGRAMS = ("Prolog", "PrologSlurmctld", "Epilog", "EpilogSlurmctld")


def version(text: str) -> tuple[int, int]:
    """The first two numbers of Slurm's version in ``text``; zeros if there is no version."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _settings(config: str) -> dict[str, str]:
    """The settings in ``config`` as older versions show them: newer versions show a list as Prolog[0], Prolog[1], ...,
    and no empty list.
    """
    found = dict.fromkeys(_PROGRAMS, "(null)") if config else {}
    for name, index, value in re.findall(r"^(\w+)(?:\[(\d+)\])? *= ?(.*?) *$", config, re.MULTILINE):
        found[name] = f"{found[name]},{value}" if index and index != "0" else value
    return found


def is_none(setting: str) -> bool:
    """Whether ``setting`` names no plugin or program: ``preempt/none``; newer versions print ``(null)`` for both."""
    return setting in {"", "none", "(null)"} or setting.endswith("/none")


def _row(partitions: str, names: str | None) -> dict[str, str]:
    name = names and names.partition(",")[0]
    rows = client.records(partitions)
    for row in rows:
        if row.get("PartitionName") == name if name else row.get("Default") == "YES":
            return row
    raise SlurmError(f"partition {name!r}: unknown to Slurm" if name else "no default partition")


def _site(settings: Mapping[str, str], row: Mapping[str, str]) -> Site:
    try:
        return Site(
            kill_wait=timedelta(seconds=_number(settings["KillWait"])),
            grace_time=timedelta(seconds=_number(row["GraceTime"])),
            job_requeue=settings["JobRequeue"] == "1",
            preempt_mode="OFF" if is_none(settings["PreemptType"]) else row["PreemptMode"],
            warns_before_preemption="preempt_send_user_signal" in settings["SlurmctldParameters"].lower(),
        )
    except (KeyError, ValueError) as error:
        raise SlurmError(f"scontrol show config: expected {error}") from None


def _number(text: str) -> int:
    return int(re.sub(r"\D.*", "", text))  # "30 sec"
