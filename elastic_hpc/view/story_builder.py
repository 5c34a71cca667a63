"""Makes the story of a job from the events of its record. Pure.

An event that is damaged, or that another version wrote, is left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from elastic_hpc.view.story import Fault, JoinedNode, Round, Run, Sample, Story


def story_of(events: Iterable[Mapping[str, Any]], damaged: int = 0) -> Story:
    """The story of ``events``, oldest first; ``damaged`` lines could not be read."""
    builder = StoryBuilder()
    builder.add(events)
    return builder.story(damaged)


_SAMPLES = 1024
"""The number of samples to keep of a round, at most twice as many: a screen has no room for more."""
_LAST_SAMPLES = 32
"""The number of last samples that are all kept: the speed comes from them."""
_STAYS = "; it stays: "

GIVEN = "given by --hang-timeout"
"""The reason for a hang timeout that the user has given."""


class StoryBuilder:
    """Builds a story from events, oldest first: ``_on_NAME`` handles the event ``NAME``."""

    def __init__(self) -> None:
        self._damaged = 0
        self._runs: list[Run] = []
        self._rounds: list[Round] = []
        self._samples: list[Sample] = []
        """The samples of the round that runs."""
        self._joined: dict[str, JoinedNode] = {}
        """The joined nodes that have not left, by name."""
        self._left: list[JoinedNode] = []
        self._barred: dict[str, None] = {}
        self._apart: dict[str, None] = {}
        self._slow: dict[str, float] = {}
        self._was_slow: dict[str, str] = {}
        self._missing: dict[str, str] = {}
        self._limits: Mapping[str, Any] = {}
        self._hang_timeout: tuple[float | None, str] = None, ""
        self._broken: float | None = None
        """When the cause of the last round's end happened, or the run began; None while a round is unbroken."""
        self._waiting = self._not_growing = ""
        self._restarts = self._requeues = 0
        self._at_verdict: tuple[Round | None, float | None] = None, None
        """The round that ran when the last verdict was written, and when it broke."""
        self._last_time = 0.0

    def add(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Add ``events``, which happened after all events that were added before."""
        for event in events:
            try:
                self._on_event(event)
            except (KeyError, TypeError, ValueError, AttributeError):
                self._damaged += 1

    def story(self, damaged: int = 0) -> Story:
        """The story of the events so far. ``damaged``: the number of lines that could not be read."""
        self._change_current(samples=tuple(self._samples))
        return Story(
            damaged=damaged + self._damaged,
            runs=tuple(self._runs),
            rounds=tuple(self._rounds),
            joiners=(*self._left, *self._joined.values()),
            barred=tuple(self._barred),
            apart=tuple(self._apart),
            slow=dict(self._slow),
            was_slow=tuple(f"{node}: {reason}" for node, reason in self._was_slow.items()),
            missing=dict(self._missing),
            limits=self._limits,
            hang_timeout=self._hang_timeout[0],
            hang_timeout_reason=self._hang_timeout[1],
            restarts=self._restarts,
            requeues=self._requeues,
            waiting=self._waiting,
            waiting_since=self._broken or 0.0,
            not_growing=self._not_growing,
            last_time=self._last_time,
        )

    def _on_event(self, event: Mapping[str, Any]) -> None:
        when = float(event["time"])
        handle = getattr(self, f"_on_{event['event']}", None)
        if handle:
            handle(event, when)
        self._last_time = max(self._last_time, when)

    @property
    def _current(self) -> Round | None:
        """The round that has not ended."""
        return self._rounds[-1] if self._rounds and self._rounds[-1].ended is None else None

    def _change_current(self, **changes: Any) -> None:
        if self._current:
            self._rounds[-1] = replace(self._rounds[-1], **changes)

    def _on_start(self, event: Mapping[str, Any], when: float) -> None:
        run = Run(number=int(event["run"]), job=str(event["job"]), granted=int(event["granted"]), began=when)
        if self._current:  # the previous run was cut off: no agent was left to record its end
            self._end(self._last_time, "its end is not on record", self._restarts)
        if self._runs and self._runs[-1].ended is None:
            self._runs[-1] = replace(self._runs[-1], ended=self._last_time)
        self._leave(None, when)
        self._runs.append(run)
        self._missing, self._slow = {}, {}
        self._broken, self._waiting, self._not_growing = when, "", ""
        self._limits = {
            k: v for k, v in event.items() if k not in {"time", "event", "version", "run", "job", "granted"}
        }
        given = event.get("hang_timeout") or 0.0
        self._hang_timeout = (float(given), GIVEN) if given else (None, "")

    def _on_hang_timeout(self, event: Mapping[str, Any], _when: float) -> None:
        self._hang_timeout = float(event["seconds"]), str(event["reason"])

    def _on_resize(self, event: Mapping[str, Any], _when: float) -> None:
        self._limits = {**self._limits, **{name: int(event[name]) for name in ("min_nodes", "max_nodes")}}

    def _on_given_back(self, event: Mapping[str, Any], when: float) -> None:
        if self._runs:
            given = (*self._runs[-1].given_back, *(when for _ in event["nodes"]))
            self._runs[-1] = replace(self._runs[-1], given_back=given)

    def _on_waiting(self, event: Mapping[str, Any], when: float) -> None:
        self._waiting = str(event["reason"])
        self._broken = self._broken or when

    def _on_allocation(self, event: Mapping[str, Any], _when: float) -> None:
        names = ("submitted", "started", "ends")
        times: dict[str, Any] = {name: None if event[name] is None else float(event[name]) for name in names}
        if self._runs and self._runs[-1].number == event["run"]:
            self._runs[-1] = replace(self._runs[-1], **times)

    def _on_growth_problem(self, event: Mapping[str, Any], _when: float) -> None:
        self._not_growing = str(event["reason"])

    def _on_joiners_cancelled(self, _event: Mapping[str, Any], _when: float) -> None:
        self._not_growing = ""

    def _on_join(self, event: Mapping[str, Any], when: float) -> None:
        self._not_growing = ""
        self._missing.pop(str(event["node"]), None)
        if event.get("joiner"):
            self._joined.setdefault(str(event["node"]), JoinedNode(str(event["node"]), when))

    def _on_absent(self, event: Mapping[str, Any], _when: float) -> None:
        self._missing[str(event["node"])] = str(event["reason"])

    _on_unfit = _on_refused = _on_absent

    def _on_leave(self, event: Mapping[str, Any], when: float) -> None:
        if event["exclude"]:
            self._on_absent(event, when)

    def _on_stays(self, event: Mapping[str, Any], _when: float) -> None:
        self._missing[str(event["node"])] = f"{event['reason']}{_STAYS}{event['why']}"

    def _on_stay(self, event: Mapping[str, Any], _when: float) -> None:
        self._missing.pop(str(event["node"]), None)

    def _on_barred(self, event: Mapping[str, Any], when: float) -> None:
        self._barred[str(event["node"])] = None
        self._on_absent(event, when)

    def _on_apart(self, event: Mapping[str, Any], _when: float) -> None:
        self._apart[str(event["reason"])] = None

    def _on_slow(self, event: Mapping[str, Any], _when: float) -> None:
        node, times, reason = str(event["node"]), float(event["times"]), str(event["reason"])
        self._slow[node], self._was_slow[node] = times, reason

    def _on_slow_over(self, event: Mapping[str, Any], _when: float) -> None:
        self._slow.pop(str(event["node"]), None)
        self._was_slow.pop(str(event["node"]), None)

    def _leave(self, node: str | None, when: float, *, taken: bool = False) -> None:
        """``node`` has left; for None, all joined nodes have. ``taken``: before its time."""
        for name in [node] if node else list(self._joined):
            if joined := self._joined.pop(name, None):
                self._left.append(replace(joined, left=when, taken=taken))

    def _on_left(self, event: Mapping[str, Any], when: float) -> None:
        self._leave(str(event["node"]), when, taken=event["reason"] in {"preempted", "terminated"})

    _on_release = _on_left

    def _on_lost(self, event: Mapping[str, Any], when: float) -> None:
        node = str(event["node"])
        self._leave(node, when, taken=True)
        self._on_absent(event, when)
        if self._current and node in self._current.nodes:
            last_contact = when - float(event["silent"])
            self._broken = self._broken or last_contact
            fault = Fault(last_contact, node, "node lost", str(event["reason"]))
            self._add_fault(fault, cause=not self._current.faults)

    def _on_failure(self, event: Mapping[str, Any], when: float) -> None:
        self._broken = self._broken or when
        failure = {name: event[name] for name in ("kind", "message", "rank", "traceback")}
        failure["known"] = str(event.get("known", ""))
        self._add_fault(Fault(when, str(event["node"]), **failure), cause=bool(event["first"]))

    def _add_fault(self, fault: Fault, *, cause: bool) -> None:
        if self._current:
            others = self._current.faults
            self._change_current(faults=(fault, *others) if cause else (*others, fault))

    def _on_take_over(self, event: Mapping[str, Any], when: float) -> None:
        self._slow = {}  # the new leader starts a new comparison
        reason = str(event["reason"])
        node, _, why = reason.partition(" lost: ")
        if why:
            self._missing[node] = why
        if self._current and not self._current.faults:  # the leader was lost, and no event records the loss
            self._broken = self._broken or when
            self._add_fault(Fault(when, node if why else self._current.leader, "node lost", why or reason), cause=True)

    def _on_progress(self, event: Mapping[str, Any], when: float) -> None:
        if not self._current or event["round"] != self._current.number or "step" not in event:
            return
        loss = event.get("loss")
        sample = Sample(float(event["step_at"]) or when, int(event["step"]), None if loss is None else float(loss))
        first, first_at = int(event["first"]), float(event["first_at"])
        if not self._samples:
            self._extend_before(first)
            if sample.step > first:
                self._samples.append(Sample(first_at, first, None))
        if (first, first_at) != (self._current.first, self._current.first_at):
            self._change_current(first=first, first_at=first_at)
        self._samples.append(sample)
        if len(self._samples) > 2 * _SAMPLES:
            self._samples[:-_LAST_SAMPLES] = self._samples[:-_LAST_SAMPLES:2]

    def _extend_before(self, first: int) -> None:
        """A round that begins with step ``first`` has loaded a checkpoint of the previous step. If no sample has that
        step, because the leader that knew of it was lost, add it to the last round that has reported steps.
        """
        index = next((i for i in range(len(self._rounds) - 2, -1, -1) if self._rounds[i].samples), None)
        if index is None:
            return
        before = self._rounds[index]
        begin, last = before.samples[0], before.samples[-1]
        if first <= last.step + 1:
            return
        time = before.broken or before.ended or last.time
        if last.step > begin.step:
            time = min(time, last.time + (first - 1 - last.step) * (last.time - begin.time) / (last.step - begin.step))
        added = Sample(max(time, last.time), first - 1, None)
        self._rounds[index] = replace(before, samples=(*before.samples, added))

    def _on_round(self, event: Mapping[str, Any], when: float) -> None:
        formed = Round(
            number=int(event["round"]),
            run=self._runs[-1].number if self._runs else 0,
            nodes=tuple(map(str, event["nodes"])),
            world_size=int(event["world_size"]),
            restarts=int(event["restarts"]),
            formed=when,
            gap=None if self._broken is None else max(0.0, when - self._broken),
            leader=str(event["leader"] or ""),
        )
        if self._current:
            self._end(when, "its end is not on record", formed.restarts)
        self._broken, self._waiting = None, ""
        self._slow = {node: times for node, times in self._slow.items() if node in formed.nodes}
        for node in self._missing.keys() - set(formed.nodes):
            self._missing[node] = self._missing[node].partition(_STAYS)[0]
        self._samples = []
        self._rounds.append(formed)

    def _on_started(self, event: Mapping[str, Any], _when: float) -> None:
        if self._current and event["round"] == self._current.number:
            not_kept = tuple(map(str, event.get("not_kept", ())))
            self._change_current(workers_kept=int(event.get("kept", 0)), not_kept=not_kept)

    def _on_restart(self, event: Mapping[str, Any], when: float) -> None:
        self._end(when, str(event["reason"]), int(event["restarts"]))

    def _end(self, when: float, cause: str, restarts: int) -> None:
        self._broken = self._broken or when
        if round := self._current:
            changes = {"broken": self._broken, "cause": cause, "charged": restarts > round.restarts}
            self._change_current(ended=when, samples=tuple(self._samples), **changes)
        self._restarts = max(self._restarts, restarts)

    def _on_verdict(self, event: Mapping[str, Any], when: float) -> None:
        end: dict[str, Any] = {name: str(event[name]) for name in ("outcome", "cause", "reason")}
        self._at_verdict = self._current, self._broken
        self._end(when, end["reason"], int(event["restarts"]))
        charged = int(event["requeues"]) > self._requeues
        self._requeues = int(event["requeues"])
        self._waiting = ""
        self._leave(None, when)
        if self._runs:
            self._runs[-1] = replace(self._runs[-1], ended=when, charged=charged, **end)

    def _on_withdrawn(self, _event: Mapping[str, Any], _when: float) -> None:
        """The run has not ended, nor has the round that ran at the verdict, unless another round was formed since."""
        if self._runs:
            self._requeues -= self._runs[-1].charged
            self._runs[-1] = replace(self._runs[-1], ended=None, charged=False, outcome="", cause="", reason="")
        round, broken = self._at_verdict
        if round and self._rounds[-1].number == round.number:
            self._rounds[-1], self._broken = round, broken
