"""Runs scripts as torch's agent runs a worker: with or without a standby."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from elastic_hpc.workers import standbys
from elastic_hpc.workers.standbys import Standbys

OUTPUT = Path("output")


class Ran(NamedTuple):
    code: int
    out: str
    err: str
    how: standbys.Started


class Launch:
    """Write the script into the working directory."""

    def __call__(
        self,
        *argv: str,
        warm: bool = True,
        modules: Sequence[str] = ("json",),
        variables: Mapping[str, str] | None = None,
        kill: int = 0,
        pipe: bool = False,
    ) -> Ran:
        """Run ``python -u ARGV`` as a worker."""
        pool = Standbys(argv, modules if warm else (), 1)
        pool.prepare()
        ran = run(pool, argv, warm=warm, variables=variables or {}, kill=kill, pipe=pipe)
        pool.close()
        return ran

    def rounds(self, *argv: str, modules: Sequence[str], count: int, learns: bool = False) -> list[Ran]:
        """Run the script ``count`` times in a row. Each run prepares the standby of the next one."""
        pool = Standbys(argv, modules, 1, learns=learns)
        pool.prepare()
        all_ran = []
        for _ in range(count):
            all_ran.append(run(pool, argv, warm=None))
            pool.look(going=True)
            wait_until_ready(pool)
        pool.close()
        return all_ran


def run(
    pool: Standbys,
    argv: Sequence[str],
    *,
    warm: bool | None,
    variables: Mapping[str, str] | None = None,
    kill: int = 0,
    pipe: bool = False,
) -> Ran:
    environ = {**os.environ, "RANK": "3", "ELASTIC_HPC_ROUND": "7", **(variables or {})}
    OUTPUT.mkdir(exist_ok=True)
    command = [sys.executable, "-u", *argv]
    with (OUTPUT / "out").open("w") as out, (OUTPUT / "err").open("w") as err:
        pool.begin()
        reader, writer = os.pipe() if pipe else (None, None)
        outputs = [out.fileno() if writer is None else writer, err.fileno()]
        worker = pool.take(command, environ, outputs)
        assert warm is None or bool(worker) == warm
        if worker is None:
            worker = subprocess.Popen(
                command, env=environ, stdout=outputs[0], stderr=outputs[1], start_new_session=True
            )
        if writer is not None and reader is not None:
            os.close(writer)
            with open(reader) as read:
                (OUTPUT / "out").write_text(read.read())
        if kill:
            (OUTPUT / "fifo").read_text()
            os.killpg(worker.pid, signal.Signals(kill))
        code = worker.wait(60)
    pool.look(going=False)
    out_err = [re.sub("0x[0-9a-f]{8,}", "0x", (OUTPUT / name).read_text()) for name in ("out", "err")]
    return Ran(code, *out_err, pool.started)


def script(text: str, name: str = "train.py") -> str:
    Path(name).write_text(text)
    return name


def wait_until_ready(pool: Standbys) -> None:
    waiting = [standby._socket for standby in pool._waiting]
    while waiting:
        readable = select.select(waiting, [], [], 30)[0]
        assert readable, "no standby became ready"
        pool.look(going=False)
        waiting = [standby._socket for standby in pool._waiting if not standby.ready]
