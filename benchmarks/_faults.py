"""The faults of soak.py, and the random choice among them."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

KINDS = {
    "worker-kill": "SIGKILL to a worker",
    "worker-crash": "SIGSEGV, SIGABRT, SIGBUS or SIGTERM to a worker",
    "worker-freeze": "SIGSTOP to a worker, SIGCONT after 1 to 12 s",
    "agent-kill": "SIGKILL to an agent, on any node",
    "agent-freeze": "SIGSTOP to an agent, SIGCONT after 1 to 12 s",
    "node-power": "power loss of a node that does not lead, healed after 1 to 12 s",
    "head-power": "power loss of the leader's node",
    "node-cut": "partition: a node that does not lead has no links for 1 to 12 s",
    "head-cut": "partition: the leader's node has no links for 1 to 12 s",
    "half-cut": "partition: each node of a random half has no links for 1 to 12 s",
    "slurmctld": "slurmctld ends, and is started again after 1 to 12 s",
}
BREAKING = {"worker-kill", "worker-crash", "agent-kill", "node-power", "head-power"}
"""Faults that always end the round; after the others, the round may continue."""
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGTERM)
MOMENTS = ("any", "step", "checkpoint")
"""Moments of a first fault: a random moment, right after a step, while a checkpoint is written."""
SECOND_MOMENTS = ("at once", "forming", "starting")
"""Moments of a second fault: together with the first, while the next round forms, while its workers start."""


@dataclass(frozen=True)
class Draw:
    """The random choices for a fault, made before anything runs."""

    kind: str
    moment: str
    pick: float
    """Selects one of the possible nodes, 0 to 1."""
    seconds: float
    """Duration of the fault, for faults that end."""
    delay: float
    """Seconds to wait before the fault, for the moment ``any``."""
    crash: signal.Signals


@dataclass
class Fault:
    """A fault that was injected."""

    kind: str
    nodes: tuple[str, ...]
    moment: str
    seconds: float | None
    """Duration of the fault; None where nothing ends it."""
    time: float
    round: int
    """The newest round when the fault was injected."""
    group: int
    """Faults that were injected together have the same number."""
    effects: list[str] = field(default_factory=list)
    """Events before the next fault that name one of the nodes."""
    next_step: float | None = None
    """Seconds to the first step of the next round; None if the fault ended no round."""


def draws(seed: int, faults: int, kinds: Sequence[str]) -> list[list[Draw]]:
    """``faults`` faults to inject; two in one list come together. No kind is repeated before all kinds were drawn."""
    rng = random.Random(seed)  # noqa: S311 - it has to repeat
    bag: list[str] = []

    def draw(moments: Sequence[str], but: str = "") -> Draw:
        if not set(bag) - {but}:
            bag.extend(rng.sample(kinds, len(kinds)))
        kind = next(kind for kind in bag if kind != but)
        bag.remove(kind)
        moment, pick = rng.choice(moments), rng.random()
        return Draw(kind, moment, pick, rng.uniform(1, 12), rng.expovariate(1), rng.choice(CRASHES))

    made: list[list[Draw]] = []
    while (left := faults - sum(map(len, made))) > 0:
        made.append([draw(MOMENTS)])
        if left > 1 and len(kinds) > 1 and rng.random() < 0.25:
            made[-1].append(draw(SECOND_MOMENTS, but=made[-1][0].kind))
    return made
