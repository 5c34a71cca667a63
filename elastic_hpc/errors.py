"""The errors that a user may see. Each is one line that says what to type instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


NO_FOLDER = "the current directory does not exist any more; cd to one that does"


class ElasticError(Exception):
    """Any error that this package raises on purpose. ``exit_code``: the exit code of a command that fails with this
    error.
    """

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


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.7, prefix: str = "") -> str:
    """A question for the ``known`` word that ``word`` resembles, with ``prefix``; empty if there is none."""
    from difflib import get_close_matches  # noqa: PLC0415 - only an error needs it

    return "".join(f"did you mean {prefix}{close}?" for close in get_close_matches(word, known, n=1, cutoff=cutoff))


class SlurmError(ElasticError):
    """Slurm refused or did not answer. This does not mean that there are no jobs or nodes."""


class JobEnded(ElasticError):
    """The job has ended for this agent: ``outcome`` is the verdict's, or ``lost`` if the leader cannot be reached.
    ``logged``: the leader has logged the reason, which is the verdict's.
    """

    def __init__(self, outcome: str, reason: str, *, logged: bool = False) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
        self.logged = logged
