"""Moments, as people type them: how long ago, a time of day, or a date. Pure."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from elastic_hpc.errors import UsageError
from elastic_hpc.options import durations


def parse(text: str, now: float) -> float:
    """The moment that ``text`` names, in seconds since the epoch, as is ``now``: ``10m`` or ``2d``, so long ago;
    ``21:44``, the last time that the clock showed; ``2026-11-28`` or ``2026-11-28T21:44:05``, in this machine's time
    zone unless the text names another. Raises UsageError.
    """
    try:
        if re.fullmatch(r"\d{1,2}:\d\d(:\d\d)?", text, re.ASCII):
            today = datetime.fromtimestamp(now)  # noqa: DTZ006 - local time, whatever its offset was the day before
            hour, minute, second = (int(part) for part in f"{text}:0".split(":")[:3])
            moment = today.replace(hour=hour, minute=minute, second=second, microsecond=0)
            return (moment if moment <= today else moment - timedelta(days=1)).timestamp()
        if re.match(r"\d{4}-\d\d-\d\d", text, re.ASCII):
            return datetime.fromisoformat(re.sub("Z$", "+00:00", text)).timestamp()
        return now - durations.parse(text).total_seconds()
    except (ValueError, OverflowError):  # a UsageError is a ValueError
        raise UsageError(
            f"{text!r}: expected how long ago, for example 90 (seconds), 10m or 2d, or a time, for example 21:44 or "
            "2026-11-28T21:44"
        ) from None
