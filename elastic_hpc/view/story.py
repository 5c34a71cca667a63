"""The story of a job, from the events of its record: runs, rounds, faults, steps. Pure.

What is damaged, or was written by another version, is left out and counted: the rest is told all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Fault:
    """A worker that failed, or a node that was lost."""

    time: float
    node: str
    kind: str
    """``node lost``, or that of the failure: ``exception``, ``out of memory``, ``signal``, ``exit``, ``hang``, ..."""
    message: str
    rank: int | None = None
    traceback: str = ""
    collateral: bool = False
    """The echo of another one."""

    def __str__(self) -> str:
        return (
            f"{self.node} lost: {self.message}"
            if self.rank is None
            else f"rank {self.rank} on {self.node}: {self.message}"
        )


@dataclass(frozen=True)
class Sample:
    """How far the workers were at ``time``."""

    time: float
    step: int
    loss: float | None


@dataclass(frozen=True)
class Round:
    """One formation of the world. Times are seconds since the epoch."""

    number: int
    run: int
    nodes: tuple[str, ...]
    world_size: int
    restarts: int
    """Charged before it was formed."""
    formed: float
    gap: float | None
    """Seconds from what ended the round before, or from the start of the run, to the forming of this one."""
    leader: str = ""
    broken: float | None = None
    """When what ended it happened, as far as is known: a lost node was heard of last."""
    ended: float | None = None
    """When its workers were told to stop, or had finished."""
    cause: str = ""
    """What ended it, empty while it runs."""
    charged: bool = False
    """Whether its end was charged to ``--max-restarts``."""
    first: int | None = None
    """The first step that its workers reported, None for none; and when."""
    first_at: float = 0.0
    samples: tuple[Sample, ...] = ()
    faults: tuple[Fault, ...] = ()
    """What went wrong, the cause first, then what was collateral."""
    drained: str = ""
    """Why its workers were asked to save and stop."""

    @property
    def last(self) -> int | None:
        """The last step that is known of."""
        return self.samples[-1].step if self.samples else None

    @property
    def last_at(self) -> float:
        return self.samples[-1].time if self.samples else self.first_at

    @property
    def loss(self) -> float | None:
        return next((sample.loss for sample in reversed(self.samples) if sample.loss is not None), None)


@dataclass(frozen=True)
class Run:
    """What happened between two passes through the queue. Times are seconds since the epoch, None for unknown."""

    number: int
    job: str
    granted: int
    """The job's own nodes."""
    began: float
    """When the first leader was there."""
    submitted: float | None = None
    """When the job was put into the queue for it."""
    started: float | None = None
    """When Slurm gave it its nodes."""
    ends: float | None = None
    """Its time limit."""
    ended: float | None = None
    outcome: str = ""
    """``finished``, ``failed``, ``requeue``, or empty while it runs, or if nobody was left to say."""
    cause: str = ""
    reason: str = ""
    charged: bool = False
    """Whether its requeue was charged to ``--max-requeues``."""


@dataclass(frozen=True)
class Joiner:
    """A node that a job of its own brought, and while it was there."""

    node: str
    joined: float
    left: float | None = None


@dataclass(frozen=True)
class Story:
    """Everything that the record tells."""

    runs: tuple[Run, ...] = ()
    rounds: tuple[Round, ...] = ()
    joiners: tuple[Joiner, ...] = ()
    limits: Mapping[str, Any] = field(default_factory=dict)
    """What the user asked for, with the names of ``decide.Policy``; empty if that is not known."""
    restarts: int = 0
    requeues: int = 0
    last_time: float = 0.0
    """Of the last event."""
    damaged: int = 0
    """Events that could not be understood."""

    @property
    def current(self) -> Round | None:
        """The round that runs."""
        return self.rounds[-1] if self.rounds and self.rounds[-1].ended is None else None

    def kept(self, round: Round) -> int:
        """How many of its steps no later round did again."""
        if round.first is None or round.last is None:
            return 0
        return max(0, min(round.last + 1, self._resumed_at.get(round.number, round.last + 1)) - round.first)

    @cached_property
    def _resumed_at(self) -> dict[int, int]:
        """The lowest step that a round after this one began with."""
        found: dict[int, int] = {}
        lowest: int | None = None
        for one in reversed(self.rounds):
            if lowest is not None:
                found[one.number] = lowest
            if one.first is not None:
                lowest = one.first if lowest is None else min(lowest, one.first)
        return found

    def repeated(self, round: Round) -> int:
        """How many of its steps were done again."""
        return (
            round.last - round.first + 1 - self.kept(round) if round.first is not None and round.last is not None else 0
        )

    @property
    def steps_per_second(self) -> float | None:
        """Of the last round, lately; None if that is not reported."""
        if not self.rounds or len(self.rounds[-1].samples) < 2:
            return None
        samples = self.rounds[-1].samples
        last = samples[-1]
        before = next((s for s in reversed(samples) if last.time - s.time >= _LATELY), samples[0])
        return (last.step - before.step) / (last.time - before.time) if last.time > before.time else None


