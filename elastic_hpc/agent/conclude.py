"""How a run is concluded: the job is requeued or ended, by the batch script, or by an agent if that script is lost."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

from elastic_hpc import slurm
from elastic_hpc.agent import last_words, notify, once_more, unreached, warned
from elastic_hpc.environment import CONTINUE, FIRST_JOB, FIRST_RUN, JOIN, SPENT
from elastic_hpc.errors import ElasticError, SlurmError
from elastic_hpc.membership import strikes, wishes
from elastic_hpc.membership.leaderless import LEADERLESS
from elastic_hpc.options.sbatch import WarningSignal
from elastic_hpc.options.sbatch_lines import grows_elsewhere
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.values import NodeRange
from elastic_hpc.record.events import append_event
from elastic_hpc.record.rundir import RunDir
from elastic_hpc.slurm.env import AgentEnv, first_job, job_name, restart_count, run_number, spent
from elastic_hpc.start import module_command
from elastic_hpc.workers import folder

_ALONE_TIMEOUT = timedelta(seconds=60)
"""Time for the agents' step to end when the batch host is lost. A requeue before the end takes longer."""

_LEAVE_TIME = timedelta(seconds=5)
"""Time for the other agents to leave, where the end of the job does not wait for Slurm."""

_DEPUTY_TIMEOUT = timedelta(minutes=10)


def conclude(
    rundir: RunDir,
    environ: Mapping[str, str],
    status: int,
    *,
    warning: str = WarningSignal.name,
    max_requeues: int = LaunchSpec.max_requeues,
) -> int:
    """Act on the verdict of this run. Returns the exit code for the batch script.

    ``status`` is srun's exit code; it counts only where the agents left no verdict, and for a joiner, which has no
    verdict of its own. ``warning``: the name of the signal by which Slurm warns of the time limit. Agents that continue
    without this srun get that warning from here. ``max_requeues``: the job's budget, for a run that srun could not
    start.
    """
    if JOIN in environ:
        return status
    verdict = await_verdict(rundir, run_number(environ), _pass_on(rundir, environ, warning))
    known = last_words.take(job_name(environ), run_number(environ))
    verdict, lost = verdict or known, list[str]()
    _cancel_joiners(rundir, job_name(environ))
    if verdict is None and status:
        verdict, lost = unreached.judge(rundir, environ, max_requeues + spent(environ)[1])
    if verdict is None:
        reason = f"the agents left no verdict; srun ended with exit code {status}"
        print(f"elastic_hpc: {reason}", file=sys.stderr)
        _notify(rundir, environ, {"outcome": "failed", "reason": reason})
        return status or 1
    print(f"elastic_hpc: {verdict['outcome']}: {verdict['reason']}", file=sys.stderr)
    if verdict.get("failure"):
        print(verdict["failure"]["traceback"], file=sys.stderr)
    if verdict["outcome"] == "requeue":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue sends it to its own caller
        code = 0 if rundir.acted(run_number(environ)) is not None else _requeue(rundir, environ, lost)
        _notify(rundir, environ, verdict)
        return code
    once_more.settle(rundir, environ, verdict["outcome"])
    _notify(rundir, environ, verdict)
    return 1 if verdict["outcome"] == "failed" else 0


def _notify(rundir: RunDir, environ: Mapping[str, str], verdict: Mapping[str, Any]) -> None:
    """Notify the user how the run has ended, if requested (--notify)."""
    if problem := notify.send(notify.of_verdict(rundir, verdict), environ):
        print(f"elastic_hpc: {problem}", file=sys.stderr)


