"""The only module that runs Slurm's commands. Unknown is not empty: what cannot be asked raises SlurmError."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from elastic_hpc.env import AGENT_MARK
from elastic_hpc.errors import SlurmError, UsageError

_SECONDS = 60  # for an answer of slurmctld; its own clients give up after 10 to 30
_SITE_SECONDS = 2  # for what is only nice to know before a submission
# slurmctld holds a change that it cannot make yet back for 5 seconds, and makes it then even if the client is gone.
# A process of the job must not wait that long: the job does not complete while it lives.
_CHANGE_SECONDS = 1
# A node's part of a step ends when its daemon has given up telling srun, 12 to 17 seconds if srun's node is lost. Slurm
# goes on listing a step that ended on the other nodes before it noticed the loss.
_STEP_SECONDS = 20
# Needed to find and enter the cluster. Every other SLURM_* and SBATCH_* variable overrides the script's directives,
# or is a leftover of the job that we are called from.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"})
# sbatch has one exit code for everything. These are not the user's input.
_UNREACHABLE = re.compile(
    "unable to contact|timed out|connection (failure|refused)|configuration source|zero bytes|munge|authentication",
    re.IGNORECASE,
)


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` without the variables that change what sbatch does, and without the guard's mark: what Slurm starts
    for an agent must outlive it.
    """
    return {k: v for k, v in environ.items() if k in _KEPT or not k.startswith(("SBATCH_", "SLURM_", AGENT_MARK))}


def sbatch(
    script: bytes,
    options: Sequence[str],
    environ: Mapping[str, str],
    on_submitted: Callable[[str], None],
    on_message: Callable[[str], None],
) -> int:
    """Submit ``script`` and return sbatch's exit code, with ``--wait`` the job's.

    ``on_submitted`` is called at once with ``ID[;CLUSTER]``; ``on_message`` with what sbatch says besides.
    Raises UsageError if Slurm refuses the job, SlurmError if it could not be asked.
    """
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                ["sbatch", "--parsable", *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=clean_environment(environ),
            )
        except OSError as error:
            raise SlurmError(
                f"sbatch: {error.strerror}; is this a login node of the cluster, and is Slurm's module loaded?"
            ) from None

        with process:
            assert process.stdin
            assert process.stdout
            try:
                process.stdin.write(script)
                process.stdin.close()
            except BrokenPipeError:
                pass  # sbatch refused its options before it read the script; its message follows
            if not select.select([process.stdout], [], [], _SECONDS)[0]:
                process.kill()
                raise SlurmError(f"sbatch: no answer in {_SECONDS} s; the job may be queued or not: squeue --me")
            job = process.stdout.readline().decode().strip()
            if job:
                on_submitted(job)
            try:
                process.wait()
            except KeyboardInterrupt:  # the user waits no longer; the job goes on
                process.kill()
                raise
        said.seek(0)
        messages = said.read().decode(errors="replace")
        if job or process.returncode == 0:  # --test-only succeeds without a job
            on_message(messages)
            return process.returncode
        reason = condensed(messages) or f"sbatch ended with exit code {process.returncode}"
        if _UNREACHABLE.search(reason):
            raise SlurmError(f"sbatch: {reason}")
        raise UsageError(f"Slurm refused the job: {reason}")


def condensed(messages: str) -> str:
    """What a Slurm command said on stderr, on one line without its prefixes."""
    lines = [re.sub(r"^\w+: (?:error: |fatal: )?", "", line).strip() for line in messages.splitlines()]
    lines = [line for line in lines if not line.startswith("Try ")]  # its own help
    return "; ".join(dict.fromkeys(filter(None, lines)))


@dataclass(frozen=True)
class Job:
    """What slurmctld says about a job. Lists of nodes are in Slurm's notation, empty for none."""

    state: str
    """Slurm's word, RUNNING for one. As long as a job is COMPLETING, Slurm does not say what it will be then."""
    reason: str
    restarts: int
    """Requeues, for whatever cause; counted as soon as one is accepted."""
    may_requeue: bool
    """False after ``--no-requeue``, where the site has JobRequeue=0, or when an administrator took it back."""
    partitions: tuple[str, ...]
    """One once it has started."""
    nodes: str
    """Allocated and not yet lost in Slurm's eyes."""
    batch_host: str
    required: str
    excluded: str
    folder: str
    """Working directory."""
    preempt_time: str
    """When its end by preemption was announced, while it is running; then, when it came. Empty for never."""
    end_time: str

    def becomes(self, run: int | None) -> str:
        """``state``, or if that is COMPLETING, what the rest says to a process of ``run`` (SLURM_RESTART_COUNT):

        REQUEUED by whomever, TIMEOUT, PREEMPTED where the site does not requeue then, FAILED, or CANCELLED, which is
        also what every other end looks like. At the moment of SIGTERM, RUNNING may still be said for a second.
        """
        if self.state != "COMPLETING":
            return self.state
        if run is not None and self.restarts > run:
            return "REQUEUED"
        if self.preempt_time and self.preempt_time == self.end_time:  # else cancelled in its grace time
            return "PREEMPTED"
        return {"TimeLimit": "TIMEOUT", "NonZeroExitCode": "FAILED"}.get(self.reason, "CANCELLED")


