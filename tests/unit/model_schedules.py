"""The states and actions of the model checker: everything that may happen to a few nodes and their connections.

The lines of a connection arrive in order or not at all; between connections there is no order. Each end of a connection
may be lost before the other end knows. Equal consecutive lines count as one, because each line has the whole state.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from model_automaton import Nodes
from model_node import SLOTS, Site

FAULTS = {
    "loses": "an agent loses its leader, which does not know",
    "misses": "a leader loses an agent, which does not know",
    "deserted": "all other agents lose a leader, which does not know",
    "takes over": "an agent asks for a majority",
    "gives way": "a candidate stops",
    "fails": "the workers of a node fail",
    "restarts": "an agent dies with its workers, and is started anew",
    "reboots": "the same, and what the node has promised is lost",
    "freezes": "a node stands still, but its workers do not; it wakes at any time (not with --lines)",
    "holds": "nothing arrives over one direction of a connection, until any time (not with --lines)",
    "resizes": "the user gives the job another MAX",
    "gives back": "the user has a node go",
    "sleeps": "a leader stood still (only with --lines, where everything may be late without a fault)",
}
"""The actions that count as faults."""

BY_ITSELF = ("leader hears", "acts", "decides", "agent hears", "beats", "repeats")
"""The actions that happen without a fault, in their order where one thing happens at a time."""


class Conn(NamedTuple):
    """A connection of an agent to a leader. Each end may be closed before the other end knows."""

    agent: int
    leader: int
    slot: int
    boot: int
    """Identifies the agent among those that have run on its node."""
    agent_open: bool = True
    leader_open: bool = True
    up: tuple[int, ...] = ()
    """The messages in transit to the leader, by number."""
    down: tuple[int, ...] = ()

    @property
    def number(self) -> int:
        """The leader's number for this connection."""
        return self.agent * SLOTS + self.slot


Held = tuple[Any, ...]
"""A frozen node, ``(node,)``, or a held direction of a connection, ``(agent, leader, slot, "up")``.
"""

State = tuple[tuple[int, ...], tuple[Conn, ...], tuple[Held, ...]]
"""The nodes (numbers of their states), the connections between them, and the frozen and held parts."""

Action = tuple[Any, ...]
"""The name of the action, and the node or the connection, as (agent, leader, slot)."""


