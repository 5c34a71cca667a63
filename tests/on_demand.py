"""The mark of tests that are too slow for every run."""

from __future__ import annotations

import os

import pytest

ON_DEMAND = pytest.mark.skipif("ELASTIC_HPC_ALL_FAULTS" not in os.environ, reason="on demand: ELASTIC_HPC_ALL_FAULTS=1")