def show_job(job: str) -> Job:
    """Ask for ``job``, for an array task ``JOB_TASK``. Raises SlurmError if Slurm knows it no longer."""
    said = _scontrol("show", "job", "--oneliner", job).partition(" UserId=")[2]  # a job's name may hold anything

    def field(name: str, value: str = r"\S*") -> str:
        match = re.search(rf" {name}=({value})", said)
        return "" if match is None or match[1] == "(null)" else match[1]

    return Job(
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
        folder=field("WorkDir", r".*?(?= Std(?:Err|In|Out)=| \w+=|\s*$)"),
    )


def job_state(job: str, run: int | None = None) -> str:
    """Slurm's word for the state of ``job``, or what it becomes when it is completing; see ``Job.becomes``."""
    return show_job(job).becomes(run)


def requeue(
    job: str,
    *,
    start_after: timedelta,
    exclude: Collection[str] = (),
    readmit: Collection[str] = (),
    lost: Collection[str] = (),
    run: int | None = None,
) -> str | None:
    """Send ``job``, for an array task ``JOB_TASK``, back to the queue, to start after ``start_after``.

    ``start_after`` must outlast the completion of the job, else Slurm sets a start time of its own, two minutes away.
    Nodes of ``exclude`` are added to those that the job excludes, nodes of ``readmit`` are taken off again. For
    ``lost`` nodes, other than the batch host, the completion does not wait until Slurm notices the loss too. With
    ``run``, the caller's SLURM_RESTART_COUNT, a requeue by somebody else is taken for this one.

    Every process of the job should end as soon as this returns, the caller included: where Slurm has taken a lost node
    from the job and has no slurmdbd, it accepts a start time only when the job has completed, and waits 5 seconds for
    that. If the batch host is lost, that takes longer: see ``start_step``.

    Raises SlurmError if the job is not requeued. Returns what Slurm refused after that, None if nothing.
    """
    before = show_job(job)
    _requeue(job, before, run, lost)
    return _change(job, [_start(start_after), *_excluding(before, exclude, readmit)])


def complete(job: str, *, start_after: timedelta, exclude: Collection[str] = (), run: int | None = None) -> str | None:
    """End ``job``, whose batch script is gone, as that script would have: COMPLETED, or FAILED.

    For that it runs once more, on any one node, where the batch script must find the verdict and exit at once. What is
    said of ``requeue`` holds here. A job that may not be requeued is cancelled, so that it does not hold its nodes
    until the time limit, and SlurmError says so.
    """
    before = show_job(job)
    try:
        _requeue(job, before, run)
    except SlurmError as error:
        cancel(job)
        raise SlurmError(f"{error}; cancelled it instead") from None
    least = [["NumNodes=1"], ["TimeLimit=1"]]  # the time limit for backfill
    if before.required:
        least.append(["ReqNodeList="])
    return _change(job, [*_excluding(before, exclude, ()), *least, _start(start_after)])


def cancel(job: str) -> None:
    """End ``job``, running or waiting. Raises SlurmError."""
    _run("scancel", job)


def _requeue(job: str, before: Job, run: int | None, lost: Collection[str] = ()) -> None:
    """Requeue ``job`` unless that is done already. Never brings a cancelled job back."""
    becomes = before.becomes(run)
    if becomes == "REQUEUED":
        return
    if not before.may_requeue:
        raise SlurmError(f"job {job} may not be requeued: --no-requeue, JobRequeue=0 of the site, or an administrator")
    if becomes in {"TIMEOUT", "PREEMPTED"}:
        _scontrol("requeue", job)
        return
    if before.state == "COMPLETING":
        raise SlurmError(f"job {job} is {becomes}: not requeued")
    _release(before, job, lost)
    _scontrol("requeue", "incomplete", job)  # without a word, does nothing if the job was cancelled this moment
    if show_job(job).restarts == before.restarts:
        raise SlurmError(f"job {job} ended before it could be requeued")


