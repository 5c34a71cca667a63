"""Whose fault the failures of a job are: its script's, or a node's. Pure."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from elastic_hpc.membership.causes import signature
from elastic_hpc.membership.hangs import LEARNED
from elastic_hpc.membership.known import BY_NAME, Known
from elastic_hpc.membership.messages import Failure
from elastic_hpc.membership.strikes import Strike

_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL})

IN_A_ROW = 3
"""Number of failures in a row after which their node is blamed: failures of any kind, if there is no progress in
between; else if the last failure looks like the machine's fault.
"""

ALIVE_IS_PROGRESS = 60.0
"""Seconds after which a round counts as progress, if its workers report no steps."""


@dataclass(frozen=True)
class Blame:
    """What earlier failures show about a failure."""

    repeated: bool = False
    """The job has failed in the same way before, without progress in between."""
    node: bool = False
    """The job fails repeatedly on this node alone, or the failure is known to be that node's fault."""
    known: Known | None = None
    """The known cause of the failure, if that decides: the job must leave the node, or stop."""


NOBODY = Blame()


class FailureHistory:
    """Whether the job makes progress from one failure to the next, and if not, whether its script or a node is to
    blame: a failure on different nodes is the script's fault, a failure on one node alone is that node's. A machine
    that fails every hour is to blame too, though its workers make progress in between. For a cause in the table of
    causes (``known``), the answer there decides.
    """

    def __init__(self, strikes: Iterable[Strike] = ()) -> None:
        """``strikes``: from earlier runs, as a node that was excluded for a failure may have been innocent."""
        before = [strike for strike in strikes if strike.signature]
        self.step = -1
        """Last training step that a worker reported; -1 for none."""
        self.last_failure: Failure | None = None
        self._failed = [(strike.signature, strike.node) for strike in before]
        """Signature and node of the failures since the last progress; the signature of a crash is empty."""
        self._nodes: list[str] = []
        """Nodes of the last failures, with or without progress in between."""
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
        known = BY_NAME.get(failure.known)
        progressed = self.step > self._failed_at_step if self.step >= 0 else alive > ALIVE_IS_PROGRESS
        if progressed:
            self._failed.clear()
        node, mark = failure.node, self._signature(failure)
        before = [other for earlier, other in self._failed if earlier == mark] if mark else []
        nodes = set(before)
        # the learned timeout is doubled after an alarm: only the third at the same place proves that the script hangs
        is_doubtful = failure.kind == "hang" and LEARNED in failure.message and len(before) < IN_A_ROW - 1
        in_a_row = [other for _, other in self._failed[1 - IN_A_ROW :]] == [node] * (IN_A_ROW - 1)
        self._failed.append((mark, node))
        self._failed_at_step = self.step
        on_node = nodes == {node} or (in_a_row and nodes <= {node})
        self._nodes = [*self._nodes, node][-IN_A_ROW:]
        if known and known.answer == "leave":
            return Blame(repeated=node in nodes, node=True, known=known)
        is_machines = known is not None and known.party == "node"
        comparable = failure.kind != "hang" and (not alone or is_machines)
        is_broken = is_machines and nodes <= {node} and self._nodes == [node] * IN_A_ROW
        shared = known is not None and known.party == "site"  # all nodes have it: a disk, a quota, a limit
        stops = known is not None and known.answer.startswith("stop") and not progressed
        repeated, on_node = bool(nodes) and not is_doubtful, on_node or is_broken
        return Blame(repeated, comparable and not shared and on_node, known if stops else None)

    def is_same(self, failure: Failure, other: Failure) -> bool:
        """Whether ``failure`` is no echo, and of the same kind as ``other`` on another node."""
        return (
            not failure.collateral
            and failure.node != other.node
            and signature(failure.kind, failure.message, failure.node)
            == signature(other.kind, other.message, other.node)
        )

    def strike(self, failure: Failure) -> dict[str, Any]:
        """The fields of a ``Strike`` for ``failure``, besides the node and the reason."""
        return {"signature": self._signature(failure), "step": self._failed_at_step}

    def on_explained(self) -> None:
        """A broken link explains the last failure, and the job continues without that link: the script is not to blame
        if it fails in the same way.
        """
        self._failed.clear()

    def on_end(self, failure: Failure | None) -> None:
        """A round ended; ``failure`` is None if no worker failed."""
        self.last_failure = failure or self.last_failure
        if failure is None:
            self._failed.clear()

    @staticmethod
    def _signature(failure: Failure) -> str:
        return "" if failure.kind == "signal" else signature(failure.kind, failure.message, failure.node)
