"""Whether the workers of a job hang, learned from the job itself (``--hang-timeout auto``). Pure.

Each agent counts how long its workers have given no sign of life (``Signs``): no step reported, no output. The leader
compares the job's silence, which is that of the node with the latest sign of life, with the longest silence that the
job has survived (``Rhythm``). What is learned goes to the agents with the orders, comes back with their status, and is
saved for the run after a requeue, so it outlives the leader. There is no clock here: the agents count only time in
which their processes could run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

TIMES = 10
"""The timeout is this many times the longest silence so far."""

LEAST = 300.0
"""Smallest timeout, in seconds, for workers that report steps."""

LEAST_UNSURE = 1800.0
"""The same in the first steps of a round, after the end of some workers, and for a script that writes output but
reports no steps.
"""

FAMILIAR = 10
"""A round shows how long its steps take once the leader has seen this many further steps. The first steps may come in
quick succession: ranks report the same step one after the other, or a script reports the step of its checkpoint, then a
step that was only an evaluation. And in a new world, for example of fewer nodes, steps take longer than before.
"""

BUSY = 6
"""Workers that compute, read or write may be silent for this many times as long: they may be evaluating or saving."""

LEARNED = "--hang-timeout auto"

_WINDOW = 15.0
"""Length, in seconds, of the window in which nodes are compared: in each window, the job waits as long as the node that
waits least. So nodes that work one after the other count as one node that works.
"""

_SHORTEST = 1.0
"""The shortest silence, in seconds, that agents certainly see: they look about this often."""

_NOTABLE = 1.1
"""A learned number is replaced only by a number that is larger by this factor, so that few orders carry news."""


class Signs(NamedTuple):
    """Signs of life of one node's workers in the running round. Times in seconds in which the workers could run."""

    silent: float = 0.0
    """Since their last sign of life, or since they started."""
    idle: float = 0.0
    """The part of ``silent`` in which they neither computed, read nor wrote."""
    unreported: float = 0.0
    """Since the last report of a step; if there was none, since they started."""
    reports: int = 0
    """How often a new report was seen."""
    span: float = -1.0
    """From the first sign of life to the last; -1 before the first."""
    start: float = 0.0
    """From their start to the first report; 0 before the first report."""

    @classmethod
    def of(cls, values: Any) -> Signs:
        """From a message. Raises TypeError or ValueError."""
        silent, idle, unreported, reports, span, start = values
        return cls(float(silent), float(idle), float(unreported), int(reports), float(span), float(start))

    @property
    def waited(self) -> float:
        """``silent``, but time in which the workers were busy counts less."""
        return self.idle + max(0.0, self.silent - self.idle) / BUSY


class Rhythm(NamedTuple):
    """What is known of a job's signs of life. Times in seconds."""

    number: int = 0
    """Counts the changes: when two leaders differ, the higher number is valid."""
    longest: float = 0.0
    """The longest silence that ended without a restart: between two reports, or two outputs if steps are not reported.
    """
    start: float = 0.0
    """The longest time from the start of a round to its first report."""
    span: float = 0.0
    """The longest time for which the job has given signs in one round."""
    reports: bool = False
    """The script has reported steps."""
    alarm: float = 0.0
    """The timeout of the last alarm, until the workers have passed its place."""
    place: float = -1.0
    """Where the last alarm was: the step, or without steps, the time for which the round had given signs."""

    @classmethod
    def of(cls, values: Any) -> Rhythm:
        """Decode from a message or ``state.json``; damaged values give the rhythm of a new job."""
        with suppress(TypeError, ValueError):
            number, longest, start, span, reports, alarm, place = values
            times = [float(time) for time in (longest, start, span, alarm, place)]
            if all(map(math.isfinite, times)):
                longest, start, span, alarm, place = times
                return cls(int(number), longest, start, span, bool(reports), alarm, place)
        return NO_RHYTHM

    def newer(self, other: Rhythm) -> Rhythm:
        """``other``, unless this one is as new."""
        return other if other.number > self.number else self


NO_SIGNS, NO_RHYTHM = Signs(), Rhythm()


class Timeout(NamedTuple):
    """``seconds`` is infinite while too little is known to detect a hang."""

    seconds: float
    why: str


def timeout(rhythm: Rhythm, *, live: bool = False, sure: bool = True) -> Timeout:
    """The silence after which the workers count as hung. ``live``: their steps are reported without the script's help.
    ``sure``: the round is beyond its first steps, and all of its workers still run.
    """
    learned = TIMES * rhythm.longest
    if not (rhythm.reports or live):
        seconds = max(LEAST_UNSURE, learned)
        if not rhythm.longest or rhythm.span < seconds:
            return Timeout(math.inf, "off until the script has reported two steps, or has written for 30 minutes")
        least, kind = LEAST_UNSURE, "for a script that reports no steps"
    elif sure and rhythm.longest:
        least, kind = LEAST, "between two steps"
    else:
        learned = max(learned, TIMES * rhythm.start)
        least, kind = LEAST_UNSURE, "during the first steps, and after a worker has ended"
    again = 2 * rhythm.alarm
    if again > max(learned, least):
        return Timeout(again, f"twice the {rhythm.alarm:.0f} s after which the job restarted here before")
    if learned > least:
        longest = max(rhythm.longest, 0.0 if sure else rhythm.start)
        return Timeout(learned, f"{TIMES} times the longest silence so far: {longest:.0f} s")
    return Timeout(least, f"minimum {kind}; longest silence so far: {rhythm.longest:.0f} s")


