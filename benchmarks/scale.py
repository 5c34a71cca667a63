"""Rounds at scale: the real protocol with hundreds of agents on this machine, against torch's c10d rendezvous.

Every agent is the real membership over real, authenticated TCP connections on loopback; only workers, stores and Slurm
are left out. The leader and the node that takes over have a process each, all other agents share a third one, so that
two cores carry the load of a thousand nodes. It needs neither Slurm nor root.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from typing import Any

from _agents import allow_files, rounds_of
from _report import (
    BenchmarkError,
    busy,
    figure,
    kept,
    machine,
    origin,
    parser_with,
    positive,
    show,
    table_of,
    write_json,
)
from _torch_rounds import torch_rounds

SIZES = (4, 16, 64, 256, 1024)
PEER_SIZES = (4, 16, 64)
"""Numbers of agents with which torch's rendezvous is measured."""

PEER = f"torch c10d {version('torch')}"


def lines(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For run.py's table."""
    peers = {result["agents"]: result for result in results if result["what"] == "torch c10d"}
    rows = []
    for result in results:
        if result["what"] != "rounds":
            continue
        size, peer = result["agents"], peers.get(result["agents"])
        for key, name in {
            "form_s": "first round after the last arrival",
            "reform_s": "re-form after a loss",
            "take_over_s": "take-over after the loss of the head",
        }.items():
            note = ""
            if key == "take_over_s":
                note = "torch's rendezvous dies with its head"
                if result[key] is None:
                    note = f"not within {result['bound_s']:g} s"
            elif peer and peer[key] is None:
                note = f"torch: not within {peer['bound_s']:g} s"
            elif peer and key == "reform_s":
                note = "the benchmark reports the loss to torch, which does not notice it"
            theirs = peer.get(key) if peer else None
            rows.append(figure(f"{name}, {size} agents", result[key], PEER, theirs, note=note))
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


def show_all(results: list[dict[str, Any]]) -> None:
    headings = ("agents", *(heading for heading, _, _ in COLUMNS.values()))
    rounds = table_of("Rounds: the leader and its successor in a process each, all other agents in a third", headings)
    for result in results:
        if result["what"] == "rounds":
            values = ((result.get(key), text, by) for key, (_, text, by) in COLUMNS.items())
            cells = ("-" if value is None else text.format(value * by) for value, text, by in values)
            rounds.add_row(str(result["agents"]), *cells)
    show(rounds)
    headings = ("what", "ours", "theirs", "theirs / ours", "note")
    compared = table_of("Against torch's c10d rendezvous, seconds", headings, left=("what", "note"))
    for line in lines(results):
        figures = ("-" if line[key] is None else f"{line[key]:{form}}" for key, form in FORMS.items())
        compared.add_row(line["name"], *figures, line["note"])
    show(compared)


def sizes(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(map(positive, text.split(",")))
    except argparse.ArgumentTypeError:
        numbers = ()
    if not numbers or min(numbers) < 4:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of agents from 4 upwards, for example 4,64,1024")
    return numbers


FIGURES = {
    "form": "from the last arrival until every agent has its place in the first round",
    "re-form": "from the loss of an agent, whose connection is closed, until all others have one in the next round",
    "take-over": "from the death of the leader's process until all others have one in a round of the next leader",
    "a round": "what the leader sends and receives, and its CPU, for one re-form",
}


def parse_arguments() -> argparse.Namespace:
    parser = parser_with(
        __doc__,
        {"figures:": "", **FIGURES},
        "benchmarks/scale.py",
        "benchmarks/scale.py --sizes 256,1024 --json scale.json",
    )
    parser.add_argument(
        "--sizes", type=sizes, default=SIZES, metavar="N,...", help="numbers of agents (default: 4,16,64,256,1024)"
    )
    parser.add_argument(
        "--bound", type=positive, default=30, metavar="S", help="give up after S seconds each (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    allow_files()
    where = {**machine(), "busy_before": busy()}
    results: list[dict[str, Any]] = []
    problems = []
    with kept(results):
        for size in args.sizes:
            try:
                results.append(rounds_of(size, args.bound))
            except BenchmarkError as error:
                problems.append(f"{size} agents: {error}")
                print(f"scale.py: {problems[-1]}", file=sys.stderr)
            if size in PEER_SIZES:
                results.append(torch_rounds(size, args.bound))
    show_all(results)
    print(origin(where, [where["busy_before"]]))
    write_json(args.json, {"machine": where, "rows": results, "table": lines(results)})
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