def _release(before: Job, job: str, lost: Collection[str]) -> None:
    """Take ``lost`` nodes from the running job.

    Only for a requeue at once, which ends srun: nobody tells srun, which would wait for their tasks for ever.
    """
    kept = [node for node in _expand(before.nodes) if node not in lost]
    if lost and before.batch_host in kept:
        with contextlib.suppress(SlurmError):  # it has noticed by itself; at worst, the requeue takes longer
            _scontrol("update", f"JobId={job}", f"NodeList={','.join(kept)}")


def _start(after: timedelta) -> list[str]:
    return [f"StartTime=now+{after.total_seconds():.0f}"]


def _excluding(before: Job, exclude: Collection[str], readmit: Collection[str]) -> list[list[str]]:
    """The change of ExcNodeList, if any: an update replaces the list."""
    exclude = set(exclude) - set(_expand(before.required))  # else the job would never start
    if not exclude and not readmit:
        return []
    nodes = set(_expand(before.excluded)) - set(readmit) | exclude
    return [[f"ExcNodeList={','.join(sorted(nodes))}"]]


def _change(job: str, changes: Sequence[Sequence[str]]) -> str | None:
    """Make ``changes`` independently of each other. The refusals, None if there are none so far."""
    asked = [_ask("scontrol", "update", f"JobId={job}", *change) for change in changes]
    end = time.monotonic() + _CHANGE_SECONDS
    refused = []
    for process in asked:
        try:
            _answer(process, max(0.0, end - time.monotonic()))
        except TimeoutError:
            continue  # slurmctld has it
        except SlurmError as error:
            refused.append(str(error))
    return "; ".join(refused) or None


STEP_NAME = "elastic-conclude"


def start_step(job_id: str, node: str, command: Sequence[str], log: Path) -> None:
    """Run ``command`` on ``node`` in a job step that goes on when the caller's step ends; its output goes to ``log``.

    For the requeue of a job that lost its batch host, and with it srun: the step of the agents then takes 10 to 20
    seconds to end after its last process, too long for ``requeue``. In a step of its own, ``command`` can wait for that
    with ``wait_until_alone``. Returns when it runs. ``job_id`` is SLURM_JOB_ID, also in arrays. Raises SlurmError.
    """
    shell = ["sh", "-c", 'echo started; log=$1; shift; exec "$@" >>"$log" 2>&1', "sh", str(log), *command]
    step = ["srun", f"--jobid={job_id}", f"--job-name={STEP_NAME}", "--overlap"]
    step += ["--nodes=1", "--ntasks=1", f"--nodelist={node}"]
    # Neither memory nor GPUs: all are the agents'. No MPI: nothing to talk to.
    process = _ask(*step, "--mem=0", "--gres=none", "--mpi=none", "--no-kill", *shell)
    assert process.stdout
    if not select.select([process.stdout], [], [], _SECONDS)[0]:
        _end(process)
        raise SlurmError(f"srun --jobid={job_id}: no answer in {_SECONDS} s")
    if process.stdout.readline() != b"started\n":
        raise SlurmError(_answer(process, _SECONDS) or f"srun --jobid={job_id}: the step ended at once")


def wait_until_alone(job: str, step: str, *, deadline: timedelta, deputy_of: str | None = None) -> bool:
    """Wait until ``step`` (SLURM_STEP_ID) is the last one of ``job``, whose batch host is lost, and Slurm knows it.
    Another step that ``start_step`` has started is not waited for, except by its deputy, while its node is there.

    False if that is not so at ``deadline``: a requeue then takes longer.
    """
    begin = time.monotonic()
    while True:
        with contextlib.suppress(SlurmError):  # unknown is not alone
            nodes = _expand((shown := show_job(job)).nodes)
            lost = shown.batch_host not in nodes
            others = _other_steps(job, step)
            first_is_at_it = deputy_of in nodes and STEP_NAME in others
            if lost and not first_is_at_it and (others <= {STEP_NAME} or time.monotonic() - begin > _STEP_SECONDS):
                return True
        if time.monotonic() - begin > deadline.total_seconds():
            return False
        time.sleep(0.5)


def _other_steps(job: str, step: str) -> set[str]:
    """Names of the job steps beside ``step``, those of the batch script and of Slurm itself left out."""
    listed = _run("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i %j").splitlines()
    found = [line.partition(" ") for line in listed]
    others = [(each.rpartition(".")[2], name) for each, _, name in found]
    return {name for other, name in others if other.isdecimal() and other != step}


