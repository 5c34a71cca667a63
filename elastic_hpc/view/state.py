"""Which state a job is in, from its record and from what Slurm says. Pure.

Slurm's answer on whether a job runs overrides the record: if no agent was left at the end, the record has no end.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from elastic_hpc.slurm.states import LIVES, WAITS, Queued, SlurmJob
from elastic_hpc.view.story import Story
from elastic_hpc.view.times import clock, span

_SILENT = 30.0
"""Seconds without a leader's sign of life after which a running job counts as having no leader."""


_LIVING = {
    "CONFIGURING": "Slurm prepares its nodes: they boot, or the site's prolog runs there",
    "COMPLETING": "Slurm waits for its nodes: their processes end, or the site's epilog runs there, or a node is lost",
}
"""The meaning of the states of an active job that does not train."""


@dataclass(frozen=True)
class Observed:
    """What was observed about one job, besides its events."""

    id: str
    slurm_id: str
    """``id``, or the id of the job that continues in its place."""
    run_dir: str
    script: str
    """Empty if the job has not started yet."""
    verdict: Mapping[str, Any] | None = None
    """How the last run ended, according to the record."""
    leader_run: int = 0
    """The last run that had a leader."""
    resumed: bool = False
    """Whether another Slurm job, ``slurm_id``, will continue after that run, and no agent has led that job yet."""
    launcher_runs: bool | None = None
    """Whether the job's launcher on this machine runs; None for a job of Slurm."""
    queued: Queued | None = None
    """What squeue says; None if Slurm does not know the job."""
    problem: str = ""
    """Why Slurm did not answer; empty if it answered, or if there was nothing to ask."""
    silent: float | None = None
    """Seconds since a leader's last sign of life; None if there was none."""
    ended: SlurmJob | None = None
    """What Slurm says about a job that ended before an agent led it; None if it was not asked."""
    output: tuple[str, ...] = ()
    """The last lines that the batch script of such a job wrote."""
    recorded_end: str = ""
    """Slurm's word for the end of a job of ``elastic-sbatch`` or, if it has ended only according to its record, for its
    state; empty if Slurm does not know the job any more, or was not asked.
    """
    missing_folder: str = ""
    """A folder into which the batch script should write, and which does not exist."""

    @property
    def final(self) -> str | None:
        """Slurm's word for the end of the job, according to the record; None if the record has no end."""
        if self.verdict is None or self.verdict["outcome"] == "requeue" or self.leader_run > self.verdict["run"]:
            return None
        if self.resumed:
            return None
        failed = "CANCELLED" if self.verdict["cause"] == "user" else "FAILED"
        return "COMPLETED" if self.verdict["outcome"] == "finished" else failed


class State(NamedTuple):
    word: str
    """Slurm's word, or UNKNOWN."""
    note: str = ""
    advice: tuple[str, ...] = ()


def state_of(job: Observed, story: Story) -> State:
    """The state of ``job``, the reason, and what its user may do about it."""
    reason, queued = last_reason(job, story), job.queued
    if job.final:
        return State(job.final, "\n".join(filter(None, (reason, _disagreement(job)))))
    if job.launcher_runs:
        return State("RUNNING", _leadership(job, story))
    if job.launcher_runs is False:
        return State("FAILED", reason or "its launcher ended without a verdict")
    if job.problem:
        leader = "the record shows no leader" if job.silent is None else f"a leader was active {span(job.silent)} ago"
        return State("UNKNOWN", f"{job.problem}; {leader}")
    if queued is None:
        return _forgotten(job, story, reason)
    if queued.state in WAITS:
        note = queued.reason + _since(job, reason)
        return State(queued.state, note, _to_start(job, queued.reason))
    if queued.state in LIVES:
        return State(queued.state, _LIVING.get(queued.state, "") or _leadership(job, story))
    if not story.runs or job.resumed:
        return _never_led(job, queued)
    note = f"Slurm ended it after a requeue: {reason}" if reason else "Slurm ended it; its record has no end"
    return State(queued.state, note)


_RECORDED = {
    "TIMEOUT": "as the batch script had not ended at the time limit, or at the end of a preemption's grace time",
    "PREEMPTED": "as the job had been preempted: Slurm 24.05 and newer say so whatever the job did after that",
    "NODE_FAIL": "as one of the job's nodes was lost",
    "OUT_OF_MEMORY": "as a process of the batch script, not a worker, ran out of memory",
    "CANCELLED": "as the job was cancelled before its batch script had ended",
    "FAILED": "as the batch script ended with an exit code other than 0",
}
"""Why Slurm may have another word for the end of a job whose training has finished."""


