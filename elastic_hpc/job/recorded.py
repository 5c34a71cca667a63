"""The last line of a batch script: the options of its submission, configuration files included, for ``--resume``. Pure.

If the user has edited the script, the line does not describe the script any more, and is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from elastic_hpc.job.spec import AFTER_GRACE, JobSpec
from elastic_hpc.options.of_joiners import JOINERS
from elastic_hpc.options.sbatch import SBATCH, Given, WarningSignal, scan
from elastic_hpc.options.table import ELASTIC, SCRIPT_SWITCHES, Layer

_MARK = "\n# elastic-sbatch --resume reads this line, unless a line above has been changed: "

_OF_THE_START = frozenset({"array", "begin", "deadline", "dependency", "hold", "kill-on-invalid-dep"})
"""Options that a resumed job does not have: when the job may start, and the array, of which one task is resumed."""


@dataclass(frozen=True)
class Recorded:
    """A submission as recorded."""

    layer: Layer
    script: str
    script_args: Sequence[str]
    module: bool
    no_python: bool


def with_record(script: str, job: JobSpec) -> str:
    """``script``, the batch script of ``job``, with the line; without the line if the job cannot be resumed."""
    words = _words(job) if job.template != "torchrun" else None
    if words is None:
        return script
    script = script.rstrip("\n")
    return f"{script}{_MARK}{_digest(script)} {json.dumps(words)}\n"


def read(script: bytes, source: str) -> Recorded | None:
    """What the batch script ``script`` records, as a layer called ``source``; None if it records nothing, or has been
    edited since.
    """
    text, mark, line = os.fsdecode(script).rpartition(_MARK)
    digest, _, words = line.strip().partition(" ")
    if not mark or digest != _digest(text):
        return None
    switches = tuple(option.scanned() for option in SCRIPT_SWITCHES)
    own = (*(option.scanned() for option in ELASTIC.values()), *switches, *JOINERS.values())
    given, (program, *args) = scan(json.loads(words), own)
    names = {g.name for g in given}
    ours = [(g.name, g.value or "on") for g in given if g.name in ELASTIC]
    sbatch = [replace(g, source=source) for g in given if _is_kept(g)]
    return Recorded(Layer(source, ours, sbatch), program, args, "module" in names, "no-python" in names)


def _is_kept(given: Given) -> bool:
    ours = {*ELASTIC, *(option.name for option in SCRIPT_SWITCHES)}
    return given.name not in ours and given.name not in _OF_THE_START


def _digest(text: str) -> str:
    """A digest that is the same for each submission of a job: it leaves out the name of ``JobSpec.staged``."""
    text = re.sub(r"/\.submission\.\w+", "", text)
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def _words(job: JobSpec) -> list[str] | None:
    """The command line of ``elastic-sbatch`` that makes ``job`` without configuration files; None if there is no such
    command line. It leaves out --log-dir, because the run directory stays.
    """
    passed = (*job.sbatch, *job.joiners)
    if not job.repeatable or any(g.value is None and g.name not in SBATCH for g in passed):
        return None
    settings = [(flag, value) for flag, value, source in job.settings() if source != "default"]
    words = [f"{flag}={value}" for flag, value in settings if flag not in {"--log-dir", "--template"}]
    if "template" in job.sources:
        words.append(f"--template={os.path.abspath(job.template) if os.path.isfile(job.template) else job.template}")
    words += [str(g) for g in job.sbatch]
    words += [f"--grow-{str(g).removeprefix('--')}" for g in job.joiners]
    if job.signal != WarningSignal(lead=job.launch.grace + AFTER_GRACE):
        words.append(f"--signal={job.signal}")
    return [*words, *job.launch.command()]