class Hang(NamedTuple):
    node: int
    message: str


class HangWatch:
    """The silence of a job under one leader."""

    def __init__(self, rhythm: Rhythm = NO_RHYTHM) -> None:
        self.rhythm = rhythm
        self.begin()

    def begin(self) -> None:
        """A round begins: the silence of earlier workers no longer counts."""
        self._gap = 0.0
        self._step, self._moves = -1, 0
        """The last step, and how often there was a further step when the leader looked."""
        self._waited = 0.0
        """The silence of the job before the present window, as ``Signs.waited``."""
        self._last: Mapping[int, Signs] = {}
        self._window: Mapping[int, Signs] = {}
        """The signs of the nodes at the last look, and at the beginning of the window."""
        self._excused = self._gap_excused = 0.0
        """The part of the silence, and of the gap, in which no worker could have given a sign."""

    @property
    def is_familiar(self) -> bool:
        """Whether the round is beyond its first steps."""
        return self._moves >= FAMILIAR

    def adopt(self, rhythm: Rhythm) -> None:
        """An agent has received ``rhythm`` from a leader."""
        self.rhythm = self.rhythm.newer(rhythm)

    def look(
        self,
        signs: Mapping[int, Signs],
        step: int,
        *,
        whole: bool = True,
        live: bool = False,
        held: bool = False,
    ) -> Hang | None:
        """``signs`` of the nodes whose workers run, by node, and the last ``step`` of the round, or -1. ``whole``: no
        worker has ended. ``held``: a file that the job needs does not answer, so silence proves nothing.
        """
        if not signs:
            return None
        self._learn(signs.values(), step, held=held)
        waited = self._wait(signs)
        if held or waited < self._excused:
            self._excused = waited
        limit, _ = timeout(self.rhythm, live=live, sure=whole and self.is_familiar)
        if waited - self._excused <= limit:
            return None
        silent = min(each.silent for each in signs.values())
        what = f"no step after step {step}, and no output," if step >= 0 else "no output, and no step,"
        longest = f"the longest silence before was {self.rhythm.longest:.0f} s"
        message = f"{what} for {silent:.0f} s; {longest} ({LEARNED}: {limit:.0f} s)"
        self._change(alarm=max(limit, waited), place=self._place(signs.values(), step))
        return Hang(max(signs, key=lambda node: (signs[node].silent, -node)), message)

    def _wait(self, signs: Mapping[int, Signs]) -> float:
        """How long the job has waited since the last sign of life."""
        heard = any(each.silent < self._last[node].silent for node, each in signs.items() if node in self._last)
        if heard or not self._window.keys() & signs.keys():
            last = min(signs.values(), key=lambda each: each.silent)
            self._waited, self._window = last.waited, dict(signs)
        self._last = dict(signs)
        begun = [(each, self._window[node]) for node, each in signs.items() if node in self._window]
        waited = self._waited + max(0.0, min(now.waited - then.waited for now, then in begun))
        if min(now.silent - then.silent for now, then in begun) >= _WINDOW:
            self._waited, self._window = waited, dict(signs)
        return waited

    def _learn(self, signs: Collection[Signs], step: int, *, held: bool) -> None:
        learned: dict[str, Any] = {}
        self._moves += 0 <= self._step < step
        self._step = step
        if step >= 0 and not self.rhythm.reports:  # what was learned from the output is no longer of use
            learned |= {"reports": True, "longest": 0.0}
            self._gap = 0.0
        elif self._gap > _NOTABLE * self.rhythm.longest and self._present_gap(signs) < self._gap:
            learned["longest"] = self._gap
        elif not self.rhythm.longest and self._moves > 1:  # at each look there was another step
            learned["longest"] = _SHORTEST
        for name in ("start", "span"):
            longest = max(getattr(each, name) for each in signs)
            if longest > _NOTABLE * getattr(self.rhythm, name) + 1.0:
                learned[name] = longest
        if self.rhythm.alarm and self._place(signs, step) > self.rhythm.place:
            learned |= {"alarm": 0.0, "place": -1.0}
        if learned:
            self._change(**learned)
        present = self._present_gap(signs)
        if held or present < self._gap_excused:
            self._gap_excused = present
        self._gap = present - self._gap_excused

    def _present_gap(self, signs: Collection[Signs]) -> float:
        """Since the last report, or without reports since the last output; 0 before the first in this round."""
        if self.rhythm.reports:
            return min((each.unreported for each in signs if each.reports), default=0.0)
        return min(each.silent for each in signs) if any(each.span >= 0 for each in signs) else 0.0

    def _place(self, signs: Collection[Signs], step: int) -> float:
        return float(step) if self.rhythm.reports else max(each.span for each in signs)

    def _change(self, **changes: Any) -> None:
        self.rhythm = self.rhythm._replace(number=self.rhythm.number + 1, **changes)
