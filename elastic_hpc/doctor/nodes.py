"""What the reports of the nodes mean for elastic jobs. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

from elastic_hpc.doctor.reports import FIRST_PORT, Peer, Report, Run
from elastic_hpc.doctor.slurm_settings import Finding, Level

_NAMED = 6  # of many nodes or pairs; the others are counted
_SKEW = 5.0
_SLOW_SEEN = 2.0


def run_findings(run: Run, log_dir: str) -> list[Finding]:
    findings = [_requeue(run), _reported(run, log_dir)]
    if not run.reports:
        return findings
    checks = (_ports, _names, _file_system, _clocks, _software, _gpus)
    return [*findings, *(finding for check in checks for finding in check(run.reports))]


def _requeue(run: Run) -> Finding:
    if run.may_requeue:
        return Finding(Level.OK, "requeue", "Requeue = 1 for a job with --requeue", "jobs may come back by themselves")
    return Finding(
        Level.WARN,
        "requeue",
        "Requeue = 0 for a job with --requeue",
        "Slurm does not let jobs back into the queue: a new job with another id goes on in the place of one that must",
        "administrator, slurm.conf: JobRequeue=1, and no submission filter that takes --requeue back",
    )


def _reported(run: Run, log_dir: str) -> Finding:
    missing = sorted(set(run.nodes) - {report.node for report in run.reports})
    whole = run.said.get("", "")
    if not run.reports:
        return Finding(
            Level.BAD,
            "nodes",
            f"no node of {_some(run.nodes) or 'the job'} has reported; the job ended as {run.ended}"
            + (f"; {whole}" if whole else ""),
            "an elastic job could not start: its nodes must share the run directory, and the Python",
            f"you: --log-dir DIR that all nodes share (now {log_dir}); --python, --setup in a configuration file",
        )
    if missing:
        why = _some([run.said[node] for node in missing if node in run.said], "; ") or whole
        return Finding(
            Level.BAD,
            "nodes",
            f"{_some(missing)} never reported" + (f": {why}" if why else ""),
            "the agent there could not start either",
            "you: --exclude " + ",".join(missing) + "; administrator: look at the shared file systems there",
        )
    problems = [f"{report.node}: {problem}" for report in run.reports for problem in report.problems]
    if problems:
        return Finding(
            Level.BAD, "nodes", _some(problems, "; "), "an agent could not take part there", "you: see what is said"
        )
    return Finding(Level.OK, "nodes", f"{_some(run.nodes)} reported", "an agent can start on each")


def _ports(reports: Sequence[Report]) -> list[Finding]:
    cut, others, detours = defaultdict(list), defaultdict(list), defaultdict(list)
    for report, name, peer in _pairs(reports):
        agents = [dial for dial in peer.dials if not dial.any_port]
        good = [dial.address for dial in agents if not dial.error]
        if not good:
            tried = ", ".join(f"{dial.address}:{dial.port} {dial.error}" for dial in agents) or peer.error
            cut[report.node].append(f"{name} ({tried or 'not tried'})")
        elif not any(not dial.error for dial in peer.dials if dial.any_port):
            tried = ", ".join(f"{dial.address}:{dial.port} {dial.error}" for dial in peer.dials if dial.any_port)
            others[report.node].append(f"{name} ({tried})")
        elif agents[0].error:
            detours[report.node].append(f"{name} by {good[0]}, not by {agents[0].address} ({agents[0].error})")
    findings = []
    if cut:
        findings.append(
            Finding(
                Level.BAD,
                "ports",
                _reach(cut),
                "an agent there cannot take part",
                f"administrator: let nodes reach each other's TCP ports from {FIRST_PORT}; you: --interface, if "
                "another network is open, or --exclude NODE",
            )
        )
    if others:
        findings.append(
            Finding(
                Level.BAD,
                "ports of workers",
                _reach(others),
                "agents meet, but workers (gloo, NCCL) talk over ports that the system chooses",
                "administrator: let nodes reach each other's TCP ports above 1023",
            )
        )
    if detours:
        interface = _open_interface(reports)
        findings.append(
            Finding(
                Level.WARN,
                "addresses",
                "; ".join(f"{node}: {_some(names)}" for node, names in sorted(detours.items())[:_NAMED]),
                "agents try the address that does not answer first; workers may know no other",
                f"you: --interface {interface}" if interface else "you: --interface IFNAME, of a network that is open",
                {"interface": interface} if interface else {},
            )
        )
    if len(reports) < 2:
        return [Finding(Level.UNKNOWN, "ports", "there was one node alone", "not judged", "you: --run --nodes 2")]
    return findings or [
        Finding(Level.OK, "ports", f"each of {_names_of(reports)} reaches each other", "agents and workers can meet")
    ]


def _reach(cut: Mapping[str, Sequence[str]]) -> str:
    parts = [f"{node} cannot reach {_some(names)}" for node, names in sorted(cut.items())]
    return _some(parts, "; ")


def _names(reports: Sequence[Report]) -> list[Finding]:
    own = {report.node: set(report.interfaces.values()) for report in reports}
    wrong = []
    for report, name, peer in _pairs(reports):
        if not any(address in own[name] and not address.startswith("127.") for address in peer.resolves):
            wrong.append(f"on {report.node} {name} is {', '.join(peer.resolves) or 'unknown'}")
    renamed = [f"{r.node} calls itself {r.hostname}" for r in reports if _short(r.hostname) != _short(r.node)]
    if wrong:
        return [
            Finding(
                Level.WARN,
                "names",
                _some(wrong, "; "),
                "agents use the addresses that each node tells, but plain torchrun and MASTER_ADDR need names",
                "administrator: /etc/hosts or DNS of the nodes; you: --interface IFNAME",
            )
        ]
    if renamed:
        means = "agents go by Slurm's names; a script that looks for its own host name in Slurm's list does not find it"
        return [Finding(Level.NOTE, "names", _some(renamed, "; "), means)]
    if len(reports) < 2:
        return []
    return [Finding(Level.OK, "names", "each node's name leads to it on all others", "names and addresses agree")]


def _file_system(reports: Sequence[Report]) -> list[Finding]:
    makers = [report.node for report in reports if report.created]
    if len(makers) != 1:
        return [
            Finding(
                Level.BAD,
                "file system",
                f"{_some(makers) or 'no node'} made the one file that all tried to make (O_EXCL)",
                "two agents could both take themselves for the first",
                "you: --log-dir DIR, on another file system",
            )
        ]
    if len(reports) < 2:
        return [Finding(Level.UNKNOWN, "file system", "there was one node alone", "not judged", "you: --nodes 2")]
    seen = [(report.node, name, peer) for report, name, peer in _pairs(reports)]
    times = [peer.seen_after for _, _, peer in seen if peer.seen_after is not None]
    late = [f"{node}: a file of {name}" for node, name, peer in seen if peer.dials and peer.seen_after is None]
    free = [f"{node}: the lock of {name}" for node, name, peer in seen if peer.lock_held is False]
    if not times:
        return [Finding(Level.UNKNOWN, "file system", "nodes could not agree on a file to look for", "see ports")]
    found = f"a file of one node was seen by others after at most {max(times):.2f} s"
    findings = []
    if max(times) > _SLOW_SEEN:
        findings.append(
            Finding(
                Level.WARN,
                "file system",
                found,
                "verdicts and checkpoints are seen that much later",
                "you: --log-dir DIR, on another file system; administrator: the mount's attribute cache (actimeo)",
            )
        )
    elif late and not _is_cut(seen):
        findings.append(
            Finding(Level.WARN, "file system", f"not seen: {_some(late, '; ')}", "a record may be incomplete there")
        )
    else:
        findings.append(
            Finding(Level.OK, "file system", found, "all nodes see the run directory; O_EXCL and rename work")
        )
    if free:
        findings.append(
            Finding(
                Level.NOTE,
                "flock",
                f"not felt on {_some(free, '; ')}",
                "elastic_hpc locks nothing between nodes; a script of yours that does is not protected",
            )
        )
    return findings


def _is_cut(seen: Iterable[tuple[str, str, Peer]]) -> bool:
    return any(all(dial.error for dial in peer.dials) for _, _, peer in seen)


def _clocks(reports: Sequence[Report]) -> list[Finding]:
    ahead = [(peer.ahead, report.node, name) for report, name, peer in _pairs(reports) if peer.ahead is not None]
    if not ahead:
        return [Finding(Level.UNKNOWN, "clocks", "not compared: no node could ask another", "not judged")]
    most, node, other = max(ahead, key=lambda each: abs(each[0]))
    ahead_of, behind = (other, node) if most > 0 else (node, other)
    found = f"at most {abs(most):.3f} s apart"
    if abs(most) < _SKEW:
        return [Finding(Level.OK, "clocks", found, "times in logs and records can be compared")]
    return [
        Finding(
            Level.WARN,
            "clocks",
            f"{ahead_of} is {abs(most):.1f} s ahead of {behind}",
            "times in logs and records mislead",
            "administrator: chronyc tracking on these nodes",
        )
    ]


def _software(reports: Sequence[Report]) -> list[Finding]:
    none = [report.node for report in reports if not report.torch]
    if none:
        return [
            Finding(
                Level.BAD,
                "software",
                f"no torch on {_some(none)}",
                "workers cannot start",
                "you: --python with an interpreter that has it, or --setup LINE, in a configuration file",
            )
        ]
    kinds: dict[str, list[str]] = defaultdict(list)
    for report in reports:
        minor = ".".join(report.python.split(".")[:2])
        kinds[f"torch {report.torch}, Python {minor}, elastic_hpc {report.elastic_hpc}"].append(report.node)
    if len(kinds) > 1:
        return [
            Finding(
                Level.BAD,
                "software",
                "; ".join(f"{_some(nodes)}: {kind}" for kind, nodes in sorted(kinds.items())),
                "agents with another torch or Python are refused",
                "you: --python in an environment on the shared file system",
            )
        ]
    return [Finding(Level.OK, "software", next(iter(kinds)), "the same on all nodes")]


def _gpus(reports: Sequence[Report]) -> list[Finding]:
    granted: Callable[[Report], str] = lambda report: report.gpus_granted or "0"  # noqa: E731
    if all(granted(report) == "0" for report in reports):
        hidden = [report.node for report in reports if report.gpu_devices]
        found = "none were asked for" + (f"; there are some on {_some(hidden)}" if hidden else "")
        return [Finding(Level.NOTE, "GPUs", found, "not judged", "you: elastic-hpc doctor --run -- --gpus-per-node=N")]
    bare = [report.node for report in reports if int(granted(report)) > report.gpu_devices]
    if bare:
        return [
            Finding(
                Level.BAD,
                "GPUs",
                f"Slurm granted more than there are /dev/nvidia* on {_some(bare)}",
                "workers find no GPU: the driver is not loaded, or Slurm's gres.conf is wrong",
                "administrator: nvidia-smi on these nodes; you: --exclude " + ",".join(bare),
            )
        ]
    kinds = {granted(report) for report in reports}
    unset = [report.node for report in reports if not report.gpus_visible]
    if len(kinds) > 1 or unset:
        found = ", ".join(
            f"{r.node}: {granted(r)} ({r.gpus_visible or 'CUDA_VISIBLE_DEVICES not set'})" for r in reports
        )
        means = "each node must start the same number of workers, on GPUs of its own"
        return [Finding(Level.WARN, "GPUs", found, means, "you: --gpus-per-node=N")]
    return [Finding(Level.OK, "GPUs", f"{kinds.pop()} on each node", "one worker per GPU, unless --nproc-per-node")]


def _open_interface(reports: Sequence[Report]) -> str:
    """The interface by which each node is reached from all others; empty if the first choice works, or none does."""
    node_of = {report.node: report for report in reports}
    worked: dict[str, set[tuple[str, str]]] = defaultdict(set)
    first_failed = False
    for report, name, peer in _pairs(reports):
        agents = [dial for dial in peer.dials if not dial.any_port]
        first_failed |= bool(agents and agents[0].error)
        for dial in agents:
            for interface, address in node_of[name].interfaces.items():
                if address == dial.address and not dial.error:
                    worked[interface].add((report.node, name))
    pairs = {(report.node, name) for report, name, _ in _pairs(reports)}
    return next((name for name, reached in sorted(worked.items()) if first_failed and reached == pairs), "")


def _pairs(reports: Sequence[Report]) -> list[tuple[Report, str, Peer]]:
    """Every ordered pair of nodes that have reported, with what the first saw of the second."""
    names = {report.node: report for report in reports}
    both = [pair for a, b in combinations(sorted(names), 2) for pair in ((a, b), (b, a))]
    return [(names[a], b, names[a].peers.get(b, Peer(error="was not there in time"))) for a, b in both]


def _names_of(reports: Sequence[Report]) -> str:
    return _some([report.node for report in reports])


def _short(name: str) -> str:
    return name.partition(".")[0]


def _some(names: Sequence[str], separator: str = ", ") -> str:
    """The first few of ``names``; the others are counted."""
    more = len(names) - _NAMED
    return separator.join(names[:_NAMED]) + (f"{separator}and {more} more" if more > 0 else "")
