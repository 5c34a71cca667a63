"""Cuts links between two nodes, while both still reach all other nodes."""

from __future__ import annotations

from conftest import Cluster

NOBODY = "02:00:00:00:00:99"
"""An address of no machine: the bridge between the nodes drops packets to it."""


class Links:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._cut: list[tuple[str, str]] = []

    def cut(self, here: str, there: str) -> None:
        """Drop all packets from ``here`` to ``there``."""
        self._neighbour(here, "replace", there, "lladdr", NOBODY, "nud", "permanent")
        self._cut.append((here, there))

    def heal(self) -> None:
        while self._cut:
            here, there = self._cut.pop()
            self._neighbour(here, "del", there)

    def _neighbour(self, node: str, what: str, other: str, *more: str) -> None:
        command = ["ip", "neigh", what, f"10.213.0.{other[1:]}", "dev", "eth0", *more]
        self._cluster.mini("exec", "--root", "--node", node, "--", *command)