def resubmit(job: str, script: Path, environ: Mapping[str, str], exports: Mapping[str, str]) -> str:
    """Submit the batch script of ``job`` again, to start when ``job`` has ended, and return the new job's id.

    For a job that may not be requeued. The options are the directives of ``script``; ``exports`` are variables for the
    new job, which must not be hidden by ``--export`` among them. Of an array, only this task is submitted, with the
    same index. Raises SlurmError.
    """
    folder = show_job(job).folder
    options = [f"--dependency=afterany:{job}", *([f"--chdir={folder}"] if folder else [])]
    _, _, task = job.partition("_")
    if task:
        options.append(f"--array={task}")
    submitted: list[str] = []
    try:
        body = script.read_bytes()
        sbatch(body, options, {**clean_environment(environ), **exports}, submitted.append, lambda _: None)
    except (OSError, UsageError) as error:
        raise SlurmError(f"sbatch {script}: {error}") from None
    if not submitted:
        raise SlurmError(f"sbatch {script}: no job id")
    return submitted[0].partition(";")[0] + (f"_{task}" if task else "")


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
    asked = [_ask("scontrol", "show", "config"), _ask("scontrol", "show", "partition", "--oneliner")]
    end = time.monotonic() + _SITE_SECONDS
    try:
        config, partitions = [_answer(process, max(0.0, end - time.monotonic())) for process in asked]
    except TimeoutError:
        raise SlurmError(f"scontrol show config: no answer in {_SITE_SECONDS} s") from None
    finally:
        for process in asked:
            _end(process)
    return _site(config, partitions, partition and partition.partition(",")[0])


def _site(config: str, partitions: str, name: str | None) -> Site:
    settings = dict(re.findall(r"^(\w+) *= (.*?) *$", config, re.MULTILINE))
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in partitions.splitlines()]
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


def usable_nodes(job: str) -> frozenset[str]:
    """Names of the nodes that Slurm could give to ``job``, now or when others have left them.

    In one of its partitions and neither down nor drained. What the job asks of a node besides is not looked at. Nodes
    that it excludes are in, because that may change.
    """
    partitions = set(show_job(job).partitions)
    return _usable(_scontrol("show", "node", "--oneliner"), partitions)


def _usable(shown: str, partitions: Collection[str]) -> frozenset[str]:
    # Not from sinfo: 22.05 goes on listing a node as mixed* that was set DOWN under a job.
    gone = {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "FUTURE", "UNKNOWN", "NOT_RESPONDING", "MAINT"}
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in shown.splitlines()]
    return frozenset(
        row["NodeName"]
        for row in rows
        if not set(partitions).isdisjoint(row.get("Partitions", "").split(","))
        and gone.isdisjoint(word.rstrip("*~#!%$@^-") for word in row.get("State", "UNKNOWN").split("+"))
    )


def _expand(nodes: str) -> list[str]:
    """The names in ``nodes``, which are in Slurm's notation."""
    return _scontrol("show", "hostnames", nodes).split() if nodes else []


def _scontrol(*arguments: str) -> str:
    return _run("scontrol", *arguments)


def _run(*command: str) -> str:
    try:
        return _answer(_ask(*command), _SECONDS)
    except TimeoutError:
        raise SlurmError(f"{' '.join(command)}: no answer in {_SECONDS} s") from None


def _ask(*command: str) -> subprocess.Popen[bytes]:
    """Start a client of Slurm. The requeue of a job sends SIGTERM to all its processes, also to those that ask for it:

    they inherit that it is blocked.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(os.environ),
            start_new_session=True,  # Ctrl-C does not stop a requeue half-way
        )
    except OSError as error:
        raise SlurmError(f"{' '.join(command)}: {error.strerror}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _answer(process: subprocess.Popen[bytes], seconds: float) -> str:
    """What ``process`` says on stdout. Raises SlurmError if it fails; if late, ends it, raises TimeoutError."""
    try:
        said, complaint = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        raise TimeoutError from None
    if process.returncode:
        assert isinstance(process.args, tuple)
        reason = condensed(complaint.decode(errors="replace")) or f"exit code {process.returncode}"
        raise SlurmError(f"{' '.join(process.args)}: {reason}")
    return said.decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let go of a client that is late, if it is: what it asked for may still be done."""
    process.kill()
    process.communicate()
