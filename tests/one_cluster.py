"""Plugin of ``make test`` for pytest-xdist: the tests on Slurm run on one worker, because there is one cluster; those
of another file at a time on any other. (Its own ``--dist loadgroup`` finds no group with pytest 9.2.)
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


class OneCluster(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return "slurm" if nodeid.startswith("tests/slurm/") else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneCluster:
    return OneCluster(config, log)
