"""How far a job is, in a line, and whether it makes no progress. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Reached(NamedTuple):
    """How far a job is."""

    round: int
    nodes: int
    """Nodes of the world that trains; 0 while there is none."""
    workers: int
    restarts: int
    step: int | None
    """The last step that the workers of this round have reported."""

    def __str__(self) -> str:
        if not self.nodes:
            return f"no world, round {self.round} is being formed"
        counts = {"node": self.nodes, "worker": self.workers, "restart": self.restarts}
        nodes, workers, restarts = (f"{count} {what}{'s' * (count != 1)}" for what, count in counts.items())
        step = "" if self.step is None else f"step {self.step}, "
        return f"{step}{nodes}, {workers}, round {self.round}, {restarts}"


@dataclass
class Standstill:
    """Notices when no new step was done for ``after`` seconds. Times are on one clock."""

    after: float
    _highest: int = -1
    _since: float | None = None
    _told: bool = field(default=False)

    def look(self, progress: Reached, now: float) -> str:
        """Call this regularly. Returns the reason when a standstill is noticed, else an empty text: once for each
        standstill. A job that trains and reports no steps counts as making progress, as its progress is unknown.
        """
        step = progress.step
        trains_unseen = bool(progress.nodes) and step is None and self._highest < 0
        if self._since is None or trains_unseen or (step is not None and step > self._highest):
            self._since, self._told = now, False
        self._highest = max(self._highest, -1 if step is None else step)
        if self._told or now - self._since < self.after:
            return ""
        self._told = True
        last = f"no step after step {self._highest}" if self._highest >= 0 else "no step"
        after = f"{self.after:g} s" if self.after < 120 else f"{self.after / 60:.3g} minutes"
        return f"{last} for {after}; now: {progress}"
