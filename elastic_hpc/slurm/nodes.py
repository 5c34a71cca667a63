"""What Slurm says about nodes: which nodes it takes out of service, now or soon."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from elastic_hpc.membership.nodes import fold
from elastic_hpc.slurm import client
from elastic_hpc.slurm.job import epoch
from elastic_hpc.slurm.states import words


class Maintenance(NamedTuple):
    """A reservation with the flag MAINT."""

    name: str
    nodes: str
    """In Slurm's notation."""
    start: float
    """In seconds since the epoch; so is ``end``."""
    end: float


_OUT = {
    "DRAIN": "drained",
    "DRAINING": "drained",
    "DRAINED": "drained",
    "FAIL": "set to fail",
    "FAILING": "set to fail",
}
"""The words in a node's state that end its service, and a phrase for each."""


def out_of_service(names: Iterable[str]) -> dict[str, str]:
    """The nodes of ``names`` that Slurm gives to no further job, with the reasons, in the administrator's words. A site
    with PrivateData=nodes does not show them to users. Raises SlurmError.
    """
    found = {}
    for shown in re.split(r"\n\s*\n", client.scontrol("show", "node", fold(names))):
        name, state = (re.search(rf"^\s*{field}=(\S+)", shown, re.MULTILINE) for field in ("NodeName", "State"))
        if name and state and (how := next((_OUT[word] for word in words(state[1]) if word in _OUT), "")):
            reason = re.search(r"^ +Reason=(.*?)(?: \[[^\[\]]*\])?$", shown, re.MULTILINE)
            found[name[1]] = f"{how} in Slurm" + (f": {reason[1]}" if reason else "")
    return found


def maintenance() -> list[Maintenance]:
    """Planned maintenance, and maintenance that has begun. Raises SlurmError."""
    found = []
    for row in client.records(client.scontrol("show", "reservation", "--oneliner")):
        start, end = epoch(row.get("StartTime", "")), epoch(row.get("EndTime", ""))
        if "MAINT" in row.get("Flags", "").split(",") and start and end:
            found.append(Maintenance(row["ReservationName"], row.get("Nodes", ""), start, end))
    return found
