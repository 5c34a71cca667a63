"""A process group whose members change while the process lives. Only this module uses torch's private names for that.

torch 2.14 can reconfigure a group if it was made with ``enable_reconfigure``. The members exchange their handles
through the store of the round, which the job's leader hosts. The group itself keeps one store for its whole life, so
that store passes all calls on to the store of the current round.

gloo (also in torch 2.14) does not fail a message that is half sent or half received when its connection ends: the
collective then hangs until the timeout of the group, and nothing frees it. All-reduces of more numbers than ranks hung
in 0 of 73 trials, all-reduces of one number in 1 of 50, broadcasts of 40 MB in 6 of 12. So ``live`` broadcasts only a
few bytes, when it saves. ``hangs`` is for the collectives of other code: DistributedDataParallel broadcasts in the
second step of a world.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from elastic_hpc.training.checkpoint import use_default_group

_SLICE = 0.2
_PATIENCE = 10.0
"""Seconds within which the members of a new world must connect to each other, once all are there."""
_CONNECT = timedelta(seconds=_PATIENCE / 5)
"""Limit for one attempt at a connection. gloo makes five attempts if the member does not answer, uninterruptibly."""
_PAUSE, _PAUSE_AT_MOST = 0.001, 0.05
"""Seconds between two queries of the store, for each rank of the world, and at most: all ranks query one host."""
_WAITING = "distributed", "autograd", "nn/parallel"
"""The parts of torch in which a thread waits for other members."""
_GROUPS = 1 << 16
"""The most groups that a script can make in a world. torch counts the groups to name them alike on all ranks."""
_NUMBERS = 4096
"""The least number of member numbers; torch makes lists of this length."""


class LiveWorld(NamedTuple):
    """The ranks that train together now."""

    rank: int
    size: int
    local_rank: int
    round: int
    """The number of the round; 0 without an agent."""
    restarts: int
    """How often the workers of the job were restarted because of a failure."""

    @classmethod
    def now(cls) -> LiveWorld:
        """The world that the environment describes."""
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "ELASTIC_HPC_ROUND": 0, "TORCHELASTIC_RESTART_COUNT": 0}
        return cls(*(int(os.environ.get(name) or default) for name, default in names.items()))


class Interrupted(Exception):
    """The world has ended before the group raised an error, or without an error."""


def obstacle(*, cuda: bool) -> str:
    """Why this torch cannot reform a group; empty if it can."""
    if not hasattr(dist, "_reconfigure"):
        return f"torch {torch.__version__} cannot reconfigure a process group: needs 2.14"
    if cuda and "NCCL2" not in dist.Backend._plugins:
        return "torch was built without the backend nccl2"
    return ""


def is_of_the_group(error: BaseException | None) -> bool:
    """Whether ``error``, or a cause of it, says that a member of the group is gone."""
    for _ in range(20):
        if error is None:
            return False
        if isinstance(error, (Interrupted, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
            return True
        if type(error) is RuntimeError and "gloo/" in str(error):
            return True
        error = error.__cause__  # not __context__: an error in the next world has the end of this world there
    return False


class SwitchStore(dist.Store):
    """Passes calls on to ``inner``, the store of the current round. While waiting, calls ``check``, which may raise."""

    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self._check = check
        self.inner: Any = None
        self.forming = False
        """Whether a world is being formed: late members cost the other members of the world a new attempt."""
        self._pause = _PAUSE

    def enter(self, inner: Any, size: int) -> None:
        """From now on pass calls on to ``inner``, the store of a round with ``size`` ranks."""
        self.inner, self._pause = inner, min(size * _PAUSE, _PAUSE_AT_MOST)

    def set(self, key: str, value: Any) -> None:
        self.inner.set(key, value)

    def compare_set(self, key: str, expected: Any, desired: Any) -> Any:
        return self.inner.compare_set(key, expected, desired)

    def get(self, key: str) -> Any:
        self.wait([key])
        return self.inner.get(key)

    def multi_get(self, keys: list[str]) -> Any:
        self.wait(keys)
        return self.inner.multi_get(keys)

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        self.inner.multi_set(keys, values)

    def add(self, key: str, value: int) -> Any:
        return self.inner.add(key, value)

    def check(self, keys: list[str]) -> Any:
        return self.inner.check(keys)

    def delete_key(self, key: str) -> Any:
        return self.inner.delete_key(key)

    def num_keys(self) -> Any:
        return self.inner.num_keys()

    def has_extended_api(self) -> bool:
        return True

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Waits forever without a ``timeout``. While a world is being formed, ``_PATIENCE`` replaces a ``timeout``."""
        if self.inner.check(keys):
            return
        seconds = _PATIENCE if self.forming else timeout.total_seconds() if timeout else 0.0
        end, pause = time.monotonic() + seconds, _PAUSE
        for key in keys:
            while not self.inner.check([key]):  # the store's own wait cannot be interrupted, and logs that it ended
                self._check()
                if timeout is not None and time.monotonic() > end:
                    raise dist.DistStoreError(f"no {key} within {seconds:g} s")
                time.sleep(pause)
                pause = min(2 * pause, self._pause)


