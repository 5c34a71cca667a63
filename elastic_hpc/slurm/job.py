"""What Slurm says about jobs and nodes; warns and ends a job."""

from __future__ import annotations

import contextlib
import re
from datetime import datetime
from typing import Literal

from elastic_hpc.errors import SlurmError
from elastic_hpc.options.sbatch import WarningSignal
from elastic_hpc.slurm import client
from elastic_hpc.slurm.states import LIVES, Queued, SlurmJob, words

_END_SECONDS = 5

# What scancel writes about jobs that have ended. The version and the number of jobs decide whether that is an error.
_ENDED = re.compile("already (completing|completed|finished)|Invalid job id specified", re.IGNORECASE)


def show_job(job: str) -> SlurmJob:
    """What Slurm says about ``job``, or ``JOB_TASK`` for an array task. Raises SlurmError if Slurm has forgotten it."""
    shown = client.scontrol("show", "job", job)
    ids, _, fields = shown.partition("\n   UserId=")  # the job's name may contain anything
    # The lines after the command may contain anything too: SubmitLine, which 26.05 shows, or a comment.
    fields, _, texts = fields.partition("\n   Command=")

    def field(name: str) -> str:
        return _value(re.search(rf"\s{name}=(\S*)", fields))

    def path(name: str) -> str:
        """The rest of the line that begins with ``name``."""
        return _value(re.search(rf"^   {name}=(.*?) *$", texts, re.MULTILINE))

    return SlurmJob(
        id=ids.partition(" ")[0].removeprefix("JobId="),
        state=field("JobState"),
        reason=field("Reason"),
        restarts=int(field("Restarts") or 0),
        may_requeue=field("Requeue") == "1",
        partitions=tuple(filter(None, field("Partition").split(","))),
        nodes=field("NodeList"),
        batch_host=field("BatchHost"),
        required=field("ReqNodeList"),
        excluded=field("ExcNodeList"),
        preempt_time=field("PreemptTime").removeprefix("None"),
        end_time=field("EndTime"),
        submit_time=field("SubmitTime"),
        start_time=field("StartTime").removeprefix("Unknown"),
        account=field("Account"),
        qos=field("QOS").removeprefix("N/A"),
        time_limit=field("TimeLimit"),
        run_time=field("RunTime"),
        exit_code=field("ExitCode"),
        output=path("StdOut"),
        error=path("StdErr"),
        folder=path("WorkDir"),
    )


def _value(found: re.Match[str] | None) -> str:
    return "" if found is None or found[1] == "(null)" else found[1]


def queue(*jobs: str) -> dict[str, Queued]:
    """What squeue says about ``jobs``, ``JOB`` or ``JOB_TASK``, if Slurm still knows them. Raises SlurmError."""
    if not jobs:
        return {}
    try:
        selection = ("--array", "--states=all", f"--jobs={','.join(jobs)}")
        answer = client.run("squeue", "--noheader", *selection, "--format=%i|%T|%e|%S|%r")
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    rows = (line.split("|", 4) for line in answer.splitlines() if line)
    return {id: Queued(state, epoch(end), reason, epoch(start)) for id, state, end, start, reason in rows}


def mine() -> list[str]:
    """The ids of this user's active jobs, tasks of arrays as JOB_TASK; of all clusters, if they answer. Raises
    SlurmError.
    """
    command = ("squeue", "--me", "--all", "--noheader", "--array", "--format=%i")  # --all: in hidden partitions too
    try:
        answer = client.run(*command, "--clusters=all")
    except SlurmError:
        config = client.scontrol("show", "config")
        if re.search(r"^AccountingStorageType\s*=\s*accounting_storage/slurmdbd", config, re.MULTILINE):
            raise
        answer = client.run(*command)  # without slurmdbd Slurm knows of no other cluster
    return re.findall(r"^\d+(?:_\d+)?$", answer, re.MULTILINE)


def comment(job: str) -> str:
    """The comment of ``job``; empty if it has none. Raises SlurmError."""
    shown = client.run("squeue", "--noheader", f"--jobs={job}", "--format=%k").strip()
    return "" if shown == "(null)" else shown


