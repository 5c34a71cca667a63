"""A model checker for the invariant that never two worlds train: it runs the real leaders and agents of a few nodes
through *all* schedules with a bounded number of faults.

It first visits all states that can be reached without a fault, then those with one fault, and so on: a counterexample
has as few faults as possible. The oracle knows no rounds, rosters or votes. It looks only at the workers: a world
trains while each of its nodes has living workers of that world.

    python tests/unit/model_checker.py --nodes 4 --most 3 --faults 4 --minutes 60

This uses one core, and a few GiB of memory per hour.
"""

from __future__ import annotations

import argparse
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from model_node import timeless
from model_schedules import BY_ITSELF, FAULTS, Action, Model, State
from model_words import story


@dataclass
class Result:
    start: State | None = None
    schedule: list[Action] = field(default_factory=list)
    """The counterexample, from ``start`` on; empty if there is none."""
    states: int = 0
    transitions: int = 0
    depth: int = 0
    """The number of actions of the longest schedule."""
    whole: int = -1
    """All schedules with up to this number of faults were visited."""


class Search:
    """``go`` visits all states that can be reached with at most ``faults`` faults, in order of their number."""

    def __init__(
        self, model: Model, faults: int, *, seconds: float = float("inf"), script: Sequence[Action] = ()
    ) -> None:
        """``script``: the first words of the first fault, of the second fault, and so on; the rest of the schedule is
        free.
        """
        self._model, self._faults, self._script = model, faults, script
        self._ends = time.process_time() + seconds
        self._numbers: dict[int, int] = {}
        """Numbers of the states, by hash."""
        self._parents, self._by, self._depths = array("q"), array("l"), array("l")
        self._actions: dict[Action, int] = {}
        self._roots: list[State] = []
        self._result = Result()

    def go(self, starts: Iterable[State], progress: Callable[[str], None] = lambda _: None) -> Result:
        result = self._result
        layer = {hash(start): (start, -1, -1) for start in starts}
        for faults in range(self._faults + 1):
            layer = self._visit(layer, faults)
            if result.start is not None or time.process_time() > self._ends:
                break
            result.whole = faults
            progress(
                f"{faults} faults: {result.states:,} states, {result.transitions:,} transitions, {result.depth} actions"
            )
        return result

    def _visit(self, layer: dict[int, tuple[State, int, int]], faults: int) -> dict[int, tuple[State, int, int]]:
        """Visit ``layer`` and all states that can be reached from it without a fault. Returns the states after one more
        fault.
        """
        next_fault = self._script[faults] if faults < len(self._script) else ()
        later: dict[int, tuple[State, int, int]] = {}
        queue = deque[tuple[int, State]]()
        for key, (state, parent, by) in layer.items():
            if key not in self._numbers and self._is_bad(state, key, parent, by, queue):
                return {}
        while queue and time.process_time() < self._ends:
            me, state = queue.popleft()
            for is_fault, action, after in self._model.successors(state, next_fault):
                self._result.transitions += 1
                key = hash(after)
                if key in self._numbers:
                    continue
                by = self._actions.setdefault(action, len(self._actions))
                if not is_fault:
                    if self._is_bad(after, key, me, by, queue):
                        return {}
                elif faults < self._faults:
                    later.setdefault(key, (after, me, by))
        return later

    def _is_bad(self, state: State, key: int, parent: int, by: int, queue: deque[tuple[int, State]]) -> bool:
        """Add a new state. Returns whether two worlds train in it."""
        me = self._numbers[key] = len(self._parents)
        self._parents.append(parent if parent >= 0 else -1 - len(self._roots))
        self._by.append(by)
        self._depths.append(self._depths[parent] + 1 if parent >= 0 else 0)
        if parent < 0:
            self._roots.append(state)
        queue.append((me, state))
        result = self._result
        result.states, result.depth = len(self._parents), max(result.depth, self._depths[me])
        if len(self._model.trains(state)) < 2:
            return False
        names = list(self._actions)
        while self._parents[me] >= 0:
            result.schedule.insert(0, names[self._by[me]])
            me = self._parents[me]
        result.start = self._roots[-1 - self._parents[me]]
        return True


def starts(model: Model) -> list[State]:
    """For each node that can lead: the state in which all nodes are connected to it, and its round runs."""
    alone = ("sees the end", "notices", "connects", *BY_ITSELF)
    first, _ = model.calmed(model.start(), alone)
    found = [first]
    for index in range(1, model.size):
        state: State | None = first
        script: list[Action] = [("restarts", 0), ("sees the end", index, 0, 0), ("takes over", index)]
        for action in script:
            state = state and model.do(state, action)
        if state:
            calm, _ = model.calmed(state, alone)
            found += [calm] * bool(model.trains(calm))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="faults: " + "; ".join(f"{name}: {what}" for name, what in FAULTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--least", type=int, default=1, help="MIN")
    parser.add_argument("--most", type=int, help="MAX; with fewer than --nodes there are spares")
    parser.add_argument("--faults", type=int, default=2, help="the most faults of a schedule")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of a core; then it stops where it is")
    parser.add_argument("--lines", action="store_true", help="every line arrives at any time; else one fault at a time")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    args = parser.parse_args()
    with timeless():
        most = args.most or args.nodes
        model = Model(args.nodes, least=args.least, most=most, lines=args.lines, faults=args.only)
        search = Search(model, args.faults, seconds=60 * args.minutes)
        result = search.go(starts(model), lambda text: print(f"{time.process_time():,.0f} s: {text}", flush=True))
        print(
            f"{time.process_time():,.0f} s: {result.states:,} states, {result.transitions:,} transitions, at most "
            f"{result.depth} actions; complete up to {result.whole} faults"
        )
        if result.start is None:
            print("never two worlds")
            return 0
        print(result.schedule, "", *story(model, result.start, result.schedule), sep="\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
