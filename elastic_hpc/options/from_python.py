"""Options and values given in Python, written as on a command line. Pure."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import date, datetime, timedelta
from enum import Enum
from numbers import Integral, Real
from typing import Any

from elastic_hpc.errors import UsageError, did_you_mean
from elastic_hpc.options import durations
from elastic_hpc.options.of_joiners import JOINERS, without_prefix
from elastic_hpc.options.sbatch import COMMAND_LINE_ONLY, REFUSED, SBATCH, Given, Option, named
from elastic_hpc.options.table import ELASTIC
from elastic_hpc.options.torchrun import OPTIONS
from elastic_hpc.options.values import HangTimeout

PYTHON = "Python"
"""The source of a setting that comes from a call in Python."""

_TIMES = frozenset(option.name for option in ELASTIC.values() if option.type in {durations.parse, HangTimeout.parse})
_SLURMS_TIMES = frozenset({"time", "time-min", "delay-boot"})
_MOMENTS = frozenset({"begin", "deadline"})
_LISTS = frozenset(
    {
        *("preload", "tee", "local-ranks-filter", "container-mounts"),
        *("array", "clusters", "dependency", "exclude", "export", "gres", "licenses", "mail-type", "nodelist"),
        *("partition", "propagate", "profile", "acctg-freq", "qos", "reservation"),
    }
)
"""Options that take a list of values, separated by commas."""
_TORCHRUN = {option.name: option for option in OPTIONS if option.name not in ELASTIC}


def word(value: Any, what: str) -> str:
    """``value`` as one word of a command line: an argument of the script, or its path. Errors call it ``what``."""
    value = value.value if isinstance(value, Enum) else value
    if _is_number(value):
        return str(value)
    text = value.__fspath__() if _is_path(value) else value
    if isinstance(text, str):
        if "\0" in text:
            raise UsageError(f"{what} {value!r}: expected a string without a NUL, which no command line can have")
        return str(text)
    raise UsageError(f"{what} {value!r}: expected a string, a number or a Path; write str(...) of what you mean")


def environment(env: Mapping[str, object] | None) -> list[str]:
    """``NAME=VALUE`` for each variable. A variable that is None is left out."""
    if not (env is None or isinstance(env, Mapping)):
        raise UsageError(f"env={env!r}: expected a dict, for example env={{'OMP_NUM_THREADS': '8'}}")
    for name in env or ():
        if not isinstance(name, str) or "=" in name:
            raise UsageError(f"env {name!r}: expected the name of a variable, for example 'OMP_NUM_THREADS'")
    return [f"{name}={word(value, f'env {name}')}" for name, value in (env or {}).items() if value is not None]


def lines(setup: str | Iterable[object]) -> list[str]:
    """The set-up lines of ``setup``: one string is one line."""
    found = [setup] if isinstance(setup, str) else list(setup) if isinstance(setup, Iterable) else [setup]
    if isinstance(setup, Mapping) or not all(isinstance(line, str) for line in found):
        raise UsageError(f"setup={setup!r}: expected a line, or several, for example ['module load cuda']")
    return [word(line, "setup") for line in found]


def options(
    given: Mapping[str, object], sbatch: Mapping[str, object] | None = None
) -> tuple[list[Given], AbstractSet[str]]:
    """The options that ``given`` and ``sbatch`` set, and the names of options that they unset, also those of a file.

    ``given`` has our options, torchrun's and sbatch's by name, with ``_`` for ``-``; ``sbatch`` has options that
    only a newer sbatch knows. None means not given; True sets a switch, False unsets it.
    """
    if not (sbatch is None or (isinstance(sbatch, Mapping) and all(isinstance(name, str) for name in sbatch))):
        raise UsageError(f"sbatch={sbatch!r}: expected a dict of options by name, for example sbatch={{'nice': 100}}")
    newer = sbatch or {}
    found: list[Given] = []
    unset: set[str] = set()
    for key, value in (*given.items(), *newer.items()):
        if value is None:
            continue
        option = _option(key, may_be_new=key in newer)
        if option.name in ELASTIC:
            found.append(Given(option, text(option.name, value), PYTHON))
        elif value is False and option.value != "=":
            unset.add(option.name)
        elif value is True and option.value != "=":
            found.append(Given(option, None, PYTHON))
        elif not option.value:
            raise UsageError(f"{key}={value!r}: expected True or False")
        else:
            found.append(Given(option, text(option.name, value, whole=option.name not in _TORCHRUN), PYTHON))
    return found, unset


def _option(key: str, *, may_be_new: bool) -> Option:
    """The option that ``key`` names. ``may_be_new``: a newer sbatch may have it."""
    name = key.replace("_", "-")
    if name in ELASTIC:
        if may_be_new and name not in SBATCH:
            raise UsageError(
                f"sbatch {key!r}: is elastic-sbatch's own option, write {key.replace('-', '_')}=... beside sbatch="
            )
        return Option(name)
    if name in COMMAND_LINE_ONLY:
        raise UsageError(f"{key}: belongs on sbatch's command line, a job in Python has no such option")
    if option := _TORCHRUN.get(name) or SBATCH.get(name) or JOINERS.get(name):
        return option
    if may_be_new:
        return named(name)
    known = [option.replace("-", "_") for option in (*ELASTIC, *SBATCH, *_TORCHRUN, *JOINERS) if option not in REFUSED]
    newer = f"an option that only a newer sbatch has goes into sbatch={{{name!r}: ...}}"
    meant = did_you_mean(name.replace("-", "_"), known)
    raise UsageError(f"{key}: unknown option; {meant}{' ' * bool(meant)}{newer}")


def text(name: str, value: object, *, whole: bool = False) -> str:
    """``value`` of the option ``name`` as it would be typed. ``whole``: Slurm takes only whole numbers here."""
    value = value.value if isinstance(value, Enum) else value
    if name in {"nodes", "nnodes"}:
        return _nodes(name, value)
    if isinstance(value, bool) and name in ELASTIC and ELASTIC[name].is_switch:
        return "on" if value else "off"
    if name in {"preload", "drain-signal"} and value is False:
        return "off"
    if isinstance(value, (timedelta, date)):
        return _time(name, value)
    if name == "array" and isinstance(value, range) and value and value.step > 0:
        return f"{value[0]}-{value[-1]}" + (f":{value.step}" if value.step > 1 else "")
    if name == "rdzv-conf" and isinstance(value, Mapping):
        pairs = ((key, durations.as_text(v) if isinstance(v, timedelta) else v) for key, v in value.items())
        return ",".join(f"{key}={_scalar(name, item, whole=False)}" for key, item in pairs)
    if name == "python" and isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return shlex.join(word(item, name) for item in value)
    if isinstance(value, (list, tuple, AbstractSet)) and value and without_prefix(name) in _LISTS:
        texts = [_scalar(name, item, whole=whole) for item in value]
        return ",".join(sorted(texts) if isinstance(value, AbstractSet) else texts)
    return _scalar(name, value, whole=whole)


def _scalar(name: str, value: Any, *, whole: bool) -> str:
    shown = f"{name.replace('-', '_')}={value!r}"
    if not _is_number(value):
        if isinstance(value, (str, Enum)) or _is_path(value):
            return word(value, f"{name.replace('-', '_')}:")
        raise UsageError(f"{shown}: expected a string or a number, as on a command line")
    if isinstance(value, Integral) or (math.isfinite(value) and value == int(value)):
        return str(int(value))
    if whole or not math.isfinite(value):
        raise UsageError(f"{shown}: expected a whole number, or a string in Slurm's notation, for example '16G'")
    return str(float(value))


def _time(name: str, value: timedelta | date) -> str:
    shown = f"{name.replace('-', '_')}={value!r}"
    if isinstance(value, timedelta) and value > timedelta(0):
        if name in _TIMES:
            return durations.as_text(value)
        if without_prefix(name) in _SLURMS_TIMES:
            return durations.slurm_time(value)
        if name in _MOMENTS:
            return f"now+{math.ceil(value.total_seconds())}"
    if name in _MOMENTS and isinstance(value, datetime):
        local = value.astimezone().replace(tzinfo=None) if value.tzinfo else value
        return local.isoformat(timespec="seconds")
    if name in _MOMENTS and isinstance(value, date):
        return value.isoformat()
    raise UsageError(f"{shown}: expected {'a time above 0' if isinstance(value, timedelta) else 'no date'} here")


def _nodes(name: str, value: Any) -> str:
    """``(4, 8)`` is MIN and MAX, ``[4, 6, 8]`` are exact numbers, a range stands for its numbers."""
    if isinstance(value, range) and value:
        sizes = sorted(value)
        return f"{sizes[0]}:{sizes[-1]}" if abs(value.step) == 1 else ",".join(map(str, sizes))
    if isinstance(value, (tuple, list)) and value:
        numbers = [_scalar(name, item, whole=True) for item in value]
        if len(numbers) == 2 and isinstance(value, list):
            raise UsageError(
                f"{name}={value!r}: expected ({', '.join(numbers)}) for {numbers[0]} to {numbers[1]}, or "
                f"'{','.join(numbers)}' for exactly {numbers[0]} or {numbers[1]}"
            )
        return (":" if len(numbers) == 2 else ",").join(numbers)
    if isinstance(value, str) or _is_number(value):
        return _scalar(name, value, whole=True)
    raise UsageError(f"{name}={value!r}: expected a number, '4:8', (4, 8) or range(4, 9)")


def _is_path(value: Any) -> bool:
    """Whether ``value`` is an ``os.PathLike``."""
    return hasattr(type(value), "__fspath__")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