def _disagreement(job: Observed) -> str:
    """Slurm's record, if it has a failure after the training finished, or the reverse, or an active job; else empty."""
    finished, recorded = job.final == "COMPLETED", job.recorded_end
    if recorded in LIVES:
        ends = "it starts again, and ends at once" if recorded in WAITS else "its batch script has not ended"
        return f"Slurm still says {recorded}: {_LIVING.get(recorded, ends)}"
    if not recorded or finished == (recorded == "COMPLETED"):
        return ""
    if not finished:
        return (
            "Slurm recorded COMPLETED, as the batch script ended with exit code 0: jobs that wait for this one with "
            "--dependency=afterok start all the same"
        )
    why = f", {_RECORDED[recorded]}" if recorded in _RECORDED else ""
    return (
        f"the training finished, but Slurm recorded {recorded}{why}: jobs that wait for this one with "
        "--dependency=afterok never start; submit them again, without the dependency"
    )


def _since(job: Observed, reason: str) -> str:
    """Why a job that has run before waits; empty for any other job."""
    if job.resumed and not (job.verdict and job.verdict["outcome"] == "requeue"):
        return f"; it was resumed as Slurm job {job.slurm_id}" + (f", and had ended before: {reason}" if reason else "")
    return f"; it was requeued: {reason}" if reason else ""


def last_reason(job: Observed, story: Story) -> str:
    """Why the last run ended; empty while the first run lasts."""
    return str(job.verdict["reason"]) if job.verdict else story.runs[-1].reason if story.runs else ""


def _leadership(job: Observed, story: Story) -> str:
    """A note on a running job that has no leader or no world, or does not get further nodes; else empty."""
    if job.silent is None or job.silent > _SILENT:
        if not story.runs or story.runs[-1].ended is not None:  # a leader of the previous run does not count
            return "it is starting: no agent has started on its first node yet"
        return "it has no leader yet" if job.silent is None else f"it has had no leader for {span(job.silent)}"
    if story.current:
        return f"no further nodes: {story.not_growing}" if story.not_growing else ""
    if not story.waiting:
        return "the world is being formed"
    return f"waiting since {clock(story.waiting_since)}: {story.waiting}"


def _forgotten(job: Observed, story: Story, reason: str) -> State:
    """Slurm's controller does not know the job, whose record has no end."""
    if job.recorded_end and job.recorded_end not in LIVES:
        before = f"; it was requeued before: {reason}" if reason else ""
        return State(job.recorded_end, f"according to Slurm's accounting; its record has no end{before}")
    if job.resumed:
        note = f"it was to continue as Slurm job {job.slurm_id}, which Slurm no longer knows"
    elif not story.runs:
        note = "Slurm does not know the job, and no agent led it: it was cancelled, it failed, or is on another cluster"
    elif story.runs[-1].outcome == "requeue":
        note = f"it was requeued ({reason}), and Slurm no longer knows it: it was cancelled in the queue"
    else:
        note = "Slurm no longer knows the job, and its record has no end"
    return State("UNKNOWN", note, (f"see what Slurm's accounting says, if the site has it: sacct -j {job.slurm_id}",))


def _to_start(job: Observed, reason: str) -> tuple[str, ...]:
    """What to do about a job that waits for ``reason``, and will not start without an action of the user."""
    if reason == "DependencyNeverSatisfied":
        return (f"it will never start: elastic-hpc stop {job.id}, and submit it again with another --dependency",)
    if "held" in reason.lower():
        who = "ask your administrator, or" if reason == "JobHeldAdmin" else "release the job when the cause is fixed:"
        return (f"{who} scontrol release {job.slurm_id}",)
    return ()


def _never_led(job: Observed, queued: Queued) -> State:
    """Slurm ended the job before an agent led it."""
    ended, word = job.ended, queued.state
    if ended is None:
        note = f"it ended before an agent led it{_slurm_says(queued.reason)}"
        return State(word, note, (f"see what Slurm says: scontrol show job {job.slurm_id}",))
    if not ended.batch_host:
        how = "was cancelled" if word == "CANCELLED" else "ended"
        return State(word, f"it {how} while it waited in the queue{_slurm_says(ended.reason)}")
    cause = _slurm_says(ended.reason, f"exit code {ended.exit_code}")
    if job.missing_folder:
        note = f"its batch script never ran: the folder of its output does not exist: {job.missing_folder}{cause}"
        return State(word, note, (f"make it, then submit again: mkdir -p {shlex.quote(job.missing_folder)}",))
    if ended.reason == "JobLaunchFailure":
        note = f"its batch script never ran: {ended.batch_host} could not start it{cause}"
        advice = f"submit the job again with --exclude {ended.batch_host}, and report that node to your administrator"
        return State(word, note, (advice,))
    return State(word, f"it ended before an agent led it{cause}", (f"see what its batch script wrote: {ended.output}",))


def _slurm_says(reason: str, *more: str) -> str:
    said = [*([] if reason == "None" else [f"Slurm: {reason}"]), *more]
    return f" ({', '.join(said)})" if said else ""
