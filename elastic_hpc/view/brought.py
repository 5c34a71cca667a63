"""What joiners' nodes have contributed, and what their arrivals and departures have cost. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from elastic_hpc.view.story import JoinedNode, Round, Story


@dataclass(frozen=True)
class Brought:
    """The gains and costs of growth. Times are in seconds."""

    joiners: int = 0
    node_seconds: float = 0.0
    """From the start of each joiner's agent to the agent's end."""
    steps: float = 0.0
    """The joiners' share of the steps that were kept, in proportion to their share of the nodes of the world."""
    came: int = 0
    """Changes of the world in which joiners' nodes came, and none was taken away."""
    standstill: float = 0.0
    """Time in these changes during which no node did a step."""
    taken: int = 0
    """Joiners that were preempted, cancelled or lost, not those that left at their own end or the end of the job."""
    taken_standstill: float = 0.0
    """As ``standstill``, in changes of the world in which such joiners left."""
    taken_repeated: int = 0
    """Steps that were repeated after these changes."""


def brought(story: Story, now: float | None = None) -> Brought:
    """``now``: for a running job, in seconds since the epoch; None for the time of the last event."""
    until = max(now or 0.0, story.last_time)
    came, standstill, taken_standstill, repeated = 0, 0.0, 0.0, 0
    for before, after in pairwise(story.rounds):
        if before.run != after.run:
            continue
        joined = _joined(story, before)
        if any(node.taken and node.node not in after.nodes and _left_by(node, after.formed) for node in joined):
            taken_standstill += _standstill(before, after)
            repeated += story.repeated(before)
        elif {node.node for node in _joined(story, after)} - {node.node for node in joined}:
            came += 1
            standstill += _standstill(before, after)
    return Brought(
        joiners=len(story.joiners),
        node_seconds=sum((until if node.left is None else node.left) - node.joined for node in story.joiners),
        steps=sum(story.kept(round) * len(_joined(story, round)) / len(round.nodes) for round in story.rounds),
        came=came,
        standstill=standstill,
        taken=sum(node.taken for node in story.joiners),
        taken_standstill=taken_standstill,
        taken_repeated=repeated,
    )


def _joined(story: Story, round: Round) -> list[JoinedNode]:
    """The nodes of ``round`` that joiners had brought."""
    return [
        node
        for node in story.joiners
        if node.node in round.nodes and node.joined <= round.formed and not _left_by(node, round.formed)
    ]


def _left_by(node: JoinedNode, when: float) -> bool:
    return node.left is not None and node.left <= when


def _standstill(before: Round, after: Round) -> float:
    """Seconds from the last step of ``before`` to the first step of ``after``; without steps, to its formation."""
    stopped = before.last_at if before.first is not None else before.ended or after.formed
    return max(0.0, (after.formed if after.first is None else after.first_at) - stopped)