def await_verdict(rundir: RunDir, run: int, handle_signals: Callable[[], None]) -> dict[str, Any] | None:
    """The verdict of ``run``, whose srun has ended; None without a verdict. A restarted agent is a job step of its own,
    and continues without that srun: as long as an agent leads, a verdict may follow. Meanwhile ``handle_signals`` is
    called twice a second.
    """
    beat, last_beat_at = 0, 0.0
    while True:
        if verdict := rundir.verdict(run):
            return verdict
        if (rundir.read("endpoint.json") or {}).get("run") != run:
            return None
        if beat != (beat := rundir.heartbeat()):
            last_beat_at = time.monotonic()
        silence = float((rundir.read("spec.json") or {}).get("--heartbeat-timeout", 5))
        if time.monotonic() - last_beat_at > 3 * silence:
            return None
        handle_signals()
        time.sleep(0.5)


def _pass_on(rundir: RunDir, environ: Mapping[str, str], warning: str) -> Callable[[], None]:
    """Handle the signal named ``warning`` from now on. Returns a function to call repeatedly: it passes a received
    signal on, until a leader has accepted the warning.
    """
    received: list[int] = []
    signal.signal(signal.Signals[f"SIG{warning}"], lambda number, _: received.append(number))

    def pass_on() -> None:
        if received and warned.ask(rundir, environ, "time limit"):
            received.clear()

    return pass_on


def act(
    rundir: RunDir,
    env: AgentEnv,
    verdict: Mapping[str, Any],
    lost: Collection[str],
    *,
    environ: Mapping[str, str],
    alone: bool,
    others: Sequence[str],
) -> str | None:
    """Requeue the job from this node's agent. Returns the problem, if Slurm refused or did not answer.

    ``alone``: the batch host is lost, and with it the batch script and srun. Then the agent also ends the job: it
    starts a job step that waits until the agents have left, and a deputy on one of the nodes ``others``, which acts if
    that step is lost. If Slurm cannot start the deputy on the first of these nodes, the agent tries the second.
    ``environ``: the environment that the agent was started with.
    """
    if env.local:
        return None
    if not alone:
        _cancel_joiners(rundir, env.job)
        return None if _requeue(rundir, environ, lost) == 0 else "not requeued"
    command = module_command(sys.executable, "elastic_hpc", "conclude-alone", str(rundir.path), verdict["outcome"])
    command += ["--unless-led"] * (verdict.get("actor") == LEADERLESS)
    log = rundir.path / "logs" / "conclude.log"
    folder.renew()
    try:
        slurm.start_step(environ["SLURM_JOB_ID"], env.name, command, log, environ)
    except SlurmError as error:
        return str(error)
    for node in others[:2]:
        with contextlib.suppress(SlurmError):
            slurm.start_step(environ["SLURM_JOB_ID"], node, [*command, "--deputy-of", env.name], log, environ)
            break
    return None


def let_go(rundir: RunDir, env: AgentEnv, lost: Collection[str]) -> str | None:
    """The job has ended, and all agents except the agents of ``lost`` nodes have left: release the lost nodes, so that
    the job does not stay COMPLETING while Slurm waits for them (``SlurmdTimeout``), and have the batch script end srun,
    which waits for them as well. Returns the problem, if Slurm refused or did not answer.
    """
    problem = None
    try:
        slurm.release(env.job, lost)
    except SlurmError as error:
        problem = str(error)
    with contextlib.suppress(OSError):  # then the batch script ends srun later
        rundir.mark_left()
    return problem


def cancel(rundir: RunDir, env: AgentEnv, *, unless_led: bool) -> str | None:
    """Cancel the job: the user's batch script, which ran ``elastic-srun``, is lost with its node, and cannot end it.
    ``unless_led``: as for ``conclude_alone``; then this function waits, as that command does. Returns the problem, if
    Slurm refused or did not answer.
    """
    beat, end = rundir.heartbeat(), time.monotonic() + (_time_for_slurm().total_seconds() if unless_led else 0.0)
    while time.monotonic() < end:
        if _is_led(rundir, beat):
            print("elastic_hpc: a leader continues the job, which is not cancelled", file=sys.stderr)
            return None
        time.sleep(1.0)
    print("elastic_hpc: the batch script is lost with its node; the job is cancelled", file=sys.stderr)
    try:
        slurm.cancel(env.job)
    except SlurmError as error:
        return str(error)
    return None


