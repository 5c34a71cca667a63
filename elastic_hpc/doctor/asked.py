"""Slurm's settings for the checks: a check gets a setting by name, and what Slurm does not show is unknown. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from elastic_hpc.slurm.settings import Facts


class Unknown(Exception):
    """Slurm does not show what a check needs."""


def config(facts: Facts, name: str) -> str:
    return _value(facts.config, name, facts.unknown.get("config"), "scontrol show config")


def setting(facts: Facts, name: str) -> tuple[str, str]:
    """The value of a setting, and the setting as a finding shows it."""
    value = config(facts, name)
    return value, f"{name} = {value}"


def partition(facts: Facts, name: str) -> str:
    return _value(facts.partition, name, facts.unknown.get("partition"), "scontrol show partition")


def has(facts: Facts, name: str, option: str) -> bool:
    """Whether the setting ``name``, a list, has ``option``."""
    return option in config(facts, name).lower().split(",")


def number(text: str, name: str) -> int:
    """The number at the beginning of ``text``, for example of ``30 sec``."""
    match = re.match(r"\d+", text)
    if match is None:
        raise Unknown(f"{name} = {text}: expected a number")
    return int(match[0])


def slurm_conf(line: str) -> str:
    return f"administrator, slurm.conf: {line}"


def _value(settings: Mapping[str, str], name: str, reason: str | None, command: str) -> str:
    if reason is not None or name not in settings:
        raise Unknown(reason or f"{command} does not show {name}")
    return settings[name]
