"""The errors that a user may meet. Each is one line that says what to type instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


NO_FOLDER = "the current directory does not exist any more; cd to one that does"


class ElasticError(Exception):
    """Anything this package raises on purpose. ``exit_code`` is what a command ends with."""

    exit_code = 1


class UsageError(ElasticError, ValueError):
    """Bad input: what was given, what was expected, and what to type. Nothing was done."""

    exit_code = 2


class ArgumentError(ElasticError):
    """A UsageError that argparse passes on; for a ValueError argparse prints a message of its own."""

    exit_code = 2


def of_option(flag: str, parse: Callable[[str], T]) -> Callable[[str], T]:
    """``parse`` for the value of the option ``flag``, which its error messages name."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except UsageError as error:
            raise UsageError(f"{flag} {error}") from None

    return parsed


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """``parse`` as the ``type`` of an argument: the user sees its own error messages."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except UsageError as error:
            raise ArgumentError(str(error)) from None

    return parsed


class SlurmError(ElasticError):
    """Slurm refused, or could not be asked. It does not mean that there are no jobs or nodes."""


class JobEnded(ElasticError):
    """The job is over for this agent: ``outcome`` is the verdict's, or ``lost`` if the leader cannot be reached."""

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
