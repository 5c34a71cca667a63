"""Jobs without workers for scale.py: the real membership and leader over real, authenticated TCP connections."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from _report import BenchmarkError

from elastic_hpc.agent.arguments import policy_of
from elastic_hpc.errors import JobEnded
from elastic_hpc.membership import follower, messages
from elastic_hpc.membership.leader import Leader
from elastic_hpc.membership.messages import Order, Status
from elastic_hpc.membership.promises import Promises
from elastic_hpc.membership.roster import Host
from elastic_hpc.network import addresses, channel
from elastic_hpc.network.identity import Identity
from elastic_hpc.network.server import LeaderServer
from elastic_hpc.network.session import Membership
from elastic_hpc.options.spec import LaunchSpec
from elastic_hpc.options.values import NodeRange, RdzvConf
from elastic_hpc.record.endpoint import Published

STARTS_WITHIN = 10.0
"""Seconds within which 1,024 agents start; fewer agents start at the same rate, in less time."""

IDLE = 5.0
"""Seconds of measurement in which the leader exchanges nothing but heartbeats."""

HEARTBEAT_TIMEOUT = 5.0
"""elastic-sbatch's default; the heartbeats come five times as often."""

SECRET = b"benchmark"


class Meter:
    """What one process has sent and received on its control connections, handshakes included."""

    def __init__(self) -> None:
        self.messages = self.bytes = 0
        encode, read = messages.encode, channel.Channel.read

        def counting_encode(message: messages.Message) -> bytes:
            line = encode(message)
            self._count(line)
            return line

        async def counting_read(link: channel.Channel) -> bytes:
            line = await read(link)
            self._count(line)
            return line

        messages.encode = counting_encode
        channel.Channel.read = counting_read  # type: ignore[method-assign]

    def _count(self, line: bytes) -> None:
        self.messages += 1
        self.bytes += len(line)

    def look(self) -> dict[str, float]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "messages": self.messages,
            "bytes": self.bytes,
            "cpu": used.ru_utime + used.ru_stime,
            "rss_mib": _rss_mib(),
            "at": time.monotonic(),
        }


def _rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Record:
    """The leader's record; only the address is written."""

    warning, stalls = "", False

    def __init__(self, endpoint: Path, host: Host) -> None:
        self._endpoint, self._host = endpoint, host

    def publish(self, _agents: object) -> None:
        new = self._endpoint.with_suffix(f".{self._host.node}")
        new.write_text(json.dumps({"node": self._host.node, "port": self._host.port}))
        new.replace(self._endpoint)

    def beat(self) -> None: ...

    def event(self, name: str, fields: dict[str, Any]) -> None: ...

    def state(self, **state: Any) -> None: ...

    def verdict(self, _verdict: dict[str, Any]) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _host(node: int, port: int) -> Host:
    return Host(node, f"node{node:04}", ("127.0.0.1",), port, "torch 2.13.0, Python 3.11")


