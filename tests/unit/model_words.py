"""The schedules of the model checker in words."""

from __future__ import annotations

from collections.abc import Iterable

from model_automaton import VALUES
from model_schedules import Action, Model, State

from elastic_hpc.membership.messages import Order, Status
from elastic_hpc.membership.roster import Roster, RosterChange


def story(model: Model, state: State, actions: Iterable[Action]) -> list[str]:
    """A line for each of ``actions``, from ``state`` on, and an indented line for each action that follows without a
    fault.
    """
    told = []
    for action in actions:
        after = model.do(state, action)
        if after is None:
            raise ValueError(f"{action} does nothing")
        told.append(_told(model, state, action, after))
        state = after
        for one in () if model.lines else model.calmed(state)[1]:
            after = model.do(state, one)
            assert after
            told.append("    " + _told(model, state, one, after))
            state = after
    return told


def _told(model: Model, before: State, action: Action, after: State) -> str:
    name, index, *rest = action
    conns = {conn[:3]: conn for conn in before[1]}
    match name:
        case "agent hears" | "leader hears":
            conn = conns[(index, *rest)]
            queue = conn.down if name == "agent hears" else conn.up
            heard = "; ".join(_short(VALUES.all[number]) for number in (queue[:1] if model.lines else queue))
            who, whom = (index, conn.leader) if name == "agent hears" else (conn.leader, index)
            text = f"{name.split()[0]} n{who} hears n{whom}: {heard}"
        case "misses" | "notices":
            text = f"leader n{rest[0]} {'loses' if name == 'misses' else 'notices that it has lost'} n{index}"
        case "holds" | "releases":
            text = f"between agent n{index} and leader n{rest[0]}, {rest[2]}: {name}"
        case "loses" | "sees the end" | "connects":
            text = (
                f"agent n{index} {name} {'to ' if name == 'connects' else 'of ' if name != 'loses' else ''}n{rest[0]}"
            )
        case _:
            text = f"n{index} {name}"
    notes = []
    for node, (one, other) in enumerate(zip(before[0], after[0], strict=True)):
        old, new = model.nodes.looks[one], model.nodes.looks[other]
        if old.world != new.world:
            notes.append(f"workers of n{node}: {_world(old.world)} -> {_world(new.world)}")
        if old.has_led != new.has_led:
            notes.append(f"n{node} {'leads' if new.has_led else 'leads no more'}")
    return text + (f"   [{', '.join(notes)}]" if notes else "")


def _world(world: tuple[int, int] | None) -> str:
    if world is None:
        return "none"
    number, size = world
    return f"round {number // 128} by n{number // 16 % 8} ({size} nodes)"


def _short(said: object) -> str:
    match said:
        case Roster(round=round, bases=bases) | RosterChange(round=round, bases=bases):
            return f"roster {round} of " + " and ".join(f"{b.members} by n{b.leader} in {b.round}" for b in bases)
        case Status(state=state, round=round, seen=seen, roster=roster):
            return f"{state} {round}, has seen {seen}, holds {roster}"
        case Order(stage=stage, round=round, roster=roster, oldest=oldest, leads=leads, plan=plan):
            words = (f"{stage} {round}", "with a plan" * (plan is not None), "no majority" * (not leads))
            return ", ".join(filter(None, (*words, f"roster {roster}, oldest {oldest}")))
    return str(said)