def write_comment(job: str, text: str) -> None:
    """Replace the comment of ``job``. Raises SlurmError, also if the site does not let users do that."""
    client.scontrol("update", f"JobId={job}", f"Comment={text}")


def recorded_end(job: str) -> str:
    """Slurm's word for the end of ``job``, or ``JOB_TASK`` for an array task: from slurmctld, which forgets a job
    minutes after its end (``MinJobAge``), or from the accounting, if the site has it. If the job is still active in
    slurmctld, the word for its state, for example COMPLETING. Empty if neither knows the job or answers within 5
    seconds.
    """
    squeue = ("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%T")
    sacct = ("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=State")
    for command in (squeue, sacct):
        with contextlib.suppress(SlurmError, TimeoutError):
            if words := client.answer(client.ask(*command), _END_SECONDS).strip().rpartition("\n")[2].split():
                return "" if command is sacct and words[0] in LIVES else words[0]  # CANCELLED by 1000
    return ""


def job_state(job: str, run: int | None = None) -> str:
    """Slurm's word for the state of ``job`` or, if it is COMPLETING, for what follows; see ``SlurmJob.becomes``."""
    return show_job(job).becomes(run)


def epoch(text: str) -> float | None:
    """A moment in Slurm's notation, 2026-11-25T08:00:00 in this machine's time zone, as seconds since the epoch; None
    for anything else: ``Unknown``, ``None``, nothing.
    """
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def warn(job: str) -> None:
    """Send the batch script of ``job`` its warning signal, as Slurm does before the time limit. Raises SlurmError."""
    client.run("scancel", "--batch", f"--signal={WarningSignal.name}", job)


def warning_reason(job: str) -> Literal["preempted", "time limit"]:
    """Why Slurm has warned ``job``; ``time limit`` also if Slurm does not answer."""
    try:
        return "preempted" if show_job(job).preempt_time else "time limit"
    except SlurmError:
        return "time limit"


def cancel(*jobs: str) -> None:
    """End ``jobs``, running or waiting. A job that has already ended is no error. Raises SlurmError."""
    if not jobs:
        return
    try:
        client.run("scancel", *jobs)
    except SlurmError as error:
        if not all(_ENDED.search(part) for part in str(error).split("; ")):
            raise


def expand(nodes: str) -> list[str]:
    """The names of ``nodes``, which is in Slurm's notation."""
    return client.scontrol("show", "hostnames", nodes).split() if nodes else []


def usable_nodes(job: str) -> tuple[frozenset[str], str]:
    """Names of the nodes that Slurm could give to ``job``, now or when other jobs have left them; and why Slurm did not
    show the states of nodes, empty if it did.

    The nodes are in one of the job's partitions and neither down nor drained. Other demands of the job are ignored.
    Nodes that the job excludes are included, because that may change. A site with PrivateData=nodes does not show the
    states to users, not even in sinfo: then the result has all nodes of the partitions. Raises SlurmError if Slurm
    shows nothing.
    """
    partitions = set(show_job(job).partitions)
    try:
        rows = client.records(client.scontrol("show", "node", "--oneliner"))
    except SlurmError as error:
        return _nodes_of(partitions), str(error)
    if not rows:
        return _nodes_of(partitions), "Slurm shows no node"
    # Not from sinfo: if a node was set DOWN under a job, 22.05 keeps listing it as mixed*.
    gone = {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "FUTURE", "UNKNOWN", "NOT_RESPONDING", "MAINT"}
    usable = frozenset(
        row["NodeName"]
        for row in rows
        if not partitions.isdisjoint(row.get("Partitions", "").split(","))
        and gone.isdisjoint(words(row.get("State", "UNKNOWN")))
    )
    return usable, ""


def _nodes_of(partitions: set[str]) -> frozenset[str]:
    rows = client.records(client.scontrol("show", "partition", "--oneliner", "--all"))
    nodes = [row.get("Nodes", "(null)") for row in rows if row.get("PartitionName") in partitions]
    return frozenset(expand(",".join(text for text in nodes if text != "(null)")))