class Agent:
    """One node without workers: they start and stop at once."""

    def __init__(self, node: int, size: int, endpoint: Path, started: Callable[[int, int], None]) -> None:
        self.node, self._size, self._endpoint, self._started = node, size, endpoint, started
        self._listener = addresses.listen_from(0)
        self.host = _host(node, self._listener.getsockname()[1])
        self._status = Status(0, self.host, 8)
        self._order: Order | None = None
        self._link: channel.Channel | None = None
        self._workers = 0

        async def secret() -> bytes:
            return SECRET

        identity = Identity("benchmark", 0, node, self.host.name, str(node))
        self._network = channel.Network([self._listener], identity, secret, HEARTBEAT_TIMEOUT / 5)
        self.membership = Membership(
            self.host,
            self,
            self._network,
            Promises(),
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            join_timeout=600.0,
            first=node == 0,
        )

    def start(self) -> None:
        self._running = asyncio.ensure_future(self.membership.run())

    def kill(self) -> None:
        """End this agent and its connection, without a word to the others."""
        self._running.cancel()
        asyncio.get_running_loop().remove_reader(self._listener)  # or it gets the next socket's events
        self._listener.close()
        if self._link:
            self._link.close()

    # what Membership needs of its node

    def status(self) -> Status:
        return self._status

    def set_order(self, order: Order | None, link: Any) -> None:
        self._order, self._link = order, link
        while True:
            match follower.step(self._order, self._status, self._workers):
                case follower.Stop():
                    self._workers = 0
                case follower.Acknowledge(round):
                    self._report(state="idle", round=round)
                case follower.Start(round, _):
                    self._workers = round
                    self._report(state="running", round=round)
                    self._started(self.node, round)
                case _:
                    return

    def _report(self, **changes: Any) -> None:
        self._status = replace(self._status, **changes)
        self.membership.send_status()

    def ended(self, over: JobEnded) -> None:
        raise BenchmarkError(f"an agent gave up: {over}")

    async def published(self) -> Published | None:
        try:
            found = json.loads(self._endpoint.read_text())
        except FileNotFoundError:
            return None
        return Published(0, _host(found["node"], found["port"]))

    async def give_up(self, *_: object, **__: object) -> JobEnded | None:
        return None

    def lead(self, promises: Promises, reason: str) -> LeaderServer:
        conf = RdzvConf(last_call_timeout=timedelta(seconds=600))
        spec = LaunchSpec("no script", nodes=NodeRange(1, self._size), max_restarts=1000, rdzv_conf=conf)
        policy = policy_of(spec, 8, can_requeue=False)
        granted = 0 if promises.roster else self._size
        now = time.monotonic()
        leader = Leader(
            policy, node=self.node, nproc=8, now=now, granted=granted, promises=promises, reason=reason, host=self.host
        )

        async def open_store(round: int) -> int:
            return 1 + round

        async def act(*_: Any, **__: Any) -> None: ...

        return LeaderServer(leader, Record(self._endpoint, self.host), open_store, act)


@dataclass(frozen=True)
class Child:
    """A process with some of the agents."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection

    def ask(self, *what: Any, within: float = 30.0) -> Any:
        """Send ``what`` and return the answer. Raises BenchmarkError if none comes within ``within`` seconds."""
        self.pipe.send(what)
        if not self.pipe.poll(within):
            raise BenchmarkError(f"{what[0]}: no answer within {within:g} s")
        return self.pipe.recv()


def serve(pipe: Connection, nodes: range, size: int, endpoint: Path, spread: float) -> None:
    """The agents of ``nodes``, in a process of their own. They start within ``spread`` seconds of ``start``."""
    allow_files()
    channel.MOST_STRANGERS_OF_ONE_ADDRESS = size  # here all agents have the same address
    logging.getLogger("elastic_hpc").setLevel(logging.ERROR)  # each agent would log that it waits for the head
    meter = Meter()
    rounds: dict[int, dict[int, float]] = {}

    def started(node: int, round: int) -> None:
        rounds.setdefault(round, {})[node] = time.monotonic()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, what: print(what.get("message"), what.get("exception"), file=sys.stderr))
        agents = {node: Agent(node, size, endpoint, started) for node in nodes}
        arrivals: list[float] = []
        waits: list[tuple[int, float]] = []

        def arrive(agent: Agent) -> None:
            arrivals.append(time.monotonic())
            agent.start()

        def newest(members: int) -> tuple[int, float, float] | None:
            """The newest round that ``members`` agents have begun: its number, the first and the last moment."""
            if not (whole := [round for round, at in rounds.items() if len(at) >= members]):
                return None
            moments = rounds[max(whole)].values()
            return max(whole), min(moments), max(moments)

        def obey() -> None:
            match pipe.recv():
                case ("start",):
                    for agent in agents.values():
                        loop.call_later(random.uniform(0, spread) if spread else 0, arrive, agent)  # noqa: S311
                    pipe.send(None)
                case ("look",):
                    pipe.send({**meter.look(), "arrivals": (min(arrivals), max(arrivals)) if arrivals else None})
                case ("lose", node):
                    pipe.send(time.monotonic())
                    agents.pop(node).kill()
                case ("begun", round, members):
                    waits.append((round, members))

        async def answer_waits() -> None:
            while True:
                for wait in list(waits):
                    found = newest(int(wait[1]))
                    if found and found[0] >= wait[0]:
                        waits.remove(wait)
                        pipe.send(found)
                await asyncio.sleep(0.01)

        loop.add_reader(pipe.fileno(), obey)
        answering = asyncio.ensure_future(answer_waits())
        pipe.send(len(agents))
        await answering

    asyncio.run(main())


def allow_files() -> None:
    """Allow as many open files as this user may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def start_child(nodes: range, size: int, endpoint: Path, spread: float) -> Child:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, nodes, size, endpoint, spread), daemon=True)
    process.start()
    if not ours.poll(60):
        raise BenchmarkError("the agents do not start")
    ours.recv()
    return Child(process, ours)


