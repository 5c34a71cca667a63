"""The errors a user may meet, each of them one line that says what to type instead."""

from __future__ import annotations


class ElasticError(Exception):
    """Anything this package raises on purpose. ``exit_code`` is what a command ends with."""

    exit_code = 1


class UsageError(ElasticError):
    """Bad input: what was given, what was expected, and what to type. Nothing was done."""

    exit_code = 2


class SlurmError(ElasticError):
    """Slurm refused, or could not be asked. Never means "there is nothing"."""


class JobEnded(ElasticError):
    """The job is over for this agent: ``outcome`` is the verdict's, or ``lost`` if the leader cannot be reached."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
