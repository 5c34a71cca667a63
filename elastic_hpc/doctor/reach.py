"""Whether the nodes reach each other: ports, addresses, names. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from elastic_hpc.doctor.findings import NAMED, Finding, Level, some
from elastic_hpc.doctor.reports import FIRST_PORT, Dial, NodeReport, pairs


def port_findings(reports: Sequence[NodeReport]) -> list[Finding]:
    if len(reports) < 2:
        return [Finding(Level.UNKNOWN, "ports", "only one node reported", "not judged", "you: --run --nodes 2")]
    cut, others, detours = defaultdict(list), defaultdict(list), defaultdict(list)
    for report, name, peer in pairs(reports):
        agents, workers = ([dial for dial in peer.dials if dial.any_port is any_port] for any_port in (False, True))
        good = [dial.address for dial in agents if not dial.error]
        if not good:
            cut[report.node].append(f"{name} ({_errors(agents) or peer.error or 'not tried'})")
        elif all(dial.error for dial in workers):
            others[report.node].append(f"{name} ({_errors(workers)})")
        elif agents[0].error:
            detours[report.node].append(f"{name} by {good[0]}, not by {agents[0].address} ({agents[0].error})")
    findings = []
    if cut:
        means = "an agent there cannot take part"
        advice = (
            f"administrator: let nodes reach each other's TCP ports from {FIRST_PORT}; you: --interface, if "
            "another network is open, or --exclude NODE"
        )
        findings.append(Finding(Level.BAD, "ports", _unreached(cut), means, advice))
    if others:
        means = "agents can connect, but workers (gloo, NCCL) use ports that the system chooses"
        advice = "administrator: let nodes reach each other's TCP ports above 1023"
        findings.append(Finding(Level.BAD, "ports of workers", _unreached(others), means, advice))
    if detours:
        findings.append(_detours(detours, _open_interface(reports)))
    nodes = some([report.node for report in reports])
    return findings or [Finding(Level.OK, "ports", f"{nodes} reach each other", "agents and workers can connect")]


def _errors(dials: Sequence[Dial]) -> str:
    return ", ".join(f"{dial.address}:{dial.port} {dial.error}" for dial in dials)


def _unreached(cut: Mapping[str, Sequence[str]]) -> str:
    return some([f"{node} cannot reach {some(names)}" for node, names in sorted(cut.items())], "; ")


def _detours(detours: Mapping[str, Sequence[str]], interface: str) -> Finding:
    found = "; ".join(f"{node}: {some(names)}" for node, names in sorted(detours.items())[:NAMED])
    means = "agents lose time with the address that does not answer; workers may have no other"
    advice = f"you: --interface {interface}" if interface else "you: --interface IFNAME, of a network that is open"
    return Finding(Level.WARN, "addresses", found, means, advice, {"interface": interface} if interface else {})


def name_findings(reports: Sequence[NodeReport]) -> list[Finding]:
    own = {report.node: set(report.interfaces.values()) for report in reports}
    wrong = []
    for report, name, peer in pairs(reports):
        if not any(address in own[name] and not address.startswith("127.") for address in peer.resolves):
            wrong.append(f"{report.node} resolves {name} to {', '.join(peer.resolves) or 'nothing'}")
    renamed = [f"{r.node} calls itself {r.hostname}" for r in reports if _short(r.hostname) != _short(r.node)]
    if wrong:
        means = "agents use the addresses that each node reports, but plain torchrun and MASTER_ADDR need names"
        advice = "administrator: /etc/hosts or DNS of the nodes; you: --interface IFNAME"
        return [Finding(Level.WARN, "names", some(wrong, "; "), means, advice)]
    if renamed:
        means = "agents use Slurm's names; a script does not find its own host name in Slurm's list of nodes"
        return [Finding(Level.NOTE, "names", some(renamed, "; "), means)]
    if len(reports) < 2:
        return []
    return [Finding(Level.OK, "names", "all nodes resolve each node's name", "names and addresses agree")]


def _open_interface(reports: Sequence[NodeReport]) -> str:
    """The interface by which all nodes reach each other; empty if the first choice works, or if none works."""
    node_of = {report.node: report for report in reports}
    worked: dict[str, set[tuple[str, str]]] = defaultdict(set)
    first_failed = False
    for report, name, peer in pairs(reports):
        agents = [dial for dial in peer.dials if not dial.any_port]
        first_failed |= bool(agents and agents[0].error)
        for dial in agents:
            for interface, address in node_of[name].interfaces.items():
                if address == dial.address and not dial.error:
                    worked[interface].add((report.node, name))
    all_pairs = {(report.node, name) for report, name, _ in pairs(reports)}
    return next((name for name, reached in sorted(worked.items()) if first_failed and reached == all_pairs), "")


def _short(name: str) -> str:
    return name.partition(".")[0]
