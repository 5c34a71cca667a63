"""Lengths of time, as people type them and as Slurm writes them. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import timedelta

from elastic_hpc.errors import UsageError, of_option

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_NUMBER = r"\d+\.?\d*|\.\d+"


def parse(text: str) -> timedelta:
    """The length of time in ``text``: ``90`` (seconds), ``90s``, ``5m``, ``1h30m``, ``2d``, or Slurm's ``MM:SS`` and
    ``[D-]HH:MM:SS``. Raises UsageError for any other text, and for a time that is not above 0.
    """
    try:
        value = timedelta(seconds=_seconds(text))
    except (ValueError, OverflowError):
        value = timedelta(0)
    if value <= timedelta(0):
        raise UsageError(f"{text!r}: expected a time above 0, for example 90 (seconds), 5m, 1h30m or 1:30:00")
    return value


def _seconds(text: str) -> float:
    parts = re.fullmatch("".join(rf"(?:({_NUMBER}){unit})?" for unit in _UNITS), text, re.ASCII | re.IGNORECASE)
    if parts and text:
        return sum(float(part) * unit for part, unit in zip(parts.groups(), _UNITS.values(), strict=True) if part)
    limit = time_limit(text) if set(text) & set(":-") else None
    plain = re.fullmatch(rf"(?:{_NUMBER})(?:e[-+]?\d+)?", text, re.ASCII | re.IGNORECASE)  # float() reads 1_0 too
    return limit.total_seconds() if limit else float(plain[0]) if plain else 0


def seconds(flag: str) -> Callable[[str], float]:
    """A parser for the value of the option ``flag``. The parser returns seconds."""
    return of_option(flag, lambda text: parse(text).total_seconds())


def as_text(value: timedelta) -> str:
    """``value`` in seconds, to the microsecond; ``parse`` reads it back."""
    return f"{value.total_seconds():.6f}".rstrip("0").rstrip(".")


def slurm_time(value: timedelta) -> str:
    """``value`` in Slurm's notation, ``[D-]HH:MM:SS``, rounded up to a second."""
    minutes, seconds = divmod(math.ceil(value.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hours:02}:{minutes:02}:{seconds:02}"


def time_limit(text: str) -> timedelta | None:
    """The limit that sbatch reads from ``--time=text``: DAYS-HOURS[:MINUTES[:SECONDS]], MINUTES[:SECONDS] or
    HOURS:MINUTES:SECONDS. None for no limit, and for a text that sbatch will refuse.
    """
    match = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", text, re.ASCII)
    if match is None:
        return None
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] or match[4]:
        limit = timedelta(days=days, hours=first, minutes=second, seconds=third)
    else:
        limit = timedelta(minutes=first, seconds=second)
    return limit or None
