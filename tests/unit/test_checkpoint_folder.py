"""The protocol of the folder of checkpoints, under every order of its steps."""

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

from elastic_hpc.training.checkpoint_folder import FencedOut, Files

DEADLINE_S = 60.0


class Killed(BaseException):
    """The process is dead: none of its calls is made any more."""


class Round(threading.Thread):
    """A worker whose every call to the file system is a step: opens the folder, lists it, saves ``steps``."""

    def __init__(self, folder: Path, round: int, steps: Sequence[int], *, keep: int, coin: random.Random) -> None:
        super().__init__(name=f"round {round}", daemon=True)
        self.round, self.listed, self.committed = round, None, []
        self.problem: BaseException | None = None
        self.next = ""
        """The call that this thread makes next."""
        self._files, self._steps, self._coin = Files(folder, "job", round, keep), steps, coin
        self._folder = folder
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = self._killed = False
        self.start()
        self._waits.acquire()

    def step(self, *, kill: bool = False) -> None:
        """Make the next call, or never another one."""
        self._killed = kill
        self.next = ""
        self._go.release()
        assert self._waits.acquire(timeout=DEADLINE_S)
        if self.ended:
            self.join()

    def pause(self, call: str = "") -> None:
        """Called by this thread before every call."""
        self.next = call
        if not self._killed:
            self._waits.release()
            self._go.acquire()
        if self._killed:
            raise Killed

    def listdir(self, listdir: Callable[..., list[str]], folder: Any) -> list[str]:
        """As readdir may do it: what comes or goes in the meantime is seen or not."""
        before = set(listdir(folder))
        self.pause()
        after = set(listdir(folder))
        return [name for name in sorted(before | after) if name in before & after or self._coin.random() < 0.5]

    def run(self) -> None:
        try:
            self.pause()
            self._files.open()
            self.listed = self._files.complete()
            for step in self._steps:
                name = self._files.begin(step)
                for file in "ab":
                    os.makedirs(self._folder / name, exist_ok=True)  # as torch.distributed.checkpoint does
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
    """The calls of ``Round`` wait for their turn; of others they are made at once. Nothing is synced."""

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
    """What is in each checkpoint, which must be complete."""
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
    """Let ``actor`` make its next call, and see that all holds that is promised; ``last`` is the highest round."""
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
    """Run ``rounds`` to their end, the last first; then all must be as the next round expects it."""
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
    assert sorted(os.listdir(folder)) == [f".fence.job.r{after.round}", *sorted(before)]
    assert contents(folder) == before


@given(
    turns=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), max_size=14),
    last=st.sampled_from([[3, 4], [5], []]),
    seed=st.integers(0, 2**16),
    killed=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_once_a_round_has_listed_the_folder_nothing_comes_or_goes_but_by_itself(turns, last, seed, killed):
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
def test_whoever_falls_asleep_twice_does_no_harm_on_waking_up(first):
    """One sleeps from anywhere, the other works up to anywhere and sleeps, the first goes on to its end."""
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


@pytest.mark.parametrize("fenced", [True, False])
def test_wherever_a_worker_dies_the_old_or_the_new_checkpoint_is_there_and_the_next_cleans_up(fenced):
    newest = set()
    with stepwise():
        for calls in range(1, 1000):
            with folder_with(1, 2) as folder:
                victim = Round(folder, 1, [2, 3], keep=1, coin=random.Random(0))
                victim._files._fenced = fenced
                for _ in range(calls):
                    if not victim.ended:
                        victim.step()
                if victim.ended:
                    break
                victim.step(kill=True)
                assert victim.ended
                found = contents(folder)
                newest.add(found[max(found)])
                again = Round(folder, 2 if fenced else 1, [2, 3], keep=1, coin=random.Random(0))
                again._files._fenced = fenced
                while not again.ended:
                    again.step()
                assert again.problem is None
                assert list(contents(folder).values()) == [f"{again.round}: 3"]
                assert [name for name in os.listdir(folder) if not name.startswith((".fence.", "step-"))] == []
    assert newest == {"0: 2", "1: 2", "1: 3"}
