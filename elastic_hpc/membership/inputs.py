"""What reaches a leader, except from its agents: requests, the stores of rounds, and nodes on their way. Pure."""

from __future__ import annotations

from elastic_hpc.membership.messages import Request
from elastic_hpc.membership.policy import RequestView, StoreView, SupplyView


class Requests:
    """What users, workers and Slurm have requested."""

    def __init__(self) -> None:
        self.request: Request | None = None
        """The strongest request: ``stop`` replaces the two others, ``save-and-stop`` replaces ``drain``."""
        self._reason = ""
        self._requested_at = 0.0

    def add(self, request: Request, reason: str, now: float) -> bool:
        """The time of the first request counts, and the reason of the first request or of a ``stop``. Returns whether
        ``request`` is stronger than the requests before.
        """
        order = (None, "drain", "save-and-stop", "stop")
        if order.index(request) <= order.index(self.request):
            return False
        if self.request is None:
            self._requested_at = now
        if self.request is None or request == "stop":
            self._reason = reason
        self.request = request
        return True

    def view(self, now: float) -> RequestView:
        return RequestView(self.request, self._reason, now - self._requested_at)


class Stores:
    """The stores of this round and the next: each is opened before it is needed."""

    def __init__(self, now: float) -> None:
        self.ports: dict[int, int] = {}
        """By round."""
        self._error = ""
        self._last_ready = now

    def opened(self, round: int, port: int, *, current: int) -> None:
        """Forgets the stores of rounds before ``current``."""
        self.ports = {known: at for known, at in self.ports.items() if known >= current} | {round: port}
        self._error = ""

    def failed(self, reason: str) -> bool:
        """A store could not be opened, because of ``reason``. True if the last attempt had another reason."""
        is_new, self._error = reason != self._error, reason
        return is_new

    def view(self, round: int, now: float, *, needed: bool) -> StoreView:
        """``needed``: ``round`` is being gathered and cannot be formed without its store."""
        ready = round in self.ports
        if ready or not needed:
            self._last_ready = now
        return StoreView(ready, self._error, now - self._last_ready)


class Arrivals:
    """Nodes on their way, as ``agent.supply`` last reported."""

    def __init__(self, *, supplied: bool) -> None:
        """``supplied``: ``agent.supply`` brings nodes, and reports them."""
        self._supplied = supplied
        self._up_to_date = True
        self._starting = self._pending = 0
        self._last_growth = -float("inf")

    def outdate(self) -> None:
        """The connected nodes have changed: until the next report one node counts as starting."""
        self._up_to_date = not self._supplied

    def update(self, starting: int, pending: int, *, up_to_date: bool) -> None:
        """``up_to_date``: the report covers all connected nodes."""
        self._starting, self._pending = starting, pending
        self._up_to_date = self._up_to_date or up_to_date

    def on_growth(self, now: float) -> None:
        """A round is stopped for a larger world."""
        self._last_growth = now

    def view(self, now: float) -> SupplyView:
        starting, coming = (self._starting, self._starting + self._pending) if self._up_to_date else (1, 1)
        return SupplyView(starting, coming, now - self._last_growth)
