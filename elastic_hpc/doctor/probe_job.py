"""The doctor's one-minute job: submits it, waits for it, collects the reports of its nodes."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from elastic_hpc import slurm
from elastic_hpc.doctor.reports import END_TIMEOUT, LATE, NodeReport, ProbeRun
from elastic_hpc.errors import ElasticError, SlurmError
from elastic_hpc.job.request import Request
from elastic_hpc.job.script import render, template_folder
from elastic_hpc.job.spec import JobSpec, build
from elastic_hpc.options.sbatch import SBATCH, Given
from elastic_hpc.record.rundir import RunDir

_DOCTOR = "elastic-hpc doctor"
_RUN_TIMEOUT = 100.0  # seconds: a minute, and the time that Slurm needs to end the job
_WAITING = frozenset({"PENDING", "CONFIGURING"})
_NEVER = frozenset(
    ("PartitionNodeLimit", "PartitionTimeLimit", "BadConstraints", "InvalidAccount", "InvalidQOS", "AccountNotAllowed")
)
"""Slurm's reasons for which a job waits forever."""
_LAST_LINES = 3


def run(nodes: int, log_dir: str, sbatch: Sequence[Given], tell: Callable[[str], None]) -> ProbeRun:
    """Submit the job, and wait until all of its nodes have reported or it has ended. Then, in any case, also after
    Ctrl-C, end the job and remove its folder.

    ``tell`` is called with what the job waits for. Raises UsageError if Slurm refuses the job, SlurmError if Slurm does
    not answer.
    """
    made = not os.path.isdir(log_dir)
    rundir = RunDir.new(log_dir, "doctor")
    submitted: list[str] = []
    try:
        rundir.make_secret()
        script = os.fsencode(render(_job(nodes, log_dir, rundir, sbatch)))
        slurm.sbatch(script, [], os.environ, lambda answer: submitted.append(answer.partition(";")[0]), tell)
        found = replace(_wait(submitted[0], nodes, rundir, tell), completed_after=_end(submitted[0]))
        submitted.clear()
        return found
    finally:
        for job in submitted:
            _end(job)
        shutil.rmtree(rundir.path, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # another process uses it by now
                os.rmdir(log_dir)


def _job(nodes: int, log_dir: str, rundir: RunDir, sbatch: Sequence[Given]) -> JobSpec:
    """The job as elastic-sbatch would start it here, with the same set-up lines, Python and options of sbatch; but not
    in a container.
    """
    own = {"time": "1", "job-name": "doctor", "output": str(rundir.path / "log")}
    options = {
        "nodes": str(nodes),
        "log-dir": log_dir,
        "spares": "0",
        "world-multiple-of": "1",
        "snapshot": "off",
        "template": str(template_folder() / "probe.j2"),
    }
    given = [*sbatch, *(Given(SBATCH[name], value, _DOCTOR) for name, value in own.items())]
    probe = "elastic_hpc.doctor.probe"
    job = build(Request(probe, [str(rundir.path)], [*options.items()], given, source=_DOCTOR, module=True))
    interface = ["--interface", job.launch.interface] if job.launch.interface else []
    launch = replace(job.launch, script_args=(*job.launch.script_args, *interface))
    passed = tuple(given for given in job.sbatch if given.name != "error")  # all output goes to the log
    python = None if job.container else job.agent_python
    return replace(job, launch=launch, sbatch=passed, container=None, agent_python=python)


def _wait(job: str, requested: int, rundir: RunDir, tell: Callable[[str], None]) -> ProbeRun:
    begin = time.monotonic()
    started: float | None = None
    nodes: tuple[str, ...] = ()
    while True:
        shown = slurm.show_job(job)
        if shown.state in _WAITING:
            if shown.reason in _NEVER:
                problem = f"the job would never start ({shown.reason}); use fewer nodes, or another partition"
                raise ElasticError(f"--nodes {requested}: {problem}")
            reason = "" if shown.reason == "None" else f": {shown.reason.replace('_', ' ')}"
            tell(f"job {job} waits in the queue{reason}, {time.monotonic() - begin:.0f} s")
        else:
            started = started or time.monotonic()
            nodes = nodes or tuple(slurm.expand(shown.nodes))
            tell(f"job {job} runs, nodes: {len(nodes)}, {time.monotonic() - started:.0f} s")
        reports, causes = _reports(rundir)
        late = started is not None and time.monotonic() > started + _RUN_TIMEOUT
        if shown.state not in slurm.LIVES or late or (nodes and len(reports) >= len(nodes)):
            state = LATE if late else shown.state
            return ProbeRun(nodes, tuple(reports), shown.may_requeue, state, {**_log_lines(rundir, nodes), **causes})
        time.sleep(1)


def _reports(rundir: RunDir) -> tuple[list[NodeReport], dict[str, str]]:
    """The reports so far, and, by node, what is wrong with a report."""
    reports, problems = [], {}
    for path in sorted(rundir.path.glob("report.*.json")):
        node = path.name.removeprefix("report.").removesuffix(".json")
        try:
            reports.append(NodeReport.of(rundir.read(path.name) or {}))
        except (ElasticError, ValueError, TypeError, KeyError) as error:
            problems[node] = f"{node}: {error}"
    return reports, problems


def _log_lines(rundir: RunDir, nodes: Sequence[str]) -> dict[str, str]:
    """The line of the job's log about each of ``nodes``, and under "" the last lines of the log."""
    try:
        lines = [
            line.strip() for line in Path(rundir.path, "log").read_text(errors="replace").splitlines() if line.strip()
        ]
    except OSError:
        return {"": "it has no log"}
    # A line that the node itself wrote comes last, and overrides srun's line about the node.
    ordered = sorted(lines, key=lambda line: not line.startswith("srun: "))
    found = {node: line for line in ordered for node in nodes if f" {node}:" in line}
    return {**found, "": " / ".join(lines[-_LAST_LINES:])}


def _end(job: str) -> float | None:
    """Cancel ``job``, and wait until it has ended and writes no more. Returns the seconds that this took, with the
    epilog, at most ``END_TIMEOUT``; None if Slurm did not answer.
    """
    begin = time.monotonic()
    with contextlib.suppress(SlurmError):
        slurm.cancel(job)
        while slurm.show_job(job).state in slurm.LIVES and time.monotonic() - begin < END_TIMEOUT:
            time.sleep(0.5)
        return min(time.monotonic() - begin, END_TIMEOUT)
    return None
