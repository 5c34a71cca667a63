"""A job from Python: submit it, get its state, wait for it, read its logs, stop it. The handle reads the run directory,
and asks Slurm only for what is not there, so it works even when Slurm has forgotten the job.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from elastic_hpc import slurm
from elastic_hpc.errors import ElasticError, SlurmError, UsageError
from elastic_hpc.job.look import Jobs, Look, recorded
from elastic_hpc.job.lookup import expand, find
from elastic_hpc.job.notices import notify
from elastic_hpc.job.spec import JobSpec
from elastic_hpc.job.submission import prepared
from elastic_hpc.record.folders import is_there
from elastic_hpc.record.registry import itself, remember
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.record.worker_logs import Logs, Stream, Wanted
from elastic_hpc.view.job import JobView

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from elastic_hpc.job.typed import JobOptions

_LOOK_INTERVAL = 0.5
_SLURM_INTERVALS = 2.0, 30.0
"""Seconds between two queries of Slurm, at first and after a while."""

_SILENT = slurm.WAITS | {"COMPLETING", "SUSPENDED", "STOPPED"}
"""States of an active job without a leader that answers."""

Stopped = Literal["cancelled", "told", "over"]
"""What ``Job.stop`` has done. ``cancelled``: Slurm cancelled the job, which was pending or had no leader. ``told``: the
leader received the request to stop. ``over``: nothing, because the job had already ended."""


@dataclass(frozen=True)
class JobStatus:
    """The state of a job at one moment."""

    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ...; UNKNOWN if neither the run directory nor Slurm
    knows."""
    done: bool
    """Whether the job will not run again."""
    round: int
    """Number of the round that trains or trained last; 0 before the first."""
    nodes: tuple[str, ...]
    """The nodes of that round, in rank order."""
    world_size: int
    restarts: int
    requeues: int
    reason: str
    """Why the last run ended, in a sentence; empty during the first run."""
    failure: Mapping[str, Any] | None
    """The first failure of a job that failed: ``kind``, ``node``, ``rank``, ``exit_code``, ``message``, ``traceback``
    and so on."""

    @classmethod
    def of(cls, view: JobView) -> JobStatus:
        return cls(
            state=view.state,
            done=view.over,
            round=view.round,
            nodes=view.nodes,
            world_size=view.world_size,
            restarts=view.restarts,
            requeues=view.requeues,
            reason=view.reason,
            failure=view.failure,
        )


class JobFailed(ElasticError):
    """The job has ended without completing. ``status`` says how it ended."""

    def __init__(self, job: Job, status: JobStatus) -> None:
        traceback = str((status.failure or {}).get("traceback") or "").rstrip()
        super().__init__(
            f"job {job.id} has not completed, it is {status.state}: {status.reason or 'no reason is on record'}"
            + (f"\n{traceback}" if traceback else "")
        )
        self.status = status