def conclude_alone(
    rundir: RunDir, environ: Mapping[str, str], outcome: str, *, deputy_of: str | None, unless_led: bool = False
) -> int:
    """Run as one of the job steps that ``act`` starts. SIGTERM ends a deputy that waits: then the job is requeued.
    ``unless_led``: no majority has agreed to the verdict; so the job continues if there is a leader by now.
    """
    job, step, beat = job_name(environ), environ["SLURM_STEP_ID"], rundir.heartbeat()
    if deputy_of:
        slurm.wait_until_alone(job, step, deadline=_DEPUTY_TIMEOUT, deputy_of=deputy_of)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue sends it to its own caller
    if not deputy_of:
        slurm.wait_until_alone(job, step, deadline=_time_for_slurm())
    if unless_led and _is_led(rundir, beat):
        print(f"elastic_hpc: no {outcome}: a leader continues the job", file=sys.stderr)
        return 0
    _cancel_joiners(rundir, job)
    verdict = {"reason": "its batch script was lost", **(rundir.read("verdict.json") or {}), "outcome": outcome}
    if outcome == "requeue":
        code = _requeue(rundir, environ)
        _notify(rundir, environ, verdict)
        return code
    _notify(rundir, environ, verdict)  # first: the job is run once more, which ends this process
    try:
        once_more.complete(rundir, environ, outcome)
    except OSError as error:  # the script would train again
        print(f"elastic_hpc: {outcome}, but {error}: the job is cancelled", file=sys.stderr)
        slurm.cancel(job)
    return 0


def _is_led(rundir: RunDir, before: int) -> bool:
    """Whether a leader has shown its heartbeat since ``before``, an earlier ``RunDir.heartbeat``. A file system that
    does not answer, then or now, counts as no leader.
    """
    return bool(before) and rundir.heartbeat() not in {0, before}


def _time_for_slurm() -> timedelta:
    """How long to wait until Slurm notices that the batch host is lost. Where that takes minutes, the job does not hold
    its other nodes until then: they are free as soon as the job is requeued, and the job starts later.
    """
    with contextlib.suppress(SlurmError):
        if not slurm.notices_within(_ALONE_TIMEOUT.total_seconds()):
            return min(_ALONE_TIMEOUT, _LEAVE_TIME)
    return _ALONE_TIMEOUT


def _cancel_joiners(rundir: RunDir, job: str) -> None:
    """Cancel the joiners that have not started. The others leave on their own, at the latest when their agents start;
    scancel would mark them as CANCELLED too.
    """
    with contextlib.suppress(ElasticError):
        if (rundir.read("spec.json") or {}).get("--grow") == "on":
            slurm.cancel(*(joiner.id for joiner in slurm.joiners(job) if joiner.state not in {"RUNNING", "COMPLETING"}))


def _mark_acted(rundir: RunDir, environ: Mapping[str, str], job: str) -> None:
    with contextlib.suppress(OSError):  # then the batch script finds that the job was requeued already
        rundir.mark_acted(run_number(environ), job)


def _requeue(rundir: RunDir, environ: Mapping[str, str], lost: Collection[str] = ()) -> int:
    """Requeue the job, and exclude nodes that failed. The caller ignores SIGTERM, which the requeue sends to it."""
    job, count = job_name(environ), restart_count(environ)
    exclude, readmit = _nodes_to_avoid(rundir, job)
    if exclude:
        print(f"elastic_hpc: nodes that failed are avoided: {', '.join(exclude)}", file=sys.stderr)
    once_more.expect(rundir, job)
    try:
        problem = slurm.requeue(
            job,
            start_after=once_more.REQUEUE_DELAY,
            exclude=exclude,
            readmit=readmit,
            lost=lost,
            run=count,
            nodes=_nodes_to_ask_for(rundir),
        )
    except SlurmError as error:
        return _instead(rundir, environ, job, error)
    _mark_acted(rundir, environ, job)
    if problem:
        print(
            f"elastic_hpc: requeued, but the start may take two minutes, as Slurm refused a change: {problem}",
            file=sys.stderr,
        )
    return 0


