"""Where the time of a job's nodes went. Pure.

The time of each of the job's own nodes counts from Slurm's grant to the end of the run, even if the node was lost,
because it stays allocated; if the node is given back, until then. The time of a joiner's node counts from the start to
the end of its agent.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from elastic_hpc.view.story import JoinedNode, Round, Run, Story

Kind = Literal["kept", "repeated", "unreported", "start", "workers", "stopping", "forming", "idle", "queue"]

MEANINGS: dict[Kind, str] = {
    "kept": "steps that were kept",
    "repeated": "steps that were repeated",
    "unreported": "training whose steps the script did not report",
    "start": "start of a run, up to its first world",
    "workers": "start of the workers, up to their first step",
    "stopping": "from the last step to the end of the round: noticing, saving",
    "forming": "forming the next world",
    "idle": "nodes outside the world: lost, spare, waiting",
    "queue": "in the queue",
}


@dataclass(frozen=True)
class Phase:
    """What the job did, or what it waited for, from ``start`` to ``end``, in seconds since the epoch."""

    kind: Kind
    start: float
    end: float
    run: Run
    round: Round | None = None
    """The world that trained; None while all nodes waited."""

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Account:
    node_seconds: dict[Kind, float]
    """By kind, without the queue."""
    queued: float
    """Seconds in the queue, before all runs; not those from an end to the submission that resumes the job."""
    ran: float
    """Seconds of all runs."""
    lost: float
    """Seconds after the first step that produced no step which was kept; without the queue and the starts of runs."""
    repeated_steps: int

    @property
    def total(self) -> float:
        return sum(self.node_seconds.values())

    @property
    def goodput(self) -> float | None:
        """Share of the node-seconds that produced steps which were kept; None if steps are not reported."""
        if not self.total or self.node_seconds.get("unreported"):
            return None
        return self.node_seconds.get("kept", 0.0) / self.total


def account(story: Story, now: float | None = None) -> Account:
    """``now``: the end of a running job's account, in seconds since the epoch; None for the time of the last event."""
    return account_of(story, phases(story, now))


def account_of(story: Story, shown: Iterable[Phase]) -> Account:
    """The same, from the ``phases`` of ``story``."""
    spent: Counter[Kind] = Counter()
    first = min((r.first_at for r in story.rounds if r.first is not None), default=float("inf"))
    lost = queued = ran = 0.0
    joined = _Joined(story.joiners)
    for phase in shown:
        if phase.kind == "queue":
            queued += phase.seconds
            continue
        ran += phase.seconds
        allocated = _own(phase) + joined.until(phase.end) - joined.until(phase.start)
        training = len(phase.round.nodes) * phase.seconds if phase.round else allocated
        spent[phase.kind] += training  # type: ignore[assignment]  # Counter takes floats
        spent["idle"] += max(0.0, allocated - training)  # type: ignore[assignment]
        if phase.kind not in {"kept", "unreported", "start"}:
            lost += max(0.0, phase.end - max(first, phase.start))
    return Account(dict(+spent), queued, ran, lost, sum(map(story.repeated, story.rounds)))


def phases(story: Story, now: float | None = None) -> list[Phase]:
    """The phases of the job in order of time; see ``account`` for ``now``."""
    until = max(now or 0.0, story.last_time)
    found: list[Phase] = []
    before: float | None = None
    rounds: dict[int, list[Round]] = defaultdict(list)
    for round in story.rounds:
        rounds[round.run].append(round)
    for number, run in enumerate(story.runs):
        begin = min(run.started or run.began, run.began)
        queued = run.submitted if before is None or run.number in story.resumed else before
        if queued is not None:
            queued = max(queued, before or 0.0)
            found.append(Phase("queue", min(queued, begin), begin, run))
        following = story.runs[number + 1].began if number + 1 < len(story.runs) else until
        before = run.ended if run.ended is not None else following
        found.extend(_of_run(story, run, rounds[run.number], begin, before))
    return [phase for phase in found if phase.seconds > 0]


def _of_run(story: Story, run: Run, rounds: Sequence[Round], begin: float, end: float) -> Iterator[Phase]:
    kind: Kind = "start"
    for round in rounds:
        formed = max(begin, round.formed)
        yield Phase(kind, begin, formed, run)
        begin = end if round.ended is None else max(formed, round.ended)
        yield from _of_round(story, run, round, formed, begin)
        kind = "forming"
    yield Phase(kind, begin, end, run)


def _of_round(story: Story, run: Run, round: Round, begin: float, end: float) -> Iterator[Phase]:
    if round.first is None:
        yield Phase("workers" if story.reports else "unreported", begin, end, run, round)
        return
    first_at = min(max(begin, round.first_at), end)
    last_at = end if round.ended is None else min(max(first_at, round.last_at), end)
    kept, repeated = story.kept(round), story.repeated(round)
    turn = first_at + (last_at - first_at) * kept / max(1, kept + repeated)
    yield Phase("workers", begin, first_at, run, round)
    yield Phase("kept", first_at, turn, run, round)
    yield Phase("repeated", turn, last_at, run, round)
    yield Phase("stopping", last_at, end, run, round)


def _own(phase: Phase) -> float:
    """Node-seconds of the job's own nodes in ``phase``."""
    gone = sum(max(0.0, phase.end - max(phase.start, when)) for when in phase.run.given_back)
    return phase.run.granted * phase.seconds - gone


class _Joined:
    """The time of the joiners' nodes."""

    def __init__(self, joiners: Iterable[JoinedNode]) -> None:
        changes: Counter[float] = Counter()
        for node in joiners:
            changes[node.joined] += 1
            if node.left is not None:
                changes[max(node.joined, node.left)] -= 1
        self._times = sorted(changes)
        self._spent: list[tuple[float, int]] = []
        """At each of these times: the node-seconds before it, and the nodes from then on."""
        spent, nodes, before = 0.0, 0, 0.0
        for when in self._times:
            spent += nodes * (when - before)
            nodes, before = nodes + changes[when], when
            self._spent.append((spent, nodes))

    def until(self, when: float) -> float:
        """Node-seconds before ``when``."""
        at = bisect_right(self._times, when) - 1
        if at < 0:
            return 0.0
        spent, nodes = self._spent[at]
        return spent + nodes * (when - self._times[at])