_LATELY = 30.0
"""Seconds over which the speed is told."""


def tell(events: Iterable[Mapping[str, Any]], damaged: int = 0) -> Story:
    """The story of ``events``, oldest first; ``damaged`` lines could not be read."""
    told = _Telling()
    for event in events:
        try:
            told.on_event(event)
        except (KeyError, TypeError, ValueError, AttributeError):
            damaged += 1
    return replace(told.story(), damaged=damaged)


class _Telling:
    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._rounds: list[Round] = []
        self._joiners: dict[str, Joiner] = {}
        self._gone: list[Joiner] = []
        self._limits: Mapping[str, Any] = {}
        self._broken: float | None = None
        self._restarts = self._requeues = 0
        self._last = 0.0

    def story(self) -> Story:
        return Story(
            runs=tuple(self._runs),
            rounds=tuple(self._rounds),
            joiners=(*self._gone, *self._joiners.values()),
            limits=self._limits,
            restarts=self._restarts,
            requeues=self._requeues,
            last_time=self._last,
        )

    def on_event(self, event: Mapping[str, Any]) -> None:
        when = float(event["time"])
        handle = getattr(self, f"_on_{event['event']}", None)
        if handle:
            handle(event, when)
        self._last = max(self._last, when)

    @property
    def _round(self) -> Round | None:
        return self._rounds[-1] if self._rounds and self._rounds[-1].ended is None else None

    def _change(self, **changes: Any) -> None:
        if self._round:
            self._rounds[-1] = replace(self._rounds[-1], **changes)

    def _on_start(self, event: Mapping[str, Any], when: float) -> None:
        run = Run(number=int(event["run"]), job=str(event["job"]), granted=int(event["granted"]), began=when)
        if self._round:  # the run before was cut off: nobody was left to say how it ended
            self._end(self._last, "its end is not on record", self._restarts)
        if self._runs and self._runs[-1].ended is None:
            self._runs[-1] = replace(self._runs[-1], ended=self._last)
        self._leave(None, when)
        self._runs.append(run)
        self._broken = when
        self._limits = {
            k: v for k, v in event.items() if k not in {"time", "event", "version", "run", "job", "granted"}
        }

    def _on_allocation(self, event: Mapping[str, Any], _when: float) -> None:
        moments = ("submitted", "started", "ends")
        known: dict[str, Any] = {name: None if event[name] is None else float(event[name]) for name in moments}
        if self._runs and self._runs[-1].number == event["run"]:
            self._runs[-1] = replace(self._runs[-1], **known)

    def _on_join(self, event: Mapping[str, Any], when: float) -> None:
        if event.get("joiner"):
            self._joiners.setdefault(str(event["node"]), Joiner(str(event["node"]), when))

    def _leave(self, node: str | None, when: float) -> None:
        for name in [node] if node else list(self._joiners):
            if known := self._joiners.pop(name, None):
                self._gone.append(replace(known, left=when))

    def _on_left(self, event: Mapping[str, Any], when: float) -> None:
        self._leave(str(event["node"]), when)

    _on_release = _on_left

    def _on_lost(self, event: Mapping[str, Any], when: float) -> None:
        node = str(event["node"])
        self._leave(node, when)
        if self._round and node in self._round.nodes:
            since = when - float(event["silent"])
            self._broken = self._broken or since
            self._add_fault(Fault(since, node, "node lost", str(event["reason"])), cause=not self._round.faults)

    def _on_failure(self, event: Mapping[str, Any], when: float) -> None:
        self._broken = self._broken or when
        known = {name: event[name] for name in ("kind", "message", "rank", "traceback", "collateral")}
        self._add_fault(Fault(when, str(event["node"]), **known), cause=bool(event["first"]))

    def _add_fault(self, fault: Fault, *, cause: bool) -> None:
        if self._round:
            known = self._round.faults
            self._change(faults=(fault, *known) if cause else (*known, fault))

    def _on_drain(self, event: Mapping[str, Any], _when: float) -> None:
        self._change(drained=str(event["reason"]))

    def _on_request(self, event: Mapping[str, Any], _when: float) -> None:
        self._change(drained=f"{event['request']}: {event['reason']}")

    def _on_take_over(self, event: Mapping[str, Any], when: float) -> None:
        if self._round and not self._round.faults:  # the leader was lost, and nobody was there to say so
            self._broken = self._broken or when
            reason = str(event["reason"])
            node, _, why = reason.partition(" lost: ")
            self._add_fault(Fault(when, node if why else self._round.leader, "node lost", why or reason), cause=True)

    def _on_progress(self, event: Mapping[str, Any], when: float) -> None:
        if not self._round or event["round"] != self._round.number or "step" not in event:
            return
        loss = event.get("loss")
        seen = Sample(float(event["step_at"]) or when, int(event["step"]), None if loss is None else float(loss))
        samples = self._round.samples
        first_at = float(event["first_at"])
        if not samples:
            self._extend_before(int(event["first"]))
            if seen.step > event["first"]:
                samples = (Sample(first_at, int(event["first"]), None),)
        self._change(first=int(event["first"]), first_at=first_at, samples=(*samples, seen))

    def _extend_before(self, first: int) -> None:
        """Who goes on at step ``first`` had a checkpoint of the one before, also if the leader that knew is lost."""
        index = max((i for i, one in enumerate(self._rounds[:-1]) if one.samples), default=None)
        if index is None:
            return
        before = self._rounds[index]
        begin, last = before.samples[0], before.samples[-1]
        if first <= last.step + 1:
            return
        at = before.broken or before.ended or last.time
        if last.step > begin.step:
            at = min(at, last.time + (first - 1 - last.step) * (last.time - begin.time) / (last.step - begin.step))
        self._rounds[index] = replace(before, samples=(*before.samples, Sample(max(at, last.time), first - 1, None)))

    def _on_round(self, event: Mapping[str, Any], when: float) -> None:
        made = Round(
            number=int(event["round"]),
            run=self._runs[-1].number if self._runs else 0,
            nodes=tuple(map(str, event["nodes"])),
            world_size=int(event["world_size"]),
            restarts=int(event["restarts"]),
            formed=when,
            gap=None if self._broken is None else max(0.0, when - self._broken),
            leader=str(event["leader"] or ""),
        )
        if self._round:
            self._end(when, "its end is not on record", made.restarts)
        self._broken = None
        self._rounds.append(made)

    def _on_restart(self, event: Mapping[str, Any], when: float) -> None:
        self._end(when, str(event["reason"]), int(event["restarts"]))

    def _end(self, when: float, cause: str, restarts: int) -> None:
        self._broken = self._broken or when
        if before := self._round:
            self._change(ended=when, broken=self._broken, cause=cause, charged=restarts > before.restarts)
        self._restarts = max(self._restarts, restarts)

    def _on_verdict(self, event: Mapping[str, Any], when: float) -> None:
        said: dict[str, Any] = {name: str(event[name]) for name in ("outcome", "cause", "reason")}
        self._end(when, said["reason"], int(event["restarts"]))
        charged = int(event["requeues"]) > self._requeues
        self._requeues = int(event["requeues"])
        self._leave(None, when)
        if self._runs:
            self._runs[-1] = replace(self._runs[-1], ended=when, charged=charged, **said)
