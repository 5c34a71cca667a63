"""Rounds at scale: the real protocol with hundreds of agents on this machine, against torch's c10d rendezvous.

Every agent is the real membership over real, authenticated TCP connections on loopback; only workers, stores and Slurm
are left out. The leader has a process of its own, all other agents share a second one, so that two cores carry
everything: the CPU of a thousand nodes too. It needs neither Slurm nor root.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _agents import allow_files, rounds_of
from _cluster import BenchmarkError, busy, can_write, figure, kept, machine, positive
from _torch_rounds import torch_rounds
from rich.console import Console
from rich.table import Table

SIZES = (4, 16, 64, 256, 1024)
PEER_SIZES = (4, 16, 64)
"""Sizes at which torch's rendezvous is tried."""

PEER = f"torch c10d {version('torch')}"


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures to show: name, ours, theirs, their ratio."""
    peers = {found["agents"]: found for found in results if found["what"] == "torch c10d"}
    rows = []
    for found in results:
        if found["what"] != "rounds":
            continue
        size, peer = found["agents"], peers.get(found["agents"])
        for key, name in {
            "form_s": "first round after the last arrival",
            "reform_s": "re-form after a loss",
            "take_over_s": "take-over after the loss of the head",
        }.items():
            if key not in found:
                continue
            note = ""
            if key == "take_over_s":
                note = "torch's rendezvous dies with its head"
                if found[key] is None:
                    note = f"not within {found['bound_s']:g} s"
            elif peer and peer[key] is None:
                note = f"torch: not within {peer['bound_s']:g} s"
            elif peer and key == "reform_s":
                note = "torch is told of the loss, which it does not notice by itself"
            theirs = peer.get(key) if peer else None
            rows.append(figure(f"{name}, {size} agents", found[key], PEER, theirs, note=note))
    return rows


COLUMNS = {
    "form_s": ("form, s", "{:.2f}", 1),
    "reform_s": ("re-form, s", "{:.2f}", 1),
    "take_over_s": ("take-over, s", "{:.2f}", 1),
    "reform_messages": ("messages a round", "{:.0f}", 1),
    "reform_bytes": ("KB a round", "{:.0f}", 1e-3),
    "reform_cpu_s": ("leader's CPU a round, s", "{:.2f}", 1),
    "agents_reform_cpu_s": ("all others' CPU a round, s", "{:.2f}", 1),
    "idle_cpu_share": ("leader's CPU idle, %", "{:.1f}", 100),
    "leader_rss_mib": ("leader, MiB", "{:.0f}", 1),
}


FORMS = {"ours": ".3f", "theirs": ".2f", "ratio": ".0f"}


def show(results: list[dict[str, Any]], console: Console) -> None:
    shown = Table(title="Rounds: the leader alone in one process, all other agents in another")
    shown.add_column("agents", justify="right")
    for heading, _, _ in COLUMNS.values():
        shown.add_column(heading, justify="right")
    for found in (one for one in results if one["what"] == "rounds"):
        cells = [
            text.format(found[key] * by) if found.get(key) is not None else "-"
            for key, (_, text, by) in COLUMNS.items()
        ]
        shown.add_row(str(found["agents"]), *cells)
    console.print(shown)
    compared = Table(title="Against torch's c10d rendezvous, seconds")
    for heading in ("what", "ours", "theirs", "theirs / ours", "note"):
        compared.add_column(heading, justify="left" if heading in {"what", "note"} else "right")
    for one in table(results):
        figures = ("-" if one[key] is None else f"{one[key]:{form}}" for key, form in FORMS.items())
        compared.add_row(one["name"], *figures, one["note"])
    console.print(compared)


def sizes(text: str) -> tuple[int, ...]:
    try:
        found = tuple(map(positive, text.split(",")))
    except argparse.ArgumentTypeError:
        found = ()
    if not found or min(found) < 3:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of agents from 3 upwards, for example 4,64,1024")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""figures:
  form       from the last arrival until every agent has its place in the first round
  re-form    from the loss of one agent, whose connection is closed, until all others have their place in the next round
  take-over  from the death of the leader's process until all others have their place in a round of the next leader
  a round    what the leader sends and hears, and its CPU, for one re-form

examples:
  benchmarks/scale.py
  benchmarks/scale.py --sizes 256,1024 --json scale.json
  benchmarks/scale.py --sizes 1024 --late 60           the head starts a minute after all others
  benchmarks/scale.py --sizes 1024 --profile leader.prof""",
    )
    parser.add_argument(
        "--sizes", type=sizes, default=SIZES, metavar="N,...", help="numbers of agents (default: 4,16,64,256,1024)"
    )
    parser.add_argument(
        "--bound", type=positive, default=30, metavar="S", help="give up after S seconds each (default: %(default)s)"
    )
    parser.add_argument("--late", type=positive, default=0, metavar="S", help="the head starts S seconds late")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write the leader's cProfile, without a take-over")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results and where they were measured")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    asked = parse(argv)
    if not can_write(asked.json):
        return 2
    allow_files()
    where = {**machine(), "busy_before": busy()}
    results: list[dict[str, Any]] = []
    console = Console(width=None if sys.stdout.isatty() else 140)
    problems = []
    with kept(results):
        for size in asked.sizes:
            try:
                results.append(rounds_of(size, asked.bound, late=asked.late, profile=asked.profile))
            except BenchmarkError as error:
                problems.append(f"{size} agents: {error}")
                print(f"scale.py: {problems[-1]}", file=sys.stderr)
            if size in PEER_SIZES and not (asked.late or asked.profile):
                results.append(torch_rounds(size, asked.bound))
    show(results, console)
    console.print(
        f"{where['date']}: torch {where['torch']}, Python {where['python']}, {where['cores']} cores; "
        f"others used {where['busy_before']:.0%} of them before"
    )
    if asked.json:
        asked.json.write_text(json.dumps({"machine": where, "rows": results, "table": table(results)}, indent=1) + "\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
