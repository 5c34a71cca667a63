"""The run directory: one folder per job on the shared file system, which only the job's owner may read."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from elastic_hpc.errors import ElasticError, UsageError
from elastic_hpc.membership.leaderless import LEADERLESS
from elastic_hpc.membership.wishes import Bounds, saved
from elastic_hpc.record import folders
from elastic_hpc.record.events import EventReader

_HELD = "running"
"""The file that ``hold`` locks."""

RESUMING = "resuming"
"""A file in the run directory while a command resumes or removes the job, so that no other command does."""

_OF_AN_END = ("left", "over", "once-more")
"""Files that describe the end of a run, and would mislead a run that begins after it: see ``agent.once_more``."""

_LEFT = "left"
"""A file that the batch script looks for: see ``mark_left``."""


class RunDir:
    """Paths and files of one job.

    ``secret``: the key of the control connections. ``spec.json``: the options of the job. ``endpoint.json``: the
    addresses of the leader and of other agents (``record.endpoint``). ``state.json``: round and budgets, carried over
    requeues. ``events.NODE.jsonl``: what happened while that node led, one JSON object a line. ``heartbeat``: its
    modification time is the last heartbeat of a leader. ``verdict.json``: how the last run ended. ``warning.json``:
    Slurm's last warning (``agent.warned``). ``starts.json``: under torchrun, how often the job was started.
    ``first.JOB.STEP.RUN``: the node that leads at first, where several nodes could.
    ``logs/RUN.ROUND/NODE.rankFIRST-LAST.log``: the output of the workers of a node; ``NODE.stacks`` there: their stacks
    when they hung. ``logs/RUN.agent-NODE.log``: the output of the agents. ``notices``: marks of nodes
    (``record.health``).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.notices = self.path / "notices"

    def create(self, *, exist_ok: bool = True) -> RunDir:
        """Make the folder, mode 0700. Raises ElasticError if that fails, or if an existing folder belongs to another
        user or other users may write to it, and FileExistsError if there is a folder and ``exist_ok`` is false.
        """
        try:
            folders.make_private(self.path, exist_ok=exist_ok)
        except OSError as error:
            if isinstance(error, FileExistsError) and not exist_ok:
                raise
            raise ElasticError(
                f"run directory {self.path}: {error.strerror}; choose a folder that all nodes share: --log-dir DIR"
            ) from error
        return self

    @classmethod
    def new(cls, folder: str | os.PathLike[str], name: str) -> RunDir:
        """The first of ``name.0``, ``name.1``, ... in ``folder`` that does not exist yet. Raises ElasticError."""
        folders.make_log_dir(folder)
        for number in range(10_000):
            with contextlib.suppress(FileExistsError):
                return cls(Path(folder).absolute() / f"{name}.{number}").create(exist_ok=False)
        raise UsageError(f"--log-dir {str(folder)!r}: no free name left; remove old run directories")

    def make_secret(self) -> bytes:
        """The job's secret, which the first call makes. It is the same for all agents, and after a requeue."""
        self.claim("secret", os.urandom(32).hex())
        return self.read_secret()

    def read_secret(self) -> bytes:
        """The job's secret. Raises ElasticError while there is none, if other users can read the file, or if the file
        belongs to another user.
        """
        path = self.path / "secret"
        try:
            with path.open("rb") as file:
                found, secret = os.fstat(file.fileno()), file.read()
            owner = self.path.stat().st_uid
        except OSError as error:
            raise ElasticError(f"{path}: {error.strerror}") from error
        if found.st_mode & 0o077 or found.st_uid != owner or len(secret) < 32:
            raise ElasticError(
                f"{path}: owner {found.st_uid}, mode {found.st_mode & 0o7777:04o}, {len(secret)} bytes; expected a "
                f"file of mode 0600 of the folder's owner {owner}, with the job's secret; remove it and start again"
            )
        return secret

    def identity(self) -> str:
        """A name that no other run directory has, the same in all runs of the job: a hash of the secret, which does not
        reveal the secret. Raises ElasticError.
        """
        return hashlib.sha256(b"identity of a run directory" + self.read_secret()).hexdigest()[:16]

    def read(self, name: str) -> dict[str, Any] | None:
        """The JSON object in ``name``, or None if there is no such file yet. Raises ElasticError if it is damaged."""
        try:
            folders.look_again(self.path)
            body = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ElasticError(f"{self.path / name}: {error}") from error
        if not isinstance(body, dict):
            raise ElasticError(f"{self.path / name}: expected a JSON object")
        return body

    def script(self) -> bytes:
        """The batch script; empty without one. Raises ElasticError."""
        try:
            return (self.path / "script.sbatch").read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise ElasticError(f"{self.path / 'script.sbatch'}: {error.strerror}") from error

    def write(self, name: str, body: dict[str, Any]) -> None:
        """Replace ``name`` atomically: a reader sees the old object or the new one, whole. Raises OSError."""
        folders.replace(self.path / name, json.dumps(body, indent=1))

    def write_bounds(self, sizes: Sequence[int]) -> None:
        """The worlds of the next run may have only these ``sizes``, ascending. Raises ElasticError and OSError."""
        bounds = Bounds(sizes[0], sizes[-1], tuple(sizes)).body
        self.write("state.json", {**(self.read("state.json") or {}), "bounds": bounds})

    def bounds(self) -> Bounds | None:
        """The bounds of ``write_bounds``; None if the bounds of the submission hold. Raises ElasticError."""
        return saved(self.read("state.json"))

    def beat(self) -> None:
        """Set the modification time of ``heartbeat``, as the heartbeat of a leader. That needs no space on the disk.
        ``endpoint.json`` is not touched, as it may still name an earlier leader. Raises OSError.
        """
        (self.path / "heartbeat").touch(0o600)

    def heartbeat(self) -> int:
        """A number that changes with each heartbeat of a leader; 0 before the first, or if no file can be read."""
        latest = 0
        with contextlib.suppress(OSError):
            folders.look_again(self.path)
        for name in ("heartbeat", "endpoint.json", "events.jsonl"):  # the last one from a leader of an earlier version
            with contextlib.suppress(OSError), open(self.path / name, "rb") as file:  # opened, so NFS asks the server
                latest = max(latest, os.fstat(file.fileno()).st_mtime_ns)
        return latest

    def write_unfit(self, node: str, when: float, reason: str) -> None:
        """Called on ``node``, or by the batch script: why this node could not take part: no leader can know that.
        Raises OSError.
        """
        self.write(f"unfit.{node}.json", {"node": node, "time": when, "reason": reason})

    def unfit(self) -> list[dict[str, Any]]:
        """The nodes of ``write_unfit``: ``node``, ``time``, ``reason``. Raises ElasticError for a damaged file."""
        return [body for path in self.path.glob("unfit.*.json") if (body := self.read(path.name))]

    def verdict(self, run: int) -> dict[str, Any] | None:
        """The verdict of ``run``; None while there is none. Raises ElasticError."""
        verdict = self.read("verdict.json")
        return verdict if verdict and verdict.get("run") == run else None

    def write_warning(self, run: int, reason: str) -> None:
        """Record that Slurm has warned ``run`` that the job is about to end, because of ``reason``. Raises OSError."""
        self.write("warning.json", {"run": run, "reason": reason})

    def warning(self, run: int) -> str:
        """Why Slurm has warned ``run``; empty if it has not. Raises ElasticError."""
        warning = self.read("warning.json") or {}
        return str(warning.get("reason", "")) if warning.get("run") == run else ""

    def hold(self) -> IO[str]:
        """An open file whose lock shows that the launcher of a job on one machine runs; processes inherit the lock. If
        this process has inherited a lock already, the file has no lock of its own.
        """
        file = open(self.path / _HELD, "w")  # noqa: SIM115 - the caller closes the file
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file

    def is_held(self) -> bool | None:
        """Whether the launcher still runs; None for a job without a launcher that calls ``hold``."""
        try:
            with open(self.path / _HELD) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            return True
        return False

    def claim(self, name: str, text: str) -> bool:
        """Write ``text`` to the file ``name``, unless another process has already written it. Returns whether this call
        was the first. Raises ElasticError.
        """
        path = self.path / name
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return False
        except OSError as error:
            raise ElasticError(f"{path}: {error.strerror}") from error
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
        except OSError as error:
            path.unlink()  # the disk is full; a part of the text would never be replaced
            raise ElasticError(f"{path}: {error.strerror}") from error
        return True

    def forget_verdict(self) -> None:
        """Another run begins here: remove the verdict of the last run, and the files of the agents that acted on it."""
        for pattern in ("verdict.json", "turn.*", "acts.*", _LEFT):
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)

    def withdraw(self, run: int) -> dict[str, Any] | None:
        """A leader continues ``run``: remove the verdict of an agent that had found no leader, and the files that
        agents have written because of that verdict. Returns the verdict, or None if there is no such verdict. Raises
        ElasticError and OSError.
        """
        verdict = self.verdict(run)
        if verdict and verdict.get("actor") != LEADERLESS:
            return None
        if verdict:
            (self.path / "verdict.json").unlink(missing_ok=True)
        (self.path / f"acts.{run}").unlink(missing_ok=True)  # the acting agent may write this file after the withdrawal
        for path in self.path.glob(f"turn.{run}.*") if verdict else ():
            path.unlink(missing_ok=True)
        return verdict

    def begin_again(self, *, forget_bounds: bool) -> None:
        """The job is about to be resumed after its end. Its last verdict stays until the next verdict.
        ``forget_bounds``: the bounds of ``write_bounds`` no longer hold. Raises ElasticError and OSError.
        """
        for name in _OF_AN_END:
            (self.path / name).unlink(missing_ok=True)
        state = self.read("state.json") or {}
        if forget_bounds and state.pop("bounds", None):
            self.write("state.json", state)

    def call_also(self, job: str) -> None:
        """Make a link beside the run directory, so that it is also found under the id of ``job``, which continues in
        it.
        """
        with contextlib.suppress(OSError):
            (self.path.parent / job).symlink_to(self.path.name)

    def mark_left(self) -> None:
        """All agents except those of lost nodes have left after the verdict: srun need not wait. Raises OSError."""
        (self.path / _LEFT).touch()

    def mark_acted(self, run: int, job: str) -> None:
        """The verdict of ``run`` was a requeue, and the job was requeued, or submitted again, as ``job``. Raises
        OSError.
        """
        (self.path / f"acted.{run}").write_text(job)

    def acted(self, run: int) -> str | None:
        """The id of the job that continues after ``run``; None if there is no such job yet."""
        with contextlib.suppress(OSError):
            return (self.path / f"acted.{run}").read_text()
        return None

    def goes_on_as(self, run: int) -> str | None:
        """The id of the last job that continued this job, after ``run`` or an earlier run."""
        return next((job for number in range(run, -1, -1) if (job := self.acted(number))), None)

    def last_round(self) -> dict[str, Any]:
        """The event ``round`` of the last world that was formed; empty before the first. It has the highest number: an
        earlier leader may write its last events later, when the file server answers again.
        """
        rounds = (event for event in self.events() if event["event"] == "round")
        return max(rounds, key=lambda event: int(event["round"]), default={})

    def events(self) -> list[dict[str, Any]]:
        """All events so far, without lines that are damaged or not complete yet."""
        reader = EventReader(self.path)
        reader.read()
        return reader.events
