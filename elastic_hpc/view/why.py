"""Why a job went as it did: each round's end, what was charged, what was done, and what its user may do. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from elastic_hpc.membership.events import sentence
from elastic_hpc.view.account import MEANINGS
from elastic_hpc.view.job import JobView
from elastic_hpc.view.status import STYLES, first_nodes
from elastic_hpc.view.story import Round, Run, Story
from elastic_hpc.view.times import clock, span

_SHOWN = frozenset(
    {
        *("take_over", "abdicate", "agent_restart", "joiners", "joiners_cancelled", "growth_problem", "unfit"),
        *("absent", "barred", "refused", "release", "left", "drain", "request", "store_failed", "stranger", "started"),
    }
)
"""Events that say what was done, or why it was not done."""


def page(view: JobView, story: Story, events: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The whole story of one job."""
    parts: list[RenderableType] = [_head(view, story)]
    runs = {run.number: run for run in story.runs}
    last_run = -1
    led = {round.run for round in story.rounds}
    for number, round in enumerate(story.rounds):
        if round.run != last_run:
            last_run = round.run
            parts.append(_run_head(runs.get(last_run), last_run))
        following = story.rounds[number + 1] if number + 1 < len(story.rounds) else None
        until = following.formed if following else float("inf")
        shown = [event for event in events if event["event"] in _SHOWN and round.formed <= event["time"] < until]
        parts.append(_round(round, following, story, shown))
    parts.extend(_without_world(run, events) for run in story.runs if run.number not in led)
    if view.node_seconds:
        parts.append(_spent(view))
    if advised := advice(view, story):
        parts.append(Text("\nwhat you may do", "bold"))
        parts.extend(Text(f"  * {text}") for text in advised)
    return Group(*parts)


def _head(view: JobView, story: Story) -> Text:
    head = Text.assemble(
        ("job ", "bold"), (view.id, "bold"), f"  {view.script}  ", (view.state, STYLES.get(view.state, "bold"))
    )
    head.append(f"\n{view.note}" if view.note else "")
    if not story.runs and not story.rounds:
        return head.append("\nno world was formed" + ("" if view.over else " yet"))
    most = (story.limits.get("max_restarts", "?"), story.limits.get("max_requeues", "?"))
    head.append(f"\nrestarts charged: {story.restarts} of {most[0]}; requeues charged: {story.requeues} of {most[1]}")
    if story.damaged:
        head.append(f"\n{story.damaged} entries of the record could not be understood and are left out here", "red")
    if not story.rounds:
        head.append("\nno world was formed yet")
    return head


def _run_head(run: Run | None, number: int) -> Text:
    if run is None:
        return Text(f"\nrun {number + 1}, of whose start there is no record", "bold")
    text = f"\nrun {number + 1}, {clock(run.began)}: {run.granted} nodes"
    if run.submitted is not None and run.started is not None:
        text += f", after {span(max(0.0, run.started - run.submitted))} in the queue"
    return Text(text, "bold")


def _without_world(run: Run, events: Sequence[Mapping[str, Any]]) -> Text:
    """A run in which no world was formed: what it waited for."""
    text = _run_head(run, run.number)
    for event in events:
        if event["event"] in _SHOWN | {"waiting", "join"} and run.began <= event["time"] <= (run.ended or float("inf")):
            text.append(f"\n  {clock(event['time'])[11:]}  {sentence(event['event'], event)}", "not bold dim")
    return text.append(f"\n  no world was formed: {run.reason}" if run.reason else "", "not bold")


def _round(round: Round, following: Round | None, story: Story, events: Sequence[Mapping[str, Any]]) -> RenderableType:
    lines = Text.assemble(
        (f"round {round.number}", "bold cyan"),
        f", {clock(round.formed)}: {len(round.nodes)} nodes ({first_nodes(round.nodes)}), {round.world_size} workers",
    )
    details = Text()
    if round.first is not None:
        details.append(f"steps {round.first} to {round.last}\n")
    for event in events:
        details.append(f"{clock(event['time'])[11:]}  {sentence(event['event'], event)}\n", "dim")
    if round.ended is None:
        details.append("still running", "green")
    else:
        details.append(f"ended after {span(round.ended - round.formed)} by: ")
        details.append(f"{round.cause}\n", "red" if round.faults else "")
        cause = round.faults[0] if round.faults else None
        if cause and cause.traceback:
            details.append(cause.traceback.rstrip() + "\n", "dim")
        if collateral := "; ".join(str(fault).splitlines()[0][:150] for fault in round.faults[1:]):
            details.append(f"collateral: {collateral}\n")
        details.append("\n".join(_consequences(round, following, story)))
    for line in details.split():
        lines.append("\n  ").append_text(line)
    return lines