class Group:
    """The default process group of this process. ``is_over`` returns whether the current world has ended."""

    def __init__(self, is_over: Callable[[], bool], *, cuda: bool) -> None:
        self._backend = "cpu:gloo,cuda:nccl2" if cuda else "gloo"
        self._cuda, self._is_over = cuda, is_over
        self._switch = SwitchStore(self._check)
        self._own: set[int] = set()
        self._others: set[int] = set()
        """TCP ports on which members accept connections: ``_own`` of this member, ``_others`` of the other members."""
        self._store_port = 0

    def form(self, world: LiveWorld, says: Sequence[Any]) -> list[Any]:
        """Form ``world`` with all its ranks. Returns what each rank ``says``. Raises Interrupted, and errors for which
        ``is_of_the_group`` is True.
        """
        self._switch.forming = True
        store = dist.PrefixStore(f"live/{world.round}", self._open_store(world))
        self._switch.enter(store, world.size)
        ranks = range(world.size)
        self._switch.set(f"member/{world.rank}", json.dumps({**self._card(), "says": says}))
        cards = self._read("member", ranks)
        said = [cards[rank]["says"] for rank in ranks]
        new = [rank for rank in ranks if "number" not in cards[rank]]
        if world.rank in new:
            taken = {card["number"] for rank, card in cards.items() if rank not in new}
            numbers = (number for number in itertools.count() if number not in taken)
            self._make(dict(zip(new, numbers, strict=False))[world.rank], world.size)
            self._switch.set(f"newcomer/{world.rank}", json.dumps(self._card()))
        cards.update(self._read("newcomer", new))
        self._others = {port for card in cards.values() for port in card["ports"]}
        handles = [cards[rank]["handle"] for rank in ranks]
        try:
            dist._reconfigure(uuid=world.round, handles=handles, timeout=_CONNECT).wait()
        except RuntimeError as error:
            raise Interrupted(f"cannot connect the world of round {world.round}: {error}") from error
        c10d._world.pg_group_ranks[dist.group.WORLD] = {rank: rank for rank in ranks}
        c10d._world.group_count = world.round * _GROUPS
        self._switch.forming = False
        return said

    def shut(self, how: int, *, store: bool = False) -> bool:
        """Shut the connections to the other members and, with ``store``, to the store of the round, whose host may be
        frozen. Returns whether there was a connection. Any thread may call this at any time.

        ``how``: ``SHUT_WR`` makes the others notice, once this process is in no collective: it still receives what they
        send, because gloo drops messages that it can no longer send. ``SHUT_RD`` ends the collectives of this process.
        """
        found = False
        others = self._others | ({self._store_port} if store else set())
        for connection in _tcp_sockets():
            with contextlib.suppress(OSError):
                peer = connection.getpeername()[1]  # raises for the listener
                if peer in others or connection.getsockname()[1] in self._own:
                    connection.shutdown(how)
                    found = True
        if self._cuda and dist.is_initialized():
            dist.group.WORLD.abort()
        return found

    def _check(self) -> None:
        if self._is_over():
            raise Interrupted("the world is over")

    def _open_store(self, world: LiveWorld) -> Any:
        """Connect to the store of the round, in a thread that may be left behind: a frozen host would block the caller
        forever.
        """
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        opened: queue.SimpleQueue[Any] = queue.SimpleQueue()
        patience = timedelta(seconds=_PATIENCE)  # a busy host needs seconds to answer

        def connect() -> None:
            try:
                opened.put(dist.TCPStore(host, port, is_master=False, timeout=patience, wait_for_workers=False))
            except Exception as error:  # noqa: BLE001 - raised by the caller
                opened.put(error)

        threading.Thread(target=connect, name=f"store of round {world.round}", daemon=True).start()
        self._store_port = port
        while True:
            self._check()
            with contextlib.suppress(queue.Empty):
                store = opened.get(timeout=_SLICE)
                if isinstance(store, Exception):
                    raise Interrupted(f"no connection with the store of round {world.round}: {store}") from store
                return store

    def _card(self) -> dict[str, Any]:
        """What the other members must know of this member; nothing while it has no number."""
        if not self._own:
            return {}
        handle = dist._get_reconfigure_handle()
        return {"number": self._number, "handle": handle, "ports": sorted(self._own)}

    def _read(self, name: str, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        keys = [f"{name}/{rank}" for rank in ranks]
        return dict(zip(ranks, map(json.loads, self._switch.multi_get(keys) if keys else []), strict=True))

    def _make(self, number: int, size: int) -> None:
        before = _listening()
        dist.init_process_group(
            self._backend,
            store=self._switch,
            rank=number,
            world_size=max(_NUMBERS, 2 * size),
            enable_reconfigure=True,
        )
        self._number, self._own = number, _listening() - before
        use_default_group()


def hangs() -> bool:
    """Whether the main thread waits in torch's collectives or backward pass, and no other thread works for it. Call
    this in another thread.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None or not any(f"/torch/{part}/" in frame.f_code.co_filename for part in _WAITING):
        return False
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/stat", "rb") as file:
            if int(task) != threading.get_native_id() and file.read().rpartition(b")")[2].split()[0] != b"S":
                return False
    return True


def forget(model: Any) -> None:
    """Remove the hooks of each DistributedDataParallel in ``model`` from backward passes: another will replace it."""
    for module in model.modules() if isinstance(model, torch.nn.Module) else ():
        if hasattr(module, "_remove_autograd_hooks"):
            module._remove_autograd_hooks()


def _listening() -> set[int]:
    """The ports on which this process accepts TCP connections."""
    found = set()
    for listener in _tcp_sockets():
        with contextlib.suppress(OSError):
            if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.add(listener.getsockname()[1])
    return found


def _tcp_sockets() -> Iterator[socket.socket]:
    """Yields the TCP sockets of this process. Each is open until the caller takes the next."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                if found.family in {socket.AF_INET, socket.AF_INET6} and found.type == socket.SOCK_STREAM:
                    yield found
