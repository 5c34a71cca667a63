"""What happened to a job and why: each round's end, what was charged, what was done, and what its user may do. Pure."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.text import Text

from elastic_hpc.membership.events import sentence
from elastic_hpc.membership.known import BY_NAME
from elastic_hpc.membership.rules import SCRIPTS
from elastic_hpc.view.account import MEANINGS
from elastic_hpc.view.brought import Brought
from elastic_hpc.view.job import JobView
from elastic_hpc.view.status import STYLES, first_nodes
from elastic_hpc.view.story import Round, Run, Story
from elastic_hpc.view.times import clock, count, span

SHOWN = frozenset(
    {
        *("take_over", "abdicate", "agent_restart", "joiners", "joiners_cancelled", "growth_problem", "unfit"),
        *("yield", "yielded", "hang_timeout", "apart", "slow", "slow_over"),
        *("resize", "cap", "leave", "stay", "stays", "given_back", "not_given_back", "unseen"),
        *("absent", "barred", "refused", "release", "left", "drain", "request", "store_failed", "stranger", "started"),
    }
)
"""Events that say what was done, or why it was not done."""


def page(view: JobView, story: Story, events: Sequence[Mapping[str, Any]]) -> Text:
    """The whole story of one job."""
    parts = [_head(view, story)]
    runs = {run.number: run for run in story.runs}
    acts = sorted((event for event in events if event["event"] in SHOWN), key=_time)
    last_run = -1
    led = {round.run for round in story.rounds}
    for number, round in enumerate(story.rounds):
        if round.run != last_run:
            last_run = round.run
            parts.append(_run_head(runs.get(last_run), last_run, story))
        following = story.rounds[number + 1] if number + 1 < len(story.rounds) else None
        end = bisect_left(acts, following.formed, key=_time) if following else len(acts)
        shown = acts[bisect_left(acts, round.formed, key=_time) : end]
        parts.append(_round(round, following, runs.get(round.run), story, shown))
    parts.extend(_without_world(run, events, story) for run in story.runs if run.number not in led)
    if view.node_seconds:
        parts.append(_spent(view))
    if view.growth:
        parts.append(_growth(Brought(**view.growth), view.step))
    if advised := advice(view, story):
        parts.append(Text("\nwhat you can do", "bold"))
        parts.extend(Text(f"  * {text}") for text in advised)
    return Text("\n").join(parts)


def _time(event: Mapping[str, Any]) -> float:
    return float(event["time"])


def _head(view: JobView, story: Story) -> Text:
    head = Text.assemble(
        ("job ", "bold"), (view.id, "bold"), f"  {view.script}  ", (view.state, STYLES.get(view.state, "bold"))
    )
    head.append(f"\n{view.note}" if view.note else "")
    if view.output:
        head.append("\nthe last lines of its output")
        head.append("".join(f"\n  {line}" for line in view.output), "dim")
    if not story.runs and not story.rounds:
        return head.append("\nno world was formed" + ("" if view.over else " yet"))
    most = (story.limits.get("max_restarts", "?"), story.limits.get("max_requeues", "?"))
    head.append(f"\nrestarts charged: {story.restarts} of {most[0]}; requeues charged: {story.requeues} of {most[1]}")
    if story.damaged:
        head.append(f"\n{story.damaged} unreadable entries of the record are left out here", "red")
    if not story.rounds:
        head.append("\nno world was formed yet")
    return head


def _run_head(run: Run | None, number: int, story: Story) -> Text:
    if run is None:
        return Text(f"\nrun {number + 1}, whose start is not on record", "bold")
    text = f"\nrun {number + 1}, {clock(run.began)}: {count(run.granted, 'node')}"
    if run.job != story.runs[0].job:
        text += f", {'resumed ' * (run.number in story.resumed)}as Slurm job {run.job}"
    if run.submitted is not None and run.started is not None:
        text += f", after {span(max(0.0, run.started - run.submitted))} in the queue"
    return Text(text, "bold")


def _without_world(run: Run, events: Sequence[Mapping[str, Any]], story: Story) -> Text:
    """A run in which no world was formed: what it waited for."""
    text = _run_head(run, run.number, story)
    for event in events:
        if event["event"] in SHOWN | {"waiting", "join"} and run.began <= event["time"] <= (run.ended or float("inf")):
            text.append(f"\n  {clock(event['time'])[11:]}  {sentence(event['event'], event)}", "not bold dim")
    return text.append(f"\n  no world was formed: {run.reason}" if run.reason else "", "not bold")


def _round(
    round: Round, following: Round | None, run: Run | None, story: Story, events: Sequence[Mapping[str, Any]]
) -> Text:
    nodes = f"{count(len(round.nodes), 'node')} ({first_nodes(round.nodes)})"
    lines = Text.assemble(
        (f"round {round.number}", "bold cyan"),
        f", {clock(round.formed)}: {nodes}, {count(round.world_size, 'worker')}",
    )
    details: list[tuple[str, str]] = []
    if round.first is not None:
        details.append((f"steps {round.first} to {round.last}\n", ""))
    details.extend((f"{clock(event['time'])[11:]}  {sentence(event['event'], event)}\n", "dim") for event in events)
    if round.ended is None:
        details.append(("still running", "green"))
    else:
        details.append((f"ended after {span(round.ended - round.formed)} by: ", ""))
        details.append((f"{round.cause}\n", "red" if round.faults else ""))
        cause = round.faults[0] if round.faults else None
        if cause and cause.traceback:
            details.append((cause.traceback.rstrip() + "\n", "dim"))
        if cause and (known := BY_NAME.get(cause.known)):
            details.append((f"{known.name}, the fault of the {known.party}: {known.what}\n", ""))
        if collateral := "; ".join(str(fault).splitlines()[0][:150] for fault in round.faults[1:]):
            details.append((f"collateral: {collateral}\n", ""))
        details.append(("\n".join(_consequences(round, following, run, story)), ""))
    lines.append("\n  ")
    for text, style in details:
        lines.append(text.replace("\n", "\n  "), style)
    lines.rstrip()
    return lines


def _consequences(round: Round, following: Round | None, run: Run | None, story: Story) -> Iterator[str]:
    if following and following.run == round.run:
        yield f"charged: restart {round.restarts + 1} (--max-restarts)" if round.charged else "charged: nothing"
        before, after = set(round.nodes), set(following.nodes)
        gone = [node for node in round.nodes if node not in after]
        new = [node for node in following.nodes if node not in before]
        changes = [f"without {' '.join(gone)}" if gone else "", f"with {' '.join(new)}" if new else ""]
        what = " and ".join(filter(None, changes)) or "on the same nodes"
        formed = "" if following.gap is None else f"{following.gap:.2f} s later"
        yield f"next: new round {', '.join(filter(None, (what, formed, following.in_place)))}"
    elif run and run.outcome:
        charged = "requeue (--max-requeues)" if run.charged else "nothing"
        yield f"charged: {charged}; next: {_OUTCOMES.get(run.outcome, run.outcome)}"
    if repeated := story.repeated(round):
        in_place = following is not None and following.workers_kept
        since = "" if in_place else f": the last checkpoint was of step {(round.last or 0) - repeated}"
        yield f"{repeated} of its steps were repeated{since}"


_OUTCOMES = {
    "requeue": "the job returned to the queue under its own ID",
    "finished": "the job ended",
    "failed": "the job ended",
}


def _spent(view: JobView) -> Text:
    total = sum(view.node_seconds.values())
    lines = Text("\nwhere the nodes' time went", "bold")
    for kind, meaning in MEANINGS.items():
        if total and (spent := view.node_seconds.get(kind, 0.0)) >= 0.001 * total:
            lines.append(f"\n  {spent / total:6.1%}  {meaning}", "not bold")
    return lines


def _growth(won: Brought, step: int | None) -> Text:
    lines = Text("\nwhat growth gained and cost", "bold")
    lines.append(f"\n  {count(won.joiners, 'joiner')}, {span(won.node_seconds)} of node time in total", "not bold")
    if step is not None:
        lines.append(f"\n  their share of the kept steps: {won.steps:.0f} of {step + 1}", "not bold")
    lines.append(
        f"\n  their arrival: {span(won.standstill)} without a step, in {count(won.came, 'change')}", "not bold"
    )
    if won.taken:
        cost = f"{span(won.taken_standstill)} without a step, {count(won.taken_repeated, 'step')} repeated"
        lines.append(f"\n  preempted, cancelled or lost: {won.taken}; cost: {cost}", "not bold")
    return lines


def advice(view: JobView, story: Story) -> list[str]:
    """What the user may do next, most urgent first."""
    end = [*_about_the_end(story, view.id)]
    if not end and view.over and story.rounds and view.state != "COMPLETED":
        end = [f"continue from the last checkpoint: {_again(view.id)}"]
    return [*view.advice, *end, *_about_causes(story), *_about_time(view, story)]


def _again(id: str) -> str:
    """How to continue the job ``id``. Only jobs of ``elastic-sbatch`` have a Slurm id as their name."""
    if re.fullmatch(r"\d+(_\d+)?", id):
        return f"elastic-sbatch --resume {id}"
    return "start it again; it finds its checkpoints where the script saves them outside the run directory"


def _about_the_end(story: Story, id: str) -> Iterator[str]:
    run = story.runs[-1] if story.runs else None
    if run is None or run.outcome != "failed":
        return
    cause = next((round.faults[0] for round in reversed(story.rounds) if round.faults), None)
    known = BY_NAME.get(cause.known) if cause else None
    resume = _again(id)
    if _is_the_scripts(story) and cause:
        what = f"{known.what};" if known else "fix the script:"
        again = "" if SCRIPTS in run.reason else "it failed twice in the same way without a step in between; "
        yield (
            f"{what} {again}its output: "
            f"elastic-hpc logs {id} --round last --rank {cause.rank if cause.rank is not None else 0}; then continue "
            f"from its last checkpoint: {resume}"
        )
    elif run.cause == "budget":
        yield (
            "check the causes above; if the script is not at fault, continue from the last checkpoint with new "
            f"budgets, --max-restarts and --max-requeues: {resume}"
        )
    if run.cause == "node lost":
        yield f"when nodes are free, continue from the last checkpoint: {resume}"
    if run.cause == "store":
        yield "check that the leader's node has a free port and resolves its own name: elastic-hpc doctor --run"
    if "cannot be requeued" in run.reason:
        yield f"the site or --no-requeue forbids requeues; continue from the last checkpoint: {resume}"


def _about_causes(story: Story) -> Iterator[str]:
    causes = [round.faults[0] for round in story.rounds if round.faults]
    kinds = Counter(fault.kind for fault in causes)
    if kinds["out of memory"]:
        yield "request more memory (--mem), or use less: a smaller batch on each rank, fewer data loader workers"
    for what in (*story.apart, *story.was_slow):
        yield f"report to your administrator: {what}"
    if kinds["hang"] and not story.apart:
        yield "find where the workers hung: their stacks are in the run directory, in logs/*/*.stacks"
    # memory runs out where the job's share is too small, which the advice above covers
    suspects = Counter(fault.node for fault in causes if fault.kind not in {"exception", "out of memory"})
    for node in () if _is_the_scripts(story) else story.barred:
        if {fault.kind for fault in causes if fault.node == node} == {"out of memory"}:
            what = f"memory ran out repeatedly, only on {node}: that node has less memory, or its workers need more"
        else:
            what = f"report {node} to your administrator: workers failed repeatedly, and only there"
        yield f"{what}; exclude the node: --exclude {node}"
    for node, times in suspects.items():
        if times > 1 and node not in story.barred:
            yield f"report {node} to your administrator: the first to fail {times} times; exclude it: --exclude {node}"


def _is_the_scripts(story: Story) -> bool:
    """Whether the job ended because a restart would not have helped."""
    reason = story.runs[-1].reason if story.runs else ""
    return "the same failure as before" in reason or SCRIPTS in reason


def _about_time(view: JobView, story: Story) -> Iterator[str]:
    if story.rounds and all(round.first is None for round in story.rounds) and view.running > 600:
        yield "call report_progress(step) in the script: then elastic-hpc can compute lost time and goodput"
    if view.repeated_steps > 0.1 * (view.step or 0):
        yield f"save more often: {view.repeated_steps} steps were repeated after restarts"
    gaps = [after.gap for before, after in pairwise(story.rounds) if before.run == after.run and after.gap is not None]
    timeout = story.limits.get("heartbeat_timeout", 5.0)
    if gaps and max(gaps) > 10 * timeout and view.max_nodes != view.min_nodes:
        yield f"a new round took {span(max(gaps))} to form: the wait is explained above; --spares keeps nodes ready"
