"""Whether the nodes reach each other: ports, addresses, names. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from elastic_hpc.doctor.findings import NAMED, Finding, Level, some
from elastic_hpc.doctor.reports import FIRST_PORT, NodeReport, pairs


def port_findings(reports: Sequence[NodeReport]) -> list[Finding]:
    cut, others, detours = defaultdict(list), defaultdict(list), defaultdict(list)
    for report, name, peer in pairs(reports):
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
                "; ".join(f"{node}: {some(names)}" for node, names in sorted(detours.items())[:NAMED]),
                "agents try the address that does not answer first; workers may know no other",
                f"you: --interface {interface}" if interface else "you: --interface IFNAME, of a network that is open",
                {"interface": interface} if interface else {},
            )
        )
    if len(reports) < 2:
        return [Finding(Level.UNKNOWN, "ports", "there was one node alone", "not judged", "you: --run --nodes 2")]
    return findings or [
        Finding(
            Level.OK,
            "ports",
            f"each of {some([report.node for report in reports])} reaches each other",
            "agents and workers can meet",
        )
    ]


def _reach(cut: Mapping[str, Sequence[str]]) -> str:
    parts = [f"{node} cannot reach {some(names)}" for node, names in sorted(cut.items())]
    return some(parts, "; ")


def name_findings(reports: Sequence[NodeReport]) -> list[Finding]:
    own = {report.node: set(report.interfaces.values()) for report in reports}
    wrong = []
    for report, name, peer in pairs(reports):
        if not any(address in own[name] and not address.startswith("127.") for address in peer.resolves):
            wrong.append(f"on {report.node} {name} is {', '.join(peer.resolves) or 'unknown'}")
    renamed = [f"{r.node} calls itself {r.hostname}" for r in reports if _short(r.hostname) != _short(r.node)]
    if wrong:
        return [
            Finding(
                Level.WARN,
                "names",
                some(wrong, "; "),
                "agents use the addresses that each node tells, but plain torchrun and MASTER_ADDR need names",
                "administrator: /etc/hosts or DNS of the nodes; you: --interface IFNAME",
            )
        ]
    if renamed:
        means = "agents go by Slurm's names; a script that looks for its own host name in Slurm's list does not find it"
        return [Finding(Level.NOTE, "names", some(renamed, "; "), means)]
    if len(reports) < 2:
        return []
    return [Finding(Level.OK, "names", "each node's name leads to it on all others", "names and addresses agree")]


def _open_interface(reports: Sequence[NodeReport]) -> str:
    """The interface by which each node is reached from all others; empty if the first choice works, or none does."""
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
