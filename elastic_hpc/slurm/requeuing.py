"""Sends a job back to the queue: to continue, or to end as its batch script would have ended.

Slurm lets a requeued job start two minutes after its completion, unless its start time is later than the completion
anyway. No process of the job lives that long, and an epilog may take any time. So the caller lives until the first
other node of the job has completed, and assumes that its own node will need the same time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Sequence
from datetime import timedelta

from elastic_hpc.errors import SlurmError
from elastic_hpc.slurm import client
from elastic_hpc.slurm.job import cancel, expand, show_job
from elastic_hpc.slurm.settings import has_epilog, version
from elastic_hpc.slurm.states import SlurmJob

# For 5 seconds slurmctld retries a change that it cannot make yet, and makes it even if the client is gone by then.
# A process of the job must not wait that long: the job does not complete while the process lives.
_CHANGE_SECONDS = 1

_WATCH_SECONDS = 25
"""Seconds during which the caller watches another node. After KillWait, 30 s by default, Slurm kills the caller."""

_POLL = 0.5

_MOMENT = 2.0
"""Seconds that a completion takes if nothing delays it."""

_SELDOM = timedelta(seconds=10)
"""From 10 seconds after SIGTERM, slurmd checks only this often whether the caller, whose job is terminated, has ended
(slurmd's ``_pause_for_job_completion``)."""

_EPILOG = timedelta(seconds=30)
"""Time that an epilog may take if there is no other node to watch."""


def requeue(
    job: str,
    *,
    start_after: timedelta,
    exclude: Collection[str] = (),
    readmit: Collection[str] = (),
    lost: Collection[str] = (),
    run: int | None = None,
    nodes: str = "",
) -> str | None:
    """Send ``job``, or ``JOB_TASK`` for an array task, back to the queue, to start after ``start_after``. ``nodes``:
    the new number of nodes to request, in Slurm's notation; empty to keep it.

    ``start_after`` is for a completion that nothing delays: the time that an epilog takes is added. The nodes that the
    job excludes gain ``exclude`` and lose ``readmit``. For ``lost`` nodes, other than the batch host, the completion
    does not wait until Slurm notices the loss too. With ``run``, the caller's SLURM_RESTART_COUNT, a requeue by another
    caller counts as this requeue.

    Every process of the job should end as soon as this returns, the caller included: if Slurm has taken a lost node
    from the job and has no slurmdbd, it accepts a start time only when the job has completed, and waits 5 seconds for
    that. If the batch host is lost, that takes longer: see ``steps.start_step``.

    Raises SlurmError if the job is not requeued. Returns what Slurm refused after that; None if it refused nothing.
    """
    before = show_job(job)
    is_mine = _requeue(job, before, run, lost)
    changes = [_start(start_after), *_excluding(before, exclude, readmit), *([[f"NumNodes={nodes}"]] if nodes else [])]
    refused = _change(job, changes)
    with contextlib.suppress(SlurmError):
        _outlast(job, before, start_after, lost, watch=is_mine)
    return refused


def release(job: str, lost: Collection[str]) -> None:
    """Take ``lost`` nodes, other than the batch host, from ``job``, which has ended, before the caller ends its srun:
    otherwise the job stays COMPLETING until Slurm notices their loss too. Raises SlurmError.
    """
    if lost and (shown := show_job(job)).state == "RUNNING":
        _release(shown, job, lost)


def give_back(job: str, nodes: Collection[str]) -> None:
    """Take ``nodes`` from the running ``job``, which runs nothing there any more. Raises SlurmError."""
    before = show_job(job)
    kept = [node for node in expand(before.nodes) if node not in nodes]
    if len(kept) < len(expand(before.nodes)):
        client.scontrol("update", f"JobId={job}", f"NodeList={','.join(kept)}")


def change_nodes(job: str, nodes: str) -> None:
    """Make the waiting ``job`` request ``nodes``, a number in Slurm's notation. Raises SlurmError."""
    client.scontrol("update", f"JobId={job}", f"NumNodes={nodes}")


def complete(job: str, *, start_after: timedelta, exclude: Collection[str] = (), run: int | None = None) -> str | None:
    """End ``job``, whose batch script is gone, as that script would have ended it: COMPLETED, or FAILED.

    The job runs once more, on any one node, where the batch script must find the verdict and exit at once. ``requeue``
    describes what the caller must do after this. A job that may not be requeued is cancelled, so that it does not hold
    its nodes until the time limit, and SlurmError reports that.
    """
    before = show_job(job)
    try:
        is_mine = _requeue(job, before, run)
    except SlurmError as error:
        cancel(job)
        raise SlurmError(f"{error}; cancelled it instead") from None
    least = [["NumNodes=1"], ["TimeLimit=1"]]  # the time limit for backfill
    if before.required:
        least.append(["ReqNodeList="])
    refused = _change(job, [*_excluding(before, exclude, ()), *least, _start(start_after)])
    with contextlib.suppress(SlurmError):
        _outlast(job, before, start_after, watch=is_mine)
    return refused


def keeps_preemption(job: str) -> bool:
    """Whether ``job`` is preempted, is in its grace time, and will still count as preempted in its next run.

    That happens since Slurm 24.05 if the job requeues itself: at the end of the next run Slurm requeues the job once
    more. False if Slurm does not answer.
    """
    try:
        return version(client.scontrol("--version")) >= (24, 5) and bool(show_job(job).preempt_time)
    except SlurmError:
        return False


def _outlast(job: str, before: SlurmJob, start_after: timedelta, lost: Collection[str] = (), *, watch: bool) -> None:
    """Delay the start of ``job`` by the time that its completion takes, if that is longer than a moment. Only one
    caller may ``watch``: two callers would wait for each other's nodes.
    """
    nodes = set(expand(before.nodes)).difference(lost, {before.batch_host, os.environ.get("SLURMD_NODENAME", "")})
    if not (watch and nodes):
        if has_epilog():
            _change(job, [_start(start_after + _EPILOG)])
        return
    begin, put_off = time.monotonic(), 0.0
    while (elapsed := time.monotonic() - begin) < _WATCH_SECONDS:
        shown = show_job(job)
        if shown.state != "COMPLETING" or not nodes <= set(expand(shown.nodes)):
            break
        if elapsed > put_off + _MOMENT:  # in time, even if the caller is killed now
            put_off = elapsed
            _change(job, [_start(start_after + timedelta(seconds=put_off))])
        time.sleep(_POLL)
    if put_off:
        _change(job, [_start(start_after + timedelta(seconds=elapsed) + _SELDOM)])


def _requeue(job: str, before: SlurmJob, run: int | None, lost: Collection[str] = ()) -> bool:
    """Requeue ``job`` unless it is requeued already. Never brings a cancelled job back. Returns whether this call has
    requeued the job.
    """
    becomes = before.becomes(run)
    if becomes == "REQUEUED":
        return False
    if not before.may_requeue:
        raise SlurmError(f"job {job} may not be requeued: --no-requeue, JobRequeue=0 of the site, or an administrator")
    if becomes in {"TIMEOUT", "PREEMPTED"}:
        client.scontrol("requeue", job)
        return True
    if before.state == "COMPLETING":
        raise SlurmError(f"job {job} is {becomes}: not requeued")
    _release(before, job, lost)
    client.scontrol("requeue", "incomplete", job)  # does nothing, silently, if the job was cancelled a moment ago
    if show_job(job).restarts == before.restarts:
        raise SlurmError(f"job {job} ended before it could be requeued")
    return True


def _release(before: SlurmJob, job: str, lost: Collection[str]) -> None:
    """Take ``lost`` nodes from the running job.

    Call this only right before a requeue, which ends srun: Slurm does not notify srun, which would wait forever for the
    tasks on these nodes.
    """
    kept = [node for node in expand(before.nodes) if node not in lost]
    if lost and before.batch_host in kept:
        with contextlib.suppress(SlurmError):  # Slurm has noticed the loss; at worst, the requeue takes longer
            client.scontrol("update", f"JobId={job}", f"NodeList={','.join(kept)}")


def _start(after: timedelta) -> list[str]:
    return [f"StartTime=now+{after.total_seconds():.0f}"]


def _excluding(before: SlurmJob, exclude: Collection[str], readmit: Collection[str]) -> list[list[str]]:
    """The change of ExcNodeList, if any: an update replaces the list."""
    exclude = set(exclude) - set(expand(before.required))  # else the job would never start
    if not exclude and not readmit:
        return []
    nodes = set(expand(before.excluded)) - set(readmit) | exclude
    return [[f"ExcNodeList={','.join(sorted(nodes))}"]]


def _change(job: str, changes: Sequence[Sequence[str]]) -> str | None:
    """Make ``changes`` independently of each other. Returns Slurm's refusals so far; None if there are none."""
    updates = [client.ask("scontrol", "update", f"JobId={job}", *change) for change in changes]
    end = time.monotonic() + _CHANGE_SECONDS
    refused = []
    for process in updates:
        try:
            client.answer(process, max(0.0, end - time.monotonic()))
        except TimeoutError:
            continue  # slurmctld keeps trying
        except SlurmError as error:
            refused.append(str(error))
    return "; ".join(refused) or None