def _instead(rundir: RunDir, environ: Mapping[str, str], job: str, error: SlurmError) -> int:
    """The job was not requeued. If Slurm does not allow a requeue of this job, submit a new job in its place."""
    try:
        shown = slurm.show_job(job)
        if shown.may_requeue:
            print(f"elastic_hpc: not requeued: {error}", file=sys.stderr)
            if shown.becomes(restart_count(environ)) == "CANCELLED":
                _cancelled(rundir, environ)
            return 1
        exports = {
            CONTINUE: str(rundir.path), FIRST_RUN: str(run_number(environ) + 1), FIRST_JOB: first_job(environ),
            SPENT: environ.get(SPENT, ""),
        }  # fmt: skip
        new = slurm.resubmit(job, rundir.path / "script.sbatch", environ, exports)
    except SlurmError as again:
        print(
            f"elastic_hpc: the job cannot be requeued: {error}; nor submitted again: {again}; type: elastic-sbatch "
            f"--resume {rundir.path}",
            file=sys.stderr,
        )
        return 1
    _mark_acted(rundir, environ, new)
    print(f"elastic_hpc: {error}; job {new} continues in its place, in the same run directory", file=sys.stderr)
    return 0


def _cancelled(rundir: RunDir, environ: Mapping[str, str]) -> None:
    """Record that the user ended the job with scancel, which agents cannot distinguish from other ends."""
    verdict = {**(rundir.read("verdict.json") or {}), "outcome": "failed", "cause": "user", "reason": "scancel"}
    with contextlib.suppress(OSError):
        append_event(rundir.path, environ["SLURMD_NODENAME"], time.time(), "verdict", verdict)
        rundir.write("verdict.json", verdict)


def _asks(rundir: RunDir) -> NodeRange:
    """The nodes to request from Slurm, by the bounds that hold now. Raises ElasticError, or ValueError."""
    spec = LaunchSpec.of_nodes(rundir.read("spec.json") or {})
    if bounds := wishes.saved(rundir.read("state.json")):
        spec = spec.resized(bounds.min_nodes, bounds.max_nodes)
    return spec.asks_slurm(grows_elsewhere=grows_elsewhere(rundir.script()))


def _nodes_to_ask_for(rundir: RunDir) -> str:
    """The nodes to request, in Slurm's notation: the job may have returned nodes, or have other bounds now; empty if
    unknown.
    """
    with contextlib.suppress(ElasticError, ValueError):
        return _asks(rundir).slurm
    return ""


def _nodes_to_avoid(rundir: RunDir, job: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The nodes to exclude, and the nodes that the job must no longer exclude. Both are empty if the record is damaged,
    or Slurm shows no nodes at all. Prints what could not be seen.
    """
    try:
        recorded = strikes.load([*(rundir.read("state.json") or {}).get("strikes", ()), *rundir.unfit()])
        if not recorded:
            return (), ()
        most = _asks(rundir).max
        usable, problem = slurm.usable_nodes(job)
        if problem:
            print(
                f"elastic_hpc: the states of nodes cannot be seen ({problem}): each node of the partition counts as "
                "usable; nodes that failed under this job are known from its record",
                file=sys.stderr,
            )
        exclude = strikes.excluded(recorded, time.time(), usable, most)
        return exclude, strikes.readmitted(recorded, exclude)
    except (ElasticError, OSError, ValueError) as error:
        print(f"elastic_hpc: no node is avoided, although some may have failed: {error}", file=sys.stderr)
        return (), ()
