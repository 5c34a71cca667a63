"""Whose fault the failures of a job are: its script's, or a node's. Pure."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from elastic_hpc.membership.causes import blames_machine, signature
from elastic_hpc.membership.messages import Failure
from elastic_hpc.membership.strikes import Strike

_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL})

IN_A_ROW = 3
"""Number of failures in a row after which their node is blamed: of any kind, if there is no progress in between; else
if the last one looks like the machine's.
"""

ALIVE_IS_PROGRESS = 60.0
"""Seconds after which a round has made progress, if its workers report no steps."""


@dataclass(frozen=True)
class Blame:
    """What is known of a failure from the failures before it."""

    repeated: bool = False
    """The job has failed in the same way before, without progress in between."""
    node: bool = False
    """On this node alone the job fails again and again."""


NOBODY = Blame()


class FailureHistory:
    """Whether the job makes progress from one failure to the next, and if not, whether its script or a node is to
    blame: what fails on different nodes is the script, what fails on one node alone is that node. A machine that fails
    every hour is to blame too, though its workers make progress in between.
    """

    def __init__(self, strikes: Iterable[Strike] = ()) -> None:
        """``strikes``: those of the runs before, as a node that was left out for a failure may have been innocent."""
        before = [strike for strike in strikes if strike.signature]
        self.step = -1
        """Last training step that a worker reported; -1 for none."""
        self.last_failure: Failure | None = None
        self._failed = [(strike.signature, strike.node) for strike in before]
        """Signature and node of the failures since the last progress; the signature of a crash is empty."""
        self._nodes: list[str] = []
        """Nodes of the last failures, whatever progress there was in between."""
        self._failed_at_step = max((strike.step for strike in before), default=-1)

    def judge(self, failure: Failure, alive: float, *, alone: bool) -> Blame:
        """A round has failed after ``alive`` seconds. An echo does not count, nor does a failure that comes from
        outside, such as most signals. Two crashes by the same signal may have different causes. No node is to blame for
        a hang. A node that is ``alone`` in its round cannot be compared with others: it is to blame only for failures
        that scripts rarely cause.
        """
        is_from_outside = failure.kind == "signal" and -failure.exitcode not in _CRASHES
        if failure.collateral or failure.kind == "stopped" or is_from_outside:
            return NOBODY
        if self.step > self._failed_at_step if self.step >= 0 else alive > ALIVE_IS_PROGRESS:
            self._failed.clear()
        node, mark = failure.node, self._signature(failure)
        nodes = {other for before, other in self._failed if before == mark} if mark else set()
        in_a_row = [other for _, other in self._failed[1 - IN_A_ROW :]] == [node] * (IN_A_ROW - 1)
        self._failed.append((mark, node))
        self._failed_at_step = self.step
        on_node = nodes == {node} or (in_a_row and nodes <= {node})
        self._nodes = [*self._nodes, node][-IN_A_ROW:]
        is_machines = blames_machine(failure.message)
        comparable = failure.kind != "hang" and (not alone or is_machines)
        is_broken = is_machines and nodes <= {node} and self._nodes == [node] * IN_A_ROW
        return Blame(repeated=bool(nodes), node=comparable and (on_node or is_broken))

    def is_same(self, failure: Failure, other: Failure) -> bool:
        """Whether another node has failed by itself in the same way."""
        return (
            not failure.collateral
            and failure.node != other.node
            and signature(failure.kind, failure.message, failure.node)
            == signature(other.kind, other.message, other.node)
        )

    def strike(self, failure: Failure) -> dict[str, Any]:
        """What a ``Strike`` for ``failure`` has to hold, besides the node and the reason."""
        return {"signature": self._signature(failure), "step": self._failed_at_step}

    def on_end(self, failure: Failure | None) -> None:
        """A round ended; ``failure`` is None if no worker failed."""
        self.last_failure = failure or self.last_failure
        if failure is None:
            self._failed.clear()

    @staticmethod
    def _signature(failure: Failure) -> str:
        return "" if failure.kind == "signal" else signature(failure.kind, failure.message, failure.node)