class Model:
    """A job of ``size`` nodes with ``least`` and ``most`` nodes in a world (MIN and MAX)."""

    def __init__(
        self, size: int, *, least: int = 1, most: int, lines: bool = False, faults: Collection[str] = tuple(FAULTS)
    ) -> None:
        """``lines``: every line may arrive at any time, in any order between connections, and the main thread of an
        agent may act at any time. Otherwise one thing happens at a time, a fault or a connection, and then all messages
        in transit arrive, unless a node is frozen or a connection is held: this way the search gets much further.
        ``faults``: the faults that may happen.
        """
        self.size, self.lines = size, lines
        self.nodes = Nodes(least, most)
        self._faults = frozenset(faults) - ({"freezes", "holds"} if lines else {"sleeps"})

    # the state

    def start(self) -> State:
        """The first leader on node 0, without connections."""
        steps = not self._faults.isdisjoint({"resizes", "gives back"})
        sites = [Site(index, self.nodes.policy, steps=steps) for index in range(self.size)]
        sites[0].lead(first=True)
        for site in sites:
            site.settle()
        return tuple(self.nodes.add(site) for site in sites), (), ()

    def trains(self, state: State) -> list[int]:
        """The worlds in which every node has living workers."""
        looks = self.nodes.looks
        worlds = Counter(world for node in state[0] if (world := looks[node].world))
        return [number for (number, size), alive in worlds.items() if alive == size]

    # what may happen next

    def successors(self, state: State, fault: Action = ()) -> Iterator[tuple[bool, Action, State]]:
        """The possible next steps: whether the action is a fault, the action, and the state after it. Only faults whose
        words start with ``fault`` are included.
        """
        for action in self._actions(state):
            is_fault = action[0] in FAULTS
            if is_fault and (action[0] not in self._faults or action[: len(fault)] != fault):
                continue
            if not self.lines and action[0] in BY_ITSELF:
                continue
            after = self.do(state, action)
            if after is not None and after != state:
                yield is_fault, action, after if self.lines else self.calmed(after)[0]

    def calmed(self, state: State, order: Collection[str] = BY_ITSELF) -> tuple[State, list[Action]]:
        """The state in which no action named in ``order`` leads to a new state, and the actions that led there."""
        done: list[Action] = []
        seen = {state}
        ranks = {name: rank for rank, name in enumerate(order)}
        while True:
            possible = (action for action in self._actions(state) if action[0] in ranks)
            for action in sorted(possible, key=lambda action: ranks[action[0]]):
                after = self.do(state, action)
                if after is not None and after not in seen:
                    break
            else:
                return state, done
            state = after
            seen.add(state)
            done.append(action)

    def _actions(self, state: State) -> Iterator[Action]:
        nodes, conns, held = state
        still = set(held)
        looks = [self.nodes.looks[node] for node in nodes]
        for conn in conns:
            yield from self._of_connection(conn, still)
        for index, look in enumerate(looks):
            if not self.lines:
                yield ("wakes" if (index,) in still else "freezes", index)
            if (look.linked or not look.is_new) and not look.gone:
                yield ("restarts", index)
                yield ("reboots", index)
            if look.leads:
                yield ("deserted", index)
                if self.lines:
                    yield ("sleeps", index)
            if (index,) in still or look.gone:
                continue
            if look.must_act:
                yield ("acts", index)
            if look.runs:
                yield ("fails", index)
            if look.leads:
                yield ("decides" if look.has_news else "beats", index)
                if look.has_led:
                    yield from (("resizes", index, most) for most in range(1, self.size + 1))
                    yield from (("gives back", index, node) for node in range(self.size))
                else:
                    yield ("gives way", index)
            if look.linked:
                yield ("repeats", index)
            elif look.leads:
                yield ("connects", index, index)
            else:
                for other in range(self.size):
                    if looks[other].leads and (other,) not in still:
                        yield ("connects", index, other)
                if look.may_lead:
                    yield ("takes over", index)

    def _of_connection(self, conn: Conn, still: set[Held]) -> Iterator[Action]:
        ends = conn[:3]
        agent_wakes, leader_wakes = (conn.agent,) not in still, (conn.leader,) not in still
        if conn.down and conn.agent_open and agent_wakes and (*ends, "down") not in still:
            yield ("agent hears", *ends)
        if conn.up and conn.leader_open and leader_wakes and (*ends, "up") not in still:
            yield ("leader hears", *ends)
        if conn.agent_open and agent_wakes:
            yield ("loses" if conn.leader_open else "sees the end", *ends)
        if conn.leader_open and leader_wakes:
            yield ("misses" if conn.agent_open else "notices", *ends)
        if not self.lines:
            for way in ("up", "down"):
                yield ("releases" if (*ends, way) in still else "holds", *ends, way)

    def do(self, state: State, action: Action) -> State | None:
        """The state after ``action``; None if the action changes nothing."""
        nodes, conns, held = list(state[0]), {conn[:3]: conn for conn in state[1]}, state[2]
        name, index, *rest = action
        ends = (index, *rest)
        acted = False
        match name:
            case "agent hears":
                conn = conns[ends]
                heard = conn.down[:1] if self.lines else conn.down
                conns[ends] = conn._replace(down=conn.down[len(heard) :])
                for message in heard:
                    self._apply(nodes, conns, index, "hear", message)
                    if not self.nodes.looks[
                        nodes[index]
                    ].linked:  # redirected by a leader that has not accepted the agent
                        del conns[ends]
                        break
                acted = True
            case "leader hears":
                conn = conns[ends]
                heard = conn.up[:1] if self.lines else conn.up
                conns[ends] = conn._replace(up=conn.up[len(heard) :])
                for message in heard:
                    self._apply(nodes, conns, conn.leader, "hears", conn.number, conn.boot, message)
            case "loses" | "sees the end":
                self._leave(nodes, conns, ends)
                acted = True
            case "misses" | "notices":
                conn = conns[ends]
                _put(conns, conn._replace(leader_open=False, up=()))
                self._apply(nodes, conns, conn.leader, "lost", conn.number)
            case "deserted":
                for ends, conn in list(conns.items()):
                    if (
                        conn.leader == index != conn.agent
                        and conn.agent_open
                        and conn.leader_open
                        and (conn.agent,) not in held
                    ):
                        self._leave(nodes, conns, ends)
                        self._act(nodes, conns, conn.agent)
            case "connects":
                used = {ends[2] for ends in conns if ends[:2] == (index, rest[0])}
                slot = next(slot for slot in itertools.count() if slot not in used)
                assert slot < SLOTS
                conns[index, rest[0], slot] = Conn(index, rest[0], slot, self.nodes.looks[nodes[index]].agents)
                self._apply(nodes, conns, index, "connect")
            case "takes over":
                self._apply(nodes, conns, index, "lead")
                conns[index, index, 0] = Conn(index, index, 0, self.nodes.looks[nodes[index]].agents)
                self._apply(nodes, conns, index, "connect")
            case "restarts" | "reboots":
                for conn in list(conns.values()):
                    if conn.agent == index:
                        _put(conns, conn._replace(agent_open=False, down=()))
                    if conn.leader == index and conn[:3] in conns:
                        _put(conns, conns[conn[:3]]._replace(leader_open=False, up=()))
                self._apply(nodes, conns, index, name.removesuffix("s"))
                acted = True
            case "acts":
                self._apply(nodes, conns, index, "act")
            case "fails":
                self._apply(nodes, conns, index, "fail")
                acted = True
            case "decides":
                self._apply(nodes, conns, index, "decide")
            case "beats":
                if not self._beat(nodes, conns, index):
                    return None
            case "repeats":
                if not self._repeat(nodes, conns, index):
                    return None
            case "resizes":
                self._apply(nodes, conns, index, "resize", rest[0])
            case "gives back":
                self._apply(nodes, conns, index, "release", rest[0])
            case "gives way":
                self._apply(nodes, conns, index, "stop")
            case "freezes" | "holds":
                held = tuple(sorted((*held, ends), key=str))
            case "wakes" | "releases":
                held = tuple(one for one in held if one != ends)
                if name == "wakes":
                    self._apply(nodes, conns, index, "sleep")
            case "sleeps":
                self._apply(nodes, conns, index, "sleep")
            case _:
                raise ValueError(name)
        if acted:
            self._act(nodes, conns, index)
        for conn in list(conns.values()):
            if conn.agent_open and self.nodes.looks[nodes[conn.agent]].gone:
                _put(conns, conn._replace(agent_open=False, down=()))
        held = tuple(one for one in held if one[:3] in conns or len(one) == 1)
        return tuple(nodes), tuple(sorted(conns.values())), held

    def _act(self, nodes: list[int], conns: dict[Any, Conn], index: int) -> None:
        if not self.lines and self.nodes.looks[nodes[index]].must_act:
            self._apply(nodes, conns, index, "act")

    def _leave(self, nodes: list[int], conns: dict[Any, Conn], ends: Any) -> None:
        _put(conns, conns[ends]._replace(agent_open=False, down=()))
        self._apply(nodes, conns, ends[0], "leave")

    def _apply(self, nodes: list[int], conns: dict[Any, Conn], index: int, name: str, *arguments: Any) -> None:
        effect = self.nodes.after(nodes[index], name, *arguments)
        nodes[index] = effect.node
        for message in effect.up:
            for ends, conn in conns.items():
                if conn.agent == index and conn.agent_open and conn.leader_open and conn.up[-1:] != (message,):
                    conns[ends] = conn._replace(up=(*conn.up, message))
        for number, messages in effect.down:
            self._send(conns, index, number, messages)
        for conn in list(conns.values()):
            if conn.leader == index and (effect.ended or conn.number in effect.closed):
                _put(conns, conn._replace(leader_open=False, up=()))

    def _send(self, conns: dict[Any, Conn], index: int, number: int, messages: tuple[int, ...]) -> None:
        ends = (number // SLOTS, index, number % SLOTS)
        conn = conns.get(ends)
        if conn and conn.agent_open and conn.leader_open:
            down = conn.down
            for message in messages:
                down = down if down[-1:] == (message,) else (*down, message)
            conns[ends] = conn._replace(down=down)

    def _beat(self, nodes: list[int], conns: dict[Any, Conn], index: int) -> bool:
        """A leader repeats its messages. Only messages that would change something for its agents are sent: the others
        have no effect, now or later.
        """
        before = nodes[index]
        effect = self.nodes.after(before, "beat")
        if effect.closed or effect.ended:
            self._apply(nodes, conns, index, "beat")
            return True
        nodes[index] = effect.node
        changed = effect.node != before
        for number, messages in effect.down:
            conn = conns.get((number // SLOTS, index, number % SLOTS))
            if conn and conn.agent_open and not conn.down:
                node = nodes[conn.agent]
                for message in messages:
                    heard = self.nodes.after(node, "hear", message)
                    node = heard.node
                    if heard.up or self.nodes.looks[node].must_act:
                        node = -1
                        break
                if node != nodes[conn.agent]:
                    self._send(conns, index, number, messages)
                    changed = True
        return changed

    def _repeat(self, nodes: list[int], conns: dict[Any, Conn], index: int) -> bool:
        """An agent repeats its status, if that changes something for its leader."""
        for conn in list(conns.values()):
            if conn.agent == index and conn.agent_open and conn.leader_open and not conn.up:
                (message,) = self.nodes.after(nodes[index], "heartbeat").up
                leader = nodes[conn.leader]
                if self.nodes.after(leader, "hears", conn.number, conn.boot, message).node != leader:
                    conns[conn[:3]] = conn._replace(up=(message,))
                    return True
        return False


def _put(conns: dict[Any, Conn], conn: Conn) -> None:
    if conn.agent_open or conn.leader_open:
        conns[conn[:3]] = conn
    else:
        conns.pop(conn[:3], None)
