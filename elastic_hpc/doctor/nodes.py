"""What the reports of the nodes mean for elastic jobs. Pure. ``reach`` has the checks of the network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from elastic_hpc.doctor.findings import Finding, Level, some
from elastic_hpc.doctor.reach import name_findings, port_findings
from elastic_hpc.doctor.reports import END_TIMEOUT, LATE, NodeReport, PeerReport, ProbeRun, pairs

_SKEW = 5.0
"""The difference between two clocks, in seconds, above which times in logs mislead."""
_SLOW = 2.0
"""Seconds after which it is late when other nodes see a new file."""
_SLOW_END = 30.0
"""The most seconds from the end of a job to its requeue that its agents can bridge."""


def run_findings(run: ProbeRun, log_dir: str) -> list[Finding]:
    findings = [_requeue(run), _reported(run, log_dir)]
    if not run.reports:
        return findings
    checks = (port_findings, name_findings, _file_system, _clocks, _software, _gpus)
    return [
        *findings,
        *_completion(run.completed_after),
        *(finding for check in checks for finding in check(run.reports)),
    ]


def _requeue(run: ProbeRun) -> Finding:
    if run.may_requeue:
        return Finding(Level.OK, "requeue", "Requeue = 1 for a job with --requeue", "Slurm can requeue jobs")
    means = "Slurm does not requeue jobs: a new job with another ID continues in place of the old job"
    advice = "administrator, slurm.conf: JobRequeue=1, and no submission filter that removes --requeue"
    return Finding(Level.WARN, "requeue", "Requeue = 0 for a job with --requeue", means, advice)


def _completion(took: float | None) -> list[Finding]:
    if took is None:
        return []
    free = "still not free" if took >= END_TIMEOUT else "free"
    found = f"the nodes were {free} {took:.0f} s after the end of the job"
    if took < _SLOW_END:
        return [Finding(Level.OK, "epilog", found, "a requeued job waits no longer than that")]
    means = "a requeued job starts minutes late: its agents can wait only half a minute for the nodes"
    advice = "administrator: check the epilog; from Slurm 25.11 on, slurm.conf: SchedulerParameters=requeue_delay=5"
    return [Finding(Level.WARN, "epilog", found, means, advice)]


def _reported(run: ProbeRun, log_dir: str) -> Finding:
    missing = sorted(set(run.nodes) - {report.node for report in run.reports})
    cause = run.causes.get("", "")
    if not run.reports:
        why = f"; {cause}" if cause else ""
        end = "did not end in time" if run.ended == LATE else f"ended as {run.ended}"
        found = f"no node of {some(run.nodes) or 'the job'} has reported; the job {end}{why}"
        means = "an elastic job could not start: its nodes must share the run directory and the Python environment"
        advice = f"you: --log-dir DIR that all nodes share (now {log_dir}); --python, --setup in a configuration file"
        return Finding(Level.BAD, "nodes", found, means, advice)
    if missing:
        why = some([run.causes[node] for node in missing if node in run.causes], "; ") or cause
        found = f"{some(missing)} never reported" + (f": {why}" if why else "")
        means = "an agent could not start there either"
        advice = "you: --exclude " + ",".join(missing) + "; administrator: check the shared file systems there"
        return Finding(Level.BAD, "nodes", found, means, advice)
    problems = [f"{report.node}: {problem}" for report in run.reports for problem in report.problems]
    if problems:
        means, advice = "an agent could not take part there", "you: read the message"
        return Finding(Level.BAD, "nodes", some(problems, "; "), means, advice)
    return Finding(Level.OK, "nodes", f"{some(run.nodes)} reported", "an agent can start on each of them")


def _file_system(reports: Sequence[NodeReport]) -> list[Finding]:
    makers = [report.node for report in reports if report.created]
    if len(makers) != 1:
        found = f"{some(makers) or 'no node'} made the file that only one node can make (O_EXCL)"
        means = "two agents could both believe that they are the first"
        advice = "you: --log-dir DIR, on another file system"
        return [Finding(Level.BAD, "file system", found, means, advice)]
    if len(reports) < 2:
        return [Finding(Level.UNKNOWN, "file system", "only one node reported", "not judged", "you: --nodes 2")]
    peers = [(report.node, name, peer) for report, name, peer in pairs(reports)]
    return [*_visibility(peers), *_locks(peers)]


def _visibility(peers: Sequence[tuple[str, str, PeerReport]]) -> list[Finding]:
    times = [peer.seen_after for _, _, peer in peers if peer.seen_after is not None]
    if not times:
        return [Finding(Level.UNKNOWN, "file system", "not checked: no node could reach another", "see ports")]
    found = f"other nodes saw a new file after at most {max(times):.2f} s"
    if max(times) > _SLOW:
        means = "other nodes see verdicts and checkpoints that much later"
        advice = "you: --log-dir DIR, on another file system; administrator: the mount's attribute cache (actimeo)"
        return [Finding(Level.WARN, "file system", found, means, advice)]
    late = [
        f"{node} does not see a file of {name}" for node, name, peer in peers if peer.dials and peer.seen_after is None
    ]
    cut = any(all(dial.error for dial in peer.dials) for _, _, peer in peers)
    if late and not cut:
        return [Finding(Level.WARN, "file system", some(late, "; "), "the record of a job may be incomplete")]
    return [Finding(Level.OK, "file system", found, "all nodes see the run directory; O_EXCL and rename work")]


def _locks(peers: Sequence[tuple[str, str, PeerReport]]) -> list[Finding]:
    free = [f"{node} (a lock of {name})" for node, name, peer in peers if peer.lock_held is False]
    if not free:
        return []
    found = f"locks have no effect on {some(free)}"
    means = "elastic_hpc needs no locks between nodes; a script of yours that does is not protected"
    return [Finding(Level.NOTE, "flock", found, means)]


def _clocks(reports: Sequence[NodeReport]) -> list[Finding]:
    ahead = [(peer.ahead, report.node, name) for report, name, peer in pairs(reports) if peer.ahead is not None]
    if not ahead:
        return [Finding(Level.UNKNOWN, "clocks", "not compared: no node could reach another", "not judged")]
    most, node, other = max(ahead, key=lambda difference: abs(difference[0]))
    ahead_of, behind = (other, node) if most > 0 else (node, other)
    found = f"at most {abs(most):.3f} s apart"
    if abs(most) < _SKEW:
        return [Finding(Level.OK, "clocks", found, "times in logs and records can be compared")]
    means = "times in logs and records are misleading"
    advice = "administrator: chronyc tracking on these nodes"
    return [Finding(Level.WARN, "clocks", f"{ahead_of} is {abs(most):.1f} s ahead of {behind}", means, advice)]


def _software(reports: Sequence[NodeReport]) -> list[Finding]:
    none = [report.node for report in reports if not report.torch]
    if none:
        means = "workers cannot start"
        advice = "you: --python with an interpreter that has torch, or --setup LINE, in a configuration file"
        return [Finding(Level.BAD, "software", f"no torch on {some(none)}", means, advice)]
    kinds: dict[str, list[str]] = defaultdict(list)
    for report in reports:
        minor = ".".join(report.python.split(".")[:2])
        kinds[f"torch {report.torch}, Python {minor}, elastic_hpc {report.elastic_hpc}"].append(report.node)
    if len(kinds) > 1:
        found = "; ".join(f"{some(nodes)}: {kind}" for kind, nodes in sorted(kinds.items()))
        means = "the leader refuses agents with another torch or Python"
        advice = "you: --python in an environment on the shared file system"
        return [Finding(Level.BAD, "software", found, means, advice)]
    return [Finding(Level.OK, "software", next(iter(kinds)), "the same on all nodes")]


def _gpus(reports: Sequence[NodeReport]) -> list[Finding]:
    granted = {report.node: report.gpus_granted or "0" for report in reports}
    if set(granted.values()) == {"0"}:
        hidden = [report.node for report in reports if report.gpu_devices]
        found = "no GPUs were requested" + (f"; {some(hidden)} have some" if hidden else "")
        return [Finding(Level.NOTE, "GPUs", found, "not judged", "you: elastic-hpc doctor --run -- --gpus-per-node=N")]
    bare = [report.node for report in reports if int(granted[report.node]) > report.gpu_devices]
    if bare:
        found = f"Slurm granted more GPUs than there are devices /dev/nvidia* on {some(bare)}"
        means = "workers find no GPU: the driver is not loaded, or Slurm's gres.conf is wrong"
        advice = "administrator: nvidia-smi on these nodes; you: --exclude " + ",".join(bare)
        return [Finding(Level.BAD, "GPUs", found, means, advice)]
    kinds = set(granted.values())
    unset = [report.node for report in reports if not report.gpus_visible]
    if len(kinds) > 1 or unset:
        found = ", ".join(
            f"{r.node}: {granted[r.node]} ({r.gpus_visible or 'CUDA_VISIBLE_DEVICES not set'})" for r in reports
        )
        means = "each node must start the same number of workers, on GPUs of its own"
        return [Finding(Level.WARN, "GPUs", found, means, "you: --gpus-per-node=N")]
    return [Finding(Level.OK, "GPUs", f"{kinds.pop()} on each node", "one worker per GPU, unless --nproc-per-node")]
