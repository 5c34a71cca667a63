"""How many nodes a job may have now, and which of its nodes leave: the requests for that, and the answers. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from elastic_hpc.membership.nodes import BATCH_HOST, fold, votes
from elastic_hpc.membership.peers import Peers
from elastic_hpc.membership.policy import Policy
from elastic_hpc.membership.promises import ROOM, Promises
from elastic_hpc.membership.roster import Host
from elastic_hpc.membership.rules import surplus
from elastic_hpc.membership.wishes import Bounds, Parting, Wishes
from elastic_hpc.membership.yielding import Holding

_NO_SLURM = "Slurm's commands are not here, so no node is given back"


@dataclass(frozen=True)
class Answer:
    """The answer to a request."""

    text: str = ""
    """What happens to the request, if there is more to say."""
    refusal: str = ""
    """Why the request is refused; empty if it was accepted."""


class Sizing:
    """The bounds and the partings under one leader."""

    def __init__(
        self,
        policy: Policy,
        bounds: Bounds | None,
        promises: Promises,
        peers: Peers,
        event: Callable[..., None],
        *,
        node: int,
        gives_back: bool,
    ) -> None:
        """``policy``: as submitted. ``bounds``: from an earlier run, instead of those in ``policy``. ``node``: the
        leader's. ``gives_back``: nodes can be returned to Slurm.
        """
        self._submitted, self._promises, self._peers, self._event = policy, promises, peers, event
        self.staying = frozenset({node, BATCH_HOST})
        """Nodes that cannot be returned to Slurm."""
        self._leader, self._gives_back = node, gives_back
        self._cap: int | None = None
        self._room = max(ROOM, policy.max_nodes)
        self._released: dict[int, Host] = {}
        """The job's own nodes that were released, and not yet returned to Slurm."""
        self._why: dict[int, str] = {}
        self.policy = policy
        """The policy that holds now."""
        if bounds and not self.wishes.number:
            self._hold(self.wishes.changed(bounds=bounds))
        self._renew()

    @property
    def wishes(self) -> Wishes:
        return self._promises.wishes

    @property
    def shrinks(self) -> bool:
        """Whether other bounds hold than those of the submission, and nodes beyond them must be returned to Slurm."""
        return self._gives_back and (self.wishes.bounds is not None or self._cap is not None)

    def adopt(self, wishes: Wishes) -> bool:
        """An agent holds ``wishes``. True if they are newer."""
        if wishes.number <= self.wishes.number:
            return False
        self._hold(wishes)
        return True

    # requests

    def resize(self, bounds: Bounds, live: Collection[int], formed: Collection[int]) -> Answer:
        """``live``: connected nodes that do not have to leave. ``formed``: nodes of the running round."""
        if bounds.max_nodes > self._room:
            return Answer(refusal=f"{bounds}: a job that began with less has room for {self._room} nodes at most")
        if bounds != self.wishes.bounds:
            self._hold(self.wishes.changed(bounds=bounds))
            self._event("resize", **bounds.body, reason="user")
        return Answer(self._prospect(frozenset(live), frozenset(formed)))

    def leave(self, parting: Parting, live: Collection[int], host: Host | None, *, settled: bool) -> Answer:
        """``host``: the node's, if it was ever connected. ``settled``: as in ``QuorumView``."""
        name = parting.name
        if parting.give_back and not parting.exclude and host and self._has_left(host):
            return Answer(f"{name} has left already")
        if parting in self.wishes.partings:
            return Answer()
        why = ""
        if parting.asked:
            if parting.node in self.staying and not parting.exclude:
                why = "leads the job" if parting.node == self._leader else "runs the batch script"
                return Answer(refusal=f"{name} {why}, and cannot be given back; expected another node")
            if parting.give_back and not parting.exclude and not self._gives_back:
                return Answer(refusal=_NO_SLURM)
            if not self.policy.fit(frozenset(live) - {parting.node}):
                why = f"without {name} {len(live) - 1} node(s) are left, fewer than MIN {self.policy.min_nodes}"
                if not parting.exclude:
                    return Answer(refusal=why)
            if parting.give_back and host and host in self._peers.missing and host.node not in self.staying:
                if not settled:
                    return Answer(refusal=f"{name} is lost, and the next world is being formed: try again in a moment")
                self.on_release(host.node, host, parting.reason)
        in_touch = self._peers.by_node  # a joiner's end is forgotten with the joiner
        others = tuple(p for p in self.wishes.partings if p.node != parting.node and (p.asked or p.node in in_touch))
        self._hold(self.wishes.changed(partings=(*others, parting)))
        if why:  # until another node has come
            self._event("stays", node=name, reason=parting.reason, why=why)
        elif parting.asked:
            self._event("leave", node=name, reason=parting.reason, exclude=parting.exclude)
        return Answer(why)

    def stay(self, name: str) -> Answer:
        for parting in self.wishes.partings:
            if parting.name == name:
                kept = tuple(other for other in self.wishes.partings if other != parting)
                self._hold(self.wishes.changed(partings=kept))
                self._event("stay", node=name, reason=parting.reason)
        return Answer()

    def cap(self, nodes: int | None, reason: str) -> None:
        if nodes != self._cap:
            self._cap = nodes
            self._renew()
            self._event("cap", nodes=nodes, reason=reason)

    def holding(self, job: str) -> Holding:
        """What the job, with Slurm's id ``job``, holds, and could hold without a cap."""
        policy, peers = self._submitted.within(self.wishes.bounds, None), self._peers
        held = [node for node, status in peers.joined.items() if not peers.why_leaving(status)]
        held.sort(key=lambda node: (node not in self.staying, node), reverse=True)
        return Holding(
            job,
            names=tuple(peers.by_node[node].status.name for node in held),
            missing=len(peers.missing),
            least=max(policy.min_nodes, len(self.staying.intersection(held))),
            most=policy.wanted,
            sizes=policy.sizes,
            own=sum(map(votes, held)),
        )

    # nodes that leave

    def on_release(self, node: int, host: Host, reason: str) -> None:
        """``node`` is released."""
        if votes(node):
            self._released[node], self._why[node] = host, reason
            self._peers.let_go.add(node)

    def on_given_back(self, nodes: Collection[int]) -> None:
        """Slurm has taken back ``nodes``."""
        given = {node: host for node, host in sorted(self._released.items()) if node in nodes}
        if not given:
            return
        for node in given:
            del self._released[node]
        self._hold(self.wishes.changed(given_back=(*self.wishes.given_back, *given)))
        reasons = "; ".join(dict.fromkeys(self._why.pop(node) for node in given))
        self._event("given_back", nodes=[host.name for host in given.values()], reason=reasons)

    @property
    def surplus(self) -> tuple[Host, ...]:
        """Nodes to return to Slurm."""
        return tuple(host for _, host in sorted(self._released.items()))

    def _has_left(self, host: Host) -> bool:
        return host.node not in self._peers.by_node and host not in self._peers.missing

    def _prospect(self, live: frozenset[int], formed: frozenset[int]) -> str:
        held, policy = live | formed, self.policy
        going = surplus(held, self.staying, policy)
        texts = []
        if going:
            how = "" if self._gives_back else f", and stay in the job without workers: {_NO_SLURM}"
            when = "at the next step boundary; if no steps are reported, within a minute"
            texts = [f"{len(going)} node(s) leave {when}: {self._names(going)}{how}"]
        if (idle := len(held) - len(going) - policy.wanted) > 0:
            names = self._names(sorted(self.staying & held))
            texts += [f"{names} stay, as they run the batch script and lead the job: {idle} without workers"]
        if texts:
            return "; ".join(texts)
        if not policy.fit(held):
            return f"the world of {len(formed)} node(s) continues below the new MIN until the next round"
        if policy.max_nodes > len(held) and not policy.grow:
            return (
                f"the job has {len(held)} node(s) and does not grow, as --grow is off: more come with its next requeue"
            )
        return ""

    def _names(self, nodes: Collection[int]) -> str:
        return fold(self._peers.by_node[node].status.name for node in nodes if node in self._peers.by_node)

    def _hold(self, wishes: Wishes) -> None:
        self._promises.wish(wishes)
        self._renew()

    def _renew(self) -> None:
        self._peers.wishes = self.wishes
        self.policy = self._submitted.within(self.wishes.bounds, self._cap)
