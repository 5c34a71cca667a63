"""Who is at the other end of a connection, as proved by the handshake. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

from elastic_hpc.membership.messages import ProtocolError

OUTSIDE = -1
"""The node of a process that is no agent and only sends requests to one (``client``)."""


class RunIsOver(Exception):
    """A later run of this job is active: all processes of earlier runs must leave."""

    def __init__(self, over: int, at_work: int) -> None:
        super().__init__(f"run {over + 1} has ended: run {at_work + 1} is active")
        self.at_work = at_work


class AnotherNode(ProtocolError):
    """The address does not lead to the node that was dialled, but to another one of the job, or to the caller."""


@dataclass(frozen=True)
class Identity:
    """An agent, or a process that sends requests."""

    job: str
    """The job that the user has submitted; the same in all its runs."""
    run: int
    """How often the job has started before."""
    node: int
    """As in ``roster.Host``, or ``OUTSIDE``."""
    name: str
    """Slurm's name of the node."""
    boot: str
    """A random text for this process: a restarted agent has another text."""

    @classmethod
    def of(cls, body: object) -> Identity:
        """From ``vars(identity)``, as received. Raises ProtocolError."""
        expected = {field.name: int if field.type == "int" else str for field in fields(cls)}
        if not isinstance(body, dict) or {name: type(value) for name, value in body.items()} != expected:
            raise ProtocolError(f"not an identity: {str(body)[:200]}")
        return cls(**body)

    def check(self, peer: Identity) -> None:
        """Raises RunIsOver if ``peer`` belongs to a later run of this job, and ProtocolError if it belongs to an
        earlier run or to another job: agents of different runs never talk to each other.
        """
        if peer.job != self.job:
            raise ProtocolError(f"{peer.name} belongs to job {peer.job}, not to {self.job}")
        if peer.run > self.run:
            raise RunIsOver(self.run, peer.run)
        if peer.run < self.run:
            raise ProtocolError(f"{peer.name} belongs to run {peer.run + 1}, which has ended")

    def check_answer(self, peer: Identity, node: int) -> None:
        """Raises AnotherNode unless ``peer``, which has answered, is the agent of ``node``. An address that every
        node has, such as that of docker0, leads to the caller itself.
        """
        if peer.node != node:
            itself = " (this agent itself)" if peer.boot == self.boot else ""
            raise AnotherNode(f"{peer.name}{itself} answers there, and not node {node}")
