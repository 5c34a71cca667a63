"""Two worlds never train, in all schedules of a few nodes with few faults. And the model checker can find violations:
with a broken rule it finds a schedule in which two worlds train.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
from model_checker import Result, Search, starts
from model_node import timeless
from model_schedules import Action, Model
from model_words import story
from on_demand import ON_DEMAND

from elastic_hpc.membership import mandate
from elastic_hpc.membership.election import Base
from elastic_hpc.membership.mandate import Mandate
from elastic_hpc.membership.peers import Peers
from elastic_hpc.membership.promises import Promises


@pytest.fixture(autouse=True)
def _timeless() -> Iterator[None]:
    with timeless():
        yield


def search(model: Model, faults: int, script: tuple[Action, ...] = ()) -> Result:
    result = Search(model, faults, seconds=300, script=script).go(starts(model))
    print(result.states, "states,", result.transitions, "transitions,", result.depth, "actions")
    if result.start:
        print(*story(model, result.start, result.schedule), sep="\n")
    return result


@pytest.mark.parametrize(
    ("model", "faults"),
    [
        ({"size": 3, "most": 3}, 1),
        pytest.param({"size": 3, "most": 2}, 1, marks=ON_DEMAND),
        ({"size": 3, "most": 3, "faults": ("takes over", "restarts", "reboots")}, 2),
        ({"size": 4, "most": 2, "faults": ("takes over", "restarts")}, 2),
        ({"size": 2, "most": 2, "lines": True, "faults": ("fails",)}, 1),
        ({"size": 3, "most": 3, "faults": ("takes over", "resizes", "gives back")}, 2),
    ],
)
def test_two_worlds_never_train(model: dict[str, Any], faults: int) -> None:
    result = search(Model(**model), faults)
    assert result.start is None
    assert result.whole == faults, "the search was not finished"


renew = Mandate.renew


def renews_over_agents_that_know_of_a_later_round(self: Mandate, joined: Any, *args: Any, **how: Any) -> bool:
    return renew(self, (), *args, **how)


def half_is_enough(bases: Iterable[Base], nodes: Collection[int]) -> bool:
    return all(2 * len({*nodes} & {*base.members}) >= len(base.members) for base in bases)


TWO_TAKE_OVERS = (("deserted", 0), ("takes over", 1))
ONE_RESTART = (("deserted", 0), ("restarts", 2), ("takes over", 1))
ONE_REBOOT = (("deserted", 0), ("reboots", 2), ("takes over", 1))
A_ROUND_THAT_ONE_NODE_KNOWS = (
    ("holds", 1, 0, 0, "up"),
    ("misses", 2, 0),
    ("holds", 1, 0, 0, "down"),
    ("misses", 1, 0),
    ("takes over", 1),
)
BROKEN: dict[str, tuple[list[tuple[Any, str, Any]], int, tuple[Action, ...]]] = {
    "each half of the members is enough": (
        [(mandate, "has_quorum", half_is_enough), (Mandate, "is_settled", lambda _self, _formed: True)],
        *(2, TWO_TAKE_OVERS),
    ),
    "the members of the rounds before are not asked": (
        [(mandate, "extended", lambda _bases, new: (new,))],
        *(3, A_ROUND_THAT_ONE_NODE_KNOWS),
    ),
    "a round does not count any more when a later one is formed": (
        [(mandate, "relevant", lambda bases, _held: bases[-1:])],
        *(3, A_ROUND_THAT_ONE_NODE_KNOWS),
    ),
    "promises are not kept": ([(Promises, "_write", lambda _self: None)], 3, ONE_RESTART),
    "an agent that has forgotten its promises votes": (
        [(Peers, "agreeing", property(lambda self: set(self.joined)))],
        *(3, ONE_REBOOT),
    ),
    "agents that were lost are counted": (
        [(Peers, "agreeing", property(lambda self: {*self.joined, *self._arrived}))],
        *(3, (*TWO_TAKE_OVERS, ("deserted", 1))),
    ),
    "agents that know of a later round are counted": (
        [(Mandate, "renew", renews_over_agents_that_know_of_a_later_round)],
        *(3, (*TWO_TAKE_OVERS, ("deserted", 1))),
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_found(rule: str) -> None:
    """The faults of the schedule are given; the search finds the rest."""
    patches, size, script = BROKEN[rule]
    with contextlib.ExitStack() as broken:
        for place, name, instead in patches:
            broken.enter_context(patch.object(place, name, instead))
        result = search(Model(size, most=size), len(script), script)
    assert result.start is not None, "the model checker does not see this"
    assert search(Model(size, most=size), len(script), script).start is None
