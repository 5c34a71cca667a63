"""``endpoint.json``: the address of a job's leader, and the addresses of other agents, which know the next leader if
this leader is lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from elastic_hpc.errors import ElasticError
from elastic_hpc.membership.roster import Host
from elastic_hpc.record.rundir import RunDir

ENDPOINT = "endpoint.json"

_MOST_OTHERS = 32
"""Maximum number of other agents in the file; each of them knows the leader."""


@dataclass(frozen=True)
class Published:
    """The content of ``endpoint.json``, which the leader writes."""

    run: int
    leader: Host
    others: tuple[Host, ...] = ()
    """Agents that followed the leader when the last round was formed, ``_MOST_OTHERS`` at most."""
    job: str = ""
    """The job in the identity of its agents (``network.identity``)."""

    @classmethod
    def of(cls, run: int, leader: Host, agents: Iterable[Host], job: str = "") -> Published:
        """``agents``: all agents of the job; the ``leader`` may be among them."""
        others = (agent for agent in agents if agent.node != leader.node)
        return cls(run, leader, tuple(itertools.islice(others, _MOST_OTHERS)), job)

    def body(self) -> dict[str, Any]:
        """The content of the file."""
        others = [_fields(agent) for agent in self.others]
        return {"job": self.job, "run": self.run, **_fields(self.leader), "others": others}


def read_published(rundir: RunDir) -> Published | None:
    """The content of the file, whichever run it is from; None if there is no file. Raises ElasticError."""
    body = rundir.read(ENDPOINT)
    if body is None:
        return None
    try:
        others = tuple(map(_host, body.get("others", ())))
        return Published(int(body["run"]), _host(body), others, str(body.get("job", "")))
    except (KeyError, TypeError, ValueError) as error:
        raise ElasticError(f"{rundir.path / ENDPOINT}: not as a leader writes it: {error!r}") from error


def _fields(host: Host) -> dict[str, Any]:
    return {"node": host.node, "host": host.name, "addresses": list(host.addresses), "port": host.port}


def _host(fields: dict[str, Any]) -> Host:
    return Host(int(fields["node"]), str(fields["host"]), tuple(map(str, fields["addresses"])), int(fields["port"]))