def rounds_of(size: int, bound: float) -> dict[str, Any]:
    """All measurements with ``size`` agents."""
    spread = STARTS_WITHIN * min(1.0, size / 1024)
    with tempfile.TemporaryDirectory() as folder:
        endpoint = Path(folder, "endpoint.json")
        head, next_head = (start_child(range(node, node + 1), size, endpoint, 0.0) for node in range(2))
        others = start_child(range(2, size), size, endpoint, spread)

        def begun(round: int, members: int, within: float) -> float:
            """When the next head and ``members`` of the others had all begun ``round`` or a later round."""
            return max(
                float(child.ask("begun", round, count, within=within)[2])
                for child, count in ((others, members), (next_head, 1))
            )

        try:
            led_at = time.monotonic()
            for child in (head, next_head, others):
                child.ask("start")
            last = begun(1, size - 2, spread + bound)
            first_arrival, last_arrival = others.ask("look")["arrivals"]
            formed = head.ask("look")
            time.sleep(1.5)  # until no more messages about the start of the round are sent
            result: dict[str, Any] = {
                "what": "rounds",
                "agents": size,
                "form_s": last - max(last_arrival, led_at),
                "form_from_first_s": last - min(first_arrival, led_at),
                "form_messages": formed["messages"],
                "form_bytes": formed["bytes"],
                "form_cpu_s": formed["cpu"],
            }
            before, others_before = head.ask("look"), others.ask("look")
            time.sleep(IDLE)
            after, others_after = head.ask("look"), others.ask("look")
            passed = after["at"] - before["at"]
            result |= {
                "idle_cpu_share": (after["cpu"] - before["cpu"]) / passed,
                "agents_idle_cpu_share": (others_after["cpu"] - others_before["cpu"]) / passed,
                "idle_messages_per_s": (after["messages"] - before["messages"]) / passed,
                "leader_rss_mib": after["rss_mib"],
            }
            before = after
            load = os.getloadavg()[0]
            lost_at = others.ask("lose", size // 2)
            last = begun(2, size - 3, bound)
            after = head.ask("look")
            result |= {
                "reform_s": last - lost_at,
                "load_average": load,
                "reform_messages": after["messages"] - before["messages"],
                "reform_bytes": after["bytes"] - before["bytes"],
                "reform_cpu_s": after["cpu"] - before["cpu"],
            }
            others_now = others.ask("look")
            result |= {
                "agents_rss_mib": others_now["rss_mib"],
                "agents_reform_cpu_s": others_now["cpu"] - others_after["cpu"],
            }
            time.sleep(1.5)
            killed_at = time.monotonic()
            head.process.kill()
            try:
                last = begun(3, size - 3, bound)
            except BenchmarkError:
                return {**result, "take_over_s": None, "bound_s": bound}
            return {**result, "take_over_s": last - killed_at}
        finally:
            for child in (head, next_head, others):
                child.process.kill()
                child.process.join()