class Job:
    """A submitted job, or a task of an array. Only the methods ask Slurm. Two handles are equal if they have the same
    run directory.

    ``run_dir`` contains the record of the job, which only its owner can read: docs/how-it-works.md describes the files.
    """

    def __init__(self, job: int | str | os.PathLike[str], *, is_array: bool = False) -> None:
        """An existing job, by its id, as in the commands, or by the path of its run directory, which has a ``/``:
        ``Job(4711)``, ``Job("elastic-logs/4711")``. Raises UsageError if no job or several jobs have that id.
        """
        given: Any = str(int(job)) if isinstance(job, Integral) else job
        if not isinstance(given, (str, os.PathLike)):
            raise UsageError(f"job {job!r}: expected its job ID, or its run directory, for example Job(4711)")
        is_id = isinstance(given, str) and "/" not in given
        self.run_dir = find(str(given).strip()) if is_id else itself(Path(os.path.abspath(given)))
        self.id = self.run_dir.name
        """The id that ``sbatch`` printed; ``ARRAY_TASK`` for a task of an array."""
        self._is_array = is_array
        self._record = RunDir(self.run_dir)
        self._jobs = Jobs([self._record])

    def __repr__(self) -> str:
        return f"Job({str(self.run_dir)!r})"

    def __eq__(self, other: object) -> bool:
        return self.run_dir == other.run_dir if isinstance(other, Job) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.run_dir)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from elastic_hpc.view.status import html_card, html_table

        try:
            return html_card(self._look().view)
        except ElasticError as error:
            return html_table({"job": self.id, "": str(error)})

    def _has_tasks(self) -> bool:
        """Whether the job is an array: submitted as an array, or with tasks that have started."""
        return self._is_array or expand(self.run_dir) != [self.run_dir]

    def task(self, index: int) -> Job:
        """One task of a job array, which is an elastic job of its own."""
        return Job(self.run_dir.with_name(f"{self.id}_{index}"))

    def status(self) -> JobStatus:
        """The current state of the job. Raises SlurmError if only Slurm knows the state, and Slurm does not answer."""
        view = self._look().view
        if self._jobs.problem:
            raise SlurmError(self._jobs.problem)
        return JobStatus.of(view)

    def wait(self, timeout: float | timedelta | None = None, *, check: bool = False) -> JobStatus:
        """Wait until the job has completed, failed or been cancelled. The wait continues over requeues, and while Slurm
        does not answer. Ctrl-C ends the wait, not the job.

        ``timeout``: seconds or a timedelta, after which TimeoutError is raised; the job continues. ``check``: raise
        JobFailed unless the job has completed.
        """
        timeout = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        begin = time.monotonic()
        for view in self._watch():
            if view.over:
                status = JobStatus.of(view)
                if check and status.state != "COMPLETED":
                    raise JobFailed(self, status)
                return status
            if timeout is not None and time.monotonic() - begin > timeout:
                break
        raise TimeoutError(f"job {self.id} has not ended in {timeout:g} s; the job continues")

    def _watch(self) -> Iterator[JobView]:
        """Yields the job at one moment after another. Asks Slurm less and less often."""
        begin = time.monotonic()
        while True:
            least, most = _SLURM_INTERVALS
            yield self._look(min(most, max(least, (time.monotonic() - begin) / 4))).view
            time.sleep(_LOOK_INTERVAL)

    def _look(self, query_interval: float = 0.0, *, ends: bool = False) -> Look:
        if self._has_tasks():
            raise UsageError(f"job {self.id} is an array; expected one of its tasks, for example job.task(0)")
        return self._jobs.look(query_interval, ends=ends)[0]

    def logs(self, rank: int = 0, stream: Stream = "out", *, follow: bool = False) -> Iterator[str]:
        """The lines that the worker of this rank has written, round after round. ``follow``: also yield new lines as
        they are written, until the job has ended.
        """
        if stream not in get_args(Stream):
            raise UsageError(f"stream {stream!r}: expected 'out' or 'err'")
        logs = Logs(self.run_dir / "logs", Wanted(ranks=(rank,), streams=(stream,)))
        for view in self._watch() if follow else [None]:
            yield from (line.written for line in logs.added())
            if view is None or view.over:
                break
        yield from (line.written for line in logs.rest())

    def events(self) -> list[dict[str, Any]]:
        """The events that the leaders recorded: ``time`` in seconds since the epoch, ``event``, and more fields."""
        return self._record.events()

    def why(self) -> str:
        """What happened to the job, why, and what to do: the text that ``elastic-hpc why`` prints."""
        return why(self._look(ends=True))

    def drain(self, reason: str = "user") -> None:
        """Request that the job saves, stops and requeues itself. ``reason``: ``user`` or, to rehearse such an event,
        ``time limit`` or ``preempted``. Raises ElasticError if the job's leader cannot be reached, for example because
        the job is pending or has ended.
        """
        final = self.final_state()
        try:
            if not final:
                self._request("drain", reason)
                return
        except ElasticError as error:
            view = self._look().view
            if view.state in slurm.WAITS:
                raise ElasticError(f"job {self.id} waits in the queue ({view.note}): nothing runs there yet") from error
            if not view.over:
                raise
            final = view.state
        raise ElasticError(f"job {self.id} has ended, {final}: there is nothing to drain")

    def resize(self, nodes: str | int) -> str:
        """Change MIN and MAX of the job, as for ``--nodes``: ``"2:6"``, ``"4,6,8"`` or 4. The new bounds persist over
        requeues. Nodes beyond MAX leave at a step boundary and return to Slurm; more nodes come only with ``grow``, or
        with the next requeue. Returns what happens next, in a sentence.

        Raises UsageError for impossible bounds, and ElasticError if the job has ended, or its leader cannot be reached
        or refuses.
        """
        from elastic_hpc.job import resizing

        look = self._not_over("resized")
        sizes = resizing.sizes_of(str(nodes), self._record, look)
        if look.view.state in slurm.WAITS:
            return resizing.resize_waiting(str(nodes), sizes, self._record, look, self.slurm_id)
        return self._asked(lambda: resizing.resize(sizes, self._record, look))

    def release(self, *nodes: str) -> str:
        """Return these nodes to Slurm at a step boundary. This run of the job avoids them. Returns what happens next.
        Raises the same errors as ``resize``.
        """
        from elastic_hpc.job import resizing

        look = self._not_over("released")
        return self._asked(lambda: resizing.release(nodes, self._record, look))

    def _asked(self, ask: Callable[[], str]) -> str:
        """The answer of the leader. Raises ElasticError, which names the state if the job has no leader in it."""
        try:
            return ask()
        except ElasticError as error:
            state = self._look().view.state
            if state not in _SILENT:
                raise
            why = f"job {self.id} is {state}, and has no agent that could answer: try again when the job runs"
            raise ElasticError(why) from error

    def _not_over(self, what: str) -> Look:
        look = self._look()
        if look.view.over:
            raise ElasticError(f"job {self.id} has ended, {look.view.state}: it has no nodes that could be {what}")
        return look

    def notice(self, node: str, reason: str | None) -> None:
        """Announce that ``node`` is about to fail, and why: the job continues without the node from the next step, if
        MIN nodes remain, and avoids the node for a day. ``reason`` None withdraws the notice.

        Raises UsageError for a node that the job never had, or without a notice to withdraw, and ElasticError if the
        job has ended or its run directory cannot be written.
        """
        if final := self.final_state():
            raise ElasticError(f"job {self.id} has ended, {final}: it has no nodes")
        notify(self._record, node, reason)

    def resume(self, *script: object, **options: Unpack[JobOptions]) -> str:
        """Continue a job that failed, timed out or was cancelled, in its run directory, with the record, counters
        and checkpoints there. ``script``: a new script and its arguments, if they change; ``options``: as for
        ``JobSpec.of``, they override the options of the job's submission. Returns the id of the new Slurm job, in which
        it continues.

        Raises UsageError if the job has not ended, has completed and gets no new ``script``, or belongs to another
        user, or if the options do not fit, and SlurmError if Slurm does not answer.
        """
        from elastic_hpc.job import resume

        return resume.from_python(self.run_dir, script, options)

    def stop(self, *, after_checkpoint: bool = False) -> Stopped:
        """End a running or pending job without a requeue. ``after_checkpoint``: first give the workers the time
        ``--grace`` to save.

        Returns ``cancelled``, ``told`` or ``over``, see ``Stopped``. If the job's leader cannot be reached, Slurm
        cancels the job; raises ElasticError if Slurm cannot, or if the workers could then not save
        (``after_checkpoint``).
        """
        if self._has_tasks():
            slurm.cancel(self.id)
            return "cancelled"
        view = self._look().view
        if view.over:
            return "over"
        if view.state not in slurm.WAITS and is_there(self.run_dir):
            try:
                self._request("save-and-stop" if after_checkpoint else "stop")
            except ElasticError:
                if self._look().view.over:
                    return "over"
                if after_checkpoint or self._record.is_held() is not None:
                    raise
            else:
                return "told"
        slurm.cancel(self.slurm_id)
        return "cancelled"

    def cancel(self) -> None:
        """End the job at once, in any state, with ``scancel``. On one machine without Slurm, the job's leader ends it.
        Raises SlurmError, or ElasticError if that leader cannot be reached.
        """
        if self._record.is_held() is None:
            slurm.cancel(self.slurm_id)
        else:
            self._request("stop")

    def _request(self, request: Literal["drain", "save-and-stop", "stop"], reason: str = "user") -> None:
        from elastic_hpc.network.client import ask_leader  # imports asyncio, which is slow

        if not is_there(self.run_dir):
            raise ElasticError(f"{self.run_dir}: does not exist yet, the job has not started")
        ask_leader(self._record, request, reason)

    @property
    def slurm_id(self) -> str:
        """The id of the job or, where a job may not be requeued, of the job that continues in its place."""
        return recorded(self._record).slurm_id

    def final_state(self) -> str | None:
        """Slurm's word for the end of the job; None if the run directory does not say that the job has ended."""
        return recorded(self._record).final

    def last_round(self) -> Mapping[str, Any]:
        """The event of the last world: ``round``, ``nodes``, ``world_size``; empty before the first world."""
        return self._record.last_round()


def submit(spec: JobSpec, on_message: Callable[[str], None] = lambda _: None) -> Job:
    """Submit ``spec``. ``on_message`` is called with what sbatch prints besides the job's id, and with notes on
    environment variables that the job does not get.

    Raises UsageError if this package or Slurm refuses the job, and SlurmError if Slurm does not answer.
    """
    for note in spec.notes:
        on_message(f"{note}\n")
    with prepared(spec) as script:
        run_dir = os.path.join(spec.log_dir, slurm.submit_script(script, [], os.environ, on_message))
    remember(run_dir)
    return Job(run_dir, is_array=spec.has("array"))


def why(look: Look) -> str:
    """The text that ``elastic-hpc why`` prints."""
    from elastic_hpc.view.why import page

    return page(*look).plain.expandtabs() + "\n"
