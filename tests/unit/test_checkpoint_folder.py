"""The protocol of the checkpoint folder under every order of its steps."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_hpc.training.checkpoint_folder import Files, complete
from elastic_hpc.training.fences import FencedOut, Owner

DEADLINE_S = 60.0


class Killed(BaseException):
    """The process is dead and makes no further calls."""


class Round(threading.Thread):
    """A worker that opens the folder, lists it and saves ``steps``; every call to the file system is a step."""

    def __init__(
        self, folder: Path, round: int | Owner, steps: Sequence[int], *, keep: int, coin: random.Random
    ) -> None:
        """``round``: a round of the default job, or the owner from another job or run."""
        super().__init__(name=f"round {round}", daemon=True)
        self.owner = round if isinstance(round, Owner) else Owner("job", 0, round)
        self.round, self.committed = self.owner.round, []
        self.listed: list[str] | None = None
        self.problem: BaseException | None = None
        self.next = ""
        """The next call of this thread."""
        self._files, self._steps, self._coin = Files(folder, self.owner, keep), steps, coin
        self._folder = folder
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = self._killed = False
        self.start()
        self._waits.acquire()

    def step(self, *, kill: bool = False) -> None:
        """Make the next call, or with ``kill`` no further call."""
        self._killed = kill
        self.next = ""
        self._go.release()
        assert self._waits.acquire(timeout=DEADLINE_S)
        if self.ended:
            self.join()

    def pause(self, call: str = "") -> None:
        """Wait for the next turn; this thread calls it before every call to the file system."""
        self.next = call
        if not self._killed:
            self._waits.release()
            self._go.acquire()
        if self._killed:
            raise Killed

    def listdir(self, listdir: Callable[..., list[str]], folder: Any) -> list[str]:
        """Like readdir: may or may not see names that appear or vanish in the meantime."""
        before = set(listdir(folder))
        self.pause()
        after = set(listdir(folder))
        return [name for name in sorted(before | after) if name in before & after or self._coin.random() < 0.5]

    def run(self) -> None:
        try:
            self.pause()
            self._files.open()
            self.listed = complete(self._folder)
            for step in self._steps:
                name = self._files.begin(step)
                for file in "ab":
                    os.makedirs(self._folder / name, exist_ok=True)  # like torch.distributed.checkpoint
                    descriptor = os.open(self._folder / name / file, os.O_WRONLY | os.O_CREAT)
                    os.write(descriptor, f"{self.round}: {step}".encode())
                    os.close(descriptor)
                self._files.commit(step, name)
                self.committed.append(step)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.problem = error
        self.ended = True
        self._waits.release()


@contextmanager
def stepwise() -> Iterator[None]:
    """Calls of ``Round`` threads wait for their turn; calls of other threads run immediately. Nothing is synced."""

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            actor = threading.current_thread()
            if isinstance(actor, Round):
                actor.pause(name)
                if name == "listdir":
                    return actor.listdir(real, *args)
            return None if name == "fsync" else real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "mkdir", "rename", "listdir", "scandir", "unlink", "rmdir", "fsync"):
            patch.setattr(os, name, wrap(name))
        yield


def contents(folder: Path) -> dict[str, str]:
    """The content of each checkpoint, which must be complete."""
    found = {}
    for path in folder.glob("step-*"):
        texts = {(path / file).read_text() for file in "ab"}
        assert len(texts) == 1
        found[path.name] = texts.pop()
    return found


@contextmanager
def folder_with(*steps: int) -> Iterator[Path]:
    """A folder with checkpoints of an earlier round."""
    folder = Path(tempfile.mkdtemp())
    try:
        first = Round(folder, 0, steps, keep=9, coin=random.Random(0))
        while not first.ended:
            first.step()
        assert contents(folder) == {f"step-{step:08d}": f"0: {step}" for step in steps}
        yield folder
    finally:
        shutil.rmtree(folder)


def advance(folder: Path, actor: Round, last: Round) -> None:
    """Let ``actor`` make its next call, and check all invariants; ``last`` is the highest round."""
    before, listed = contents(folder), last.listed
    actor.step()
    after = contents(folder)
    assert after
    if listed is not None and actor is not last:
        assert after == before
    if listed is None and last.listed is not None:
        assert last.listed == sorted(before, reverse=True)
    assert {f"{last.round}: {step}" for step in last.committed} <= set(after.values())


def finish(folder: Path, rounds: Sequence[Round]) -> None:
    """Run ``rounds`` to their end, the last one first; then the folder must be as the next round expects it."""
    last = rounds[-1]
    for actor in reversed(rounds):
        while not actor.ended:
            advance(folder, actor, last)
        assert actor.problem is None or isinstance(actor.problem, Killed | FencedOut | FileNotFoundError), actor.problem
    assert last.problem is None or isinstance(last.problem, Killed)
    before = contents(folder)
    after = Round(folder, last.round + 1, [], keep=9, coin=random.Random(0))
    while not after.ended:
        after.step()
    assert after.problem is None
    assert sorted(os.listdir(folder)) == [f".fence.{after.owner}", *sorted(before)]
    assert contents(folder) == before


@given(
    turns=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), max_size=14),
    last=st.sampled_from([[3, 4], [5], []]),
    seed=st.integers(0, 2**16),
    killed=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_once_a_round_has_listed_the_folder_only_this_round_changes_it(turns, last, seed, killed):
    coin = random.Random(seed)
    with stepwise(), folder_with(1, 2) as folder:
        rounds = [
            Round(folder, 1, [2, 3], keep=1, coin=coin),
            Round(folder, 2, [3], keep=1, coin=coin),
            Round(folder, 3, last, keep=9, coin=coin),
        ]
        for who, calls in turns:
            for _ in range(calls):
                if not rounds[who].ended:
                    advance(folder, rounds[who], rounds[-1])
        victim = coin.choice(rounds)
        if killed and not victim.ended:
            victim.step(kill=True)
        finish(folder, rounds)


def until_it_changes_something(folder: Path, actor: Round, last: Round, *, times: int) -> None:
    """Let ``actor`` run until it is about to change or list the folder for the ``times``-th time."""
    while not actor.ended:
        times -= actor.next in {"mkdir", "rename", "unlink", "rmdir", "listdir"}
        if times <= 0:
            break
        advance(folder, actor, last)


@pytest.mark.parametrize("first", [0, 1], ids=["an old worker", "a new round"])
def test_rounds_that_fall_asleep_at_two_points_do_no_harm_when_they_wake_up(first):
    """One round sleeps at any point, the other works up to any point and sleeps, then
    the first continues to its end.
    """
    with stepwise():
        for one in range(1, 100):
            for other in range(1, 100):
                with folder_with(1, 2) as folder:
                    rounds = [
                        Round(folder, 1, [2], keep=1, coin=random.Random(0)),
                        Round(folder, 2, [4], keep=9, coin=random.Random(0)),
                    ]
                    sleeper, awake = rounds[first], rounds[1 - first]
                    until_it_changes_something(folder, sleeper, rounds[1], times=one)
                    slept = not sleeper.ended
                    until_it_changes_something(folder, awake, rounds[1], times=other)
                    stopped = not awake.ended
                    while not sleeper.ended:
                        advance(folder, sleeper, rounds[1])
                    finish(folder, rounds)
                if not stopped:
                    break
            if not slept:
                return


@pytest.mark.parametrize("again", [Owner("job", 0, 2), Owner("job", 1, 1), Owner("another", 0, 1)], ids=str)
def test_wherever_a_worker_dies_the_old_or_the_new_checkpoint_exists_and_the_next_worker_cleans_up(again):
    newest = set()
    with stepwise():
        for calls in range(1, 1000):
            with folder_with(1, 2) as folder:
                victim = Round(folder, 1, [2, 3], keep=1, coin=random.Random(0))
                for _ in range(calls):
                    if not victim.ended:
                        victim.step()
                if victim.ended:
                    break
                victim.step(kill=True)
                assert victim.ended
                found = contents(folder)
                newest.add(found[max(found)])
                after = Round(folder, again, [2, 3], keep=1, coin=random.Random(0))
                while not after.ended:
                    after.step()
                assert after.problem is None
                assert list(contents(folder).values()) == [f"{after.round}: 3"]
                assert [name for name in os.listdir(folder) if not name.startswith((".fence.", "step-"))] == []
    assert newest == {"0: 2", "1: 2", "1: 3"}


# --- several jobs and runs ------------------------------------------------------------------------------------------

OWNERS = (Owner("job", 0, 5), Owner("job", 1, 2), Owner("a", 0, 7), Owner("z", 0, 9))


@given(
    turns=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), max_size=10),
    seed=st.integers(0, 2**16),
    killed=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_only_the_last_round_to_list_the_folder_changes_it_whatever_the_jobs(turns, seed, killed):
    coin = random.Random(seed)
    with stepwise(), folder_with(1, 2) as folder:
        actors = [Round(folder, owner, [2, 3], keep=1, coin=coin) for owner in OWNERS]
        holder: Round | None = None

        def go(actor: Round) -> None:
            nonlocal holder
            before, listed = contents(folder), actor.listed
            actor.step()
            after = contents(folder)
            assert after
            assert after == before or holder in {None, actor}
            if listed is None and actor.listed is not None and (folder / f".fence.{actor.owner}").exists():
                assert actor.listed == sorted(before, reverse=True)
                holder = actor

        for who, calls in turns:
            for _ in range(calls):
                if not actors[who].ended:
                    go(actors[who])
        victim = coin.choice(actors)
        if killed and not victim.ended:
            victim.step(kill=True)
        for actor in coin.sample(actors, len(actors)):
            while not actor.ended:
                go(actor)
            assert actor.problem is None or isinstance(actor.problem, Killed | FencedOut | FileNotFoundError)
        before = contents(folder)
        after = Round(folder, Owner("m", 0, 1), [], keep=9, coin=coin)
        while not after.ended:
            after.step()
        assert after.problem is None
        assert sorted(os.listdir(folder)) == [".fence.m.0.1", *sorted(before)]


def test_of_two_jobs_that_open_the_folder_at_once_one_owns_it():
    with stepwise():
        for calls in range(1, 100):
            for others in range(1, 100):
                with folder_with(1) as folder:
                    one, other = (Round(folder, Owner(job, 0, 1), [], keep=9, coin=random.Random(0)) for job in "ab")
                    for actor, count in ((one, calls), (other, others)):
                        for _ in range(count):
                            if not actor.ended:
                                actor.step()
                    stopped = not other.ended, not one.ended
                    for actor in (one, other):
                        while not actor.ended:
                            actor.step()
                    assert one.problem is None or other.problem is None
                    assert len(list(folder.glob(".fence.*"))) == 1
                if not stopped[0]:
                    break
            if not stopped[1]:
                return


def test_a_later_run_is_not_blocked_by_the_number_of_its_round(tmp_path):
    """Run 0 reached round 5 while its record could not be written, so run 1 counts from 2."""
    Files(tmp_path, Owner("job", 0, 5), 3).open()
    Files(tmp_path, Owner("job", 1, 2), 3).open()
    with pytest.raises(FencedOut, match="opened by round 2 of run 2 of this job; this is round 6 of run 1"):
        Files(tmp_path, Owner("job", 0, 6), 3).open()
    assert os.listdir(tmp_path) == [".fence.job.1.2"]