def _consequences(round: Round, following: Round | None, story: Story) -> Iterator[str]:
    run = next((run for run in story.runs if run.number == round.run), None)
    if following and following.run == round.run:
        yield f"charged: restart {round.restarts + 1} (--max-restarts)" if round.charged else "charged: nothing"
        gone = [node for node in round.nodes if node not in following.nodes]
        new = [node for node in following.nodes if node not in round.nodes]
        changes = [f"without {' '.join(gone)}" if gone else "", f"with {' '.join(new)}" if new else ""]
        what = " and ".join(filter(None, changes)) or "of the same nodes"
        yield f"then: a new round {what}" + (
            "" if following.gap is None else f", formed {following.gap:.2f} s after it"
        )
    elif run and run.outcome:
        charged = "requeue (--max-requeues)" if run.charged else "nothing"
        yield f"charged: {charged}; then: {_OUTCOMES.get(run.outcome, run.outcome)}"
    if repeated := story.repeated(round):
        resumed = (round.last or 0) - repeated
        yield f"{repeated} of its steps were done again: the last checkpoint was of step {resumed}"


_OUTCOMES = {
    "requeue": "the job went back to the queue under its own id",
    "finished": "the job was over",
    "failed": "the job was over",
}


def _spent(view: JobView) -> RenderableType:
    total = sum(view.node_seconds.values())
    lines = Text("\nwhere the nodes' time went", "bold")
    for kind, meaning in MEANINGS.items():
        if total and (spent := view.node_seconds.get(kind, 0.0)) >= 0.001 * total:
            lines.append(f"\n  {spent / total:6.1%}  {meaning}", "not bold")
    return lines


def advice(view: JobView, story: Story) -> list[str]:
    """What the user may do next, most urgent first."""
    return [*view.advice, *_about_the_end(story, view.id), *_about_causes(story), *_about_time(view, story)]


def _about_the_end(story: Story, id: str) -> Iterator[str]:
    run = story.runs[-1] if story.runs else None
    if run is None or run.outcome != "failed":
        return
    cause = next((round.faults[0] for round in reversed(story.rounds) if round.faults), None)
    if _is_the_scripts(story) and cause:
        yield (
            f"mend the script: it failed twice in the same way without a step in between; what it wrote: "
            f"elastic-hpc logs {id} --round last --rank {cause.rank if cause.rank is not None else 0}"
        )
    elif run.cause == "budget":
        yield "look at the causes above; if they are nobody's fault, allow more: --max-restarts, --max-requeues"
    if run.cause == "node lost":
        yield "submit it again when there are nodes: it goes on from its last checkpoint"
    if run.cause == "store":
        yield "see whether the leader's node has a free port and answers to its own name: elastic-hpc doctor --run"
    if "cannot be requeued" in run.reason:
        yield "the site or --no-requeue forbids the requeue: submit it again, or chain jobs with --dependency=afterany"


def _about_causes(story: Story) -> Iterator[str]:
    causes = [round.faults[0] for round in story.rounds if round.faults]
    kinds = Counter(fault.kind for fault in causes)
    if kinds["out of memory"]:
        yield "ask for more memory (--mem), or use less: a smaller batch on each rank, fewer data loader workers"
    if kinds["hang"]:
        yield "see where it hung: the workers' stacks are in the round's folder of the run directory, logs/*/*.stacks"
    # memory runs out where the job's share of it is too small, and the advice above says so
    suspects = Counter(fault.node for fault in causes if fault.kind not in {"exception", "out of memory"})
    for node in () if _is_the_scripts(story) else story.barred:
        if {fault.kind for fault in causes if fault.node == node} == {"out of memory"}:
            what = (
                f"memory ran out again and again on {node} alone: that node has less memory, or its workers need more"
            )
        else:
            what = f"tell your administrator of {node}, on which alone workers failed again and again"
        yield f"{what}; leave it out: --exclude {node}"
    for node, count in suspects.items():
        if count > 1 and node not in story.barred:
            yield f"tell your administrator of {node}, the first to fail {count} times; leave it out: --exclude {node}"


def _is_the_scripts(story: Story) -> bool:
    return bool(story.runs) and "the same failure as before" in story.runs[-1].reason


def _about_time(view: JobView, story: Story) -> Iterator[str]:
    if story.rounds and all(round.first is None for round in story.rounds) and view.running > 600:
        yield "have the script call report_progress(step): then lost time and goodput are known"
    if view.repeated_steps > 0.1 * (view.step or 0):
        yield f"save more often: {view.repeated_steps} steps were done again after restarts"
    gaps = [after.gap for before, after in pairwise(story.rounds) if before.run == after.run and after.gap is not None]
    timeout = story.limits.get("heartbeat_timeout", 5.0)
    if gaps and max(gaps) > 10 * timeout and view.max_nodes != view.min_nodes:
        yield f"a new round took {span(max(gaps))} to form: see what was waited for above; --spares keeps nodes ready"
