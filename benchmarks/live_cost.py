"""The overhead of ``live`` per step while nothing happens, in a training with short steps.

.venv-2.14/bin/elastic-srun --local 2 --nproc-per-node=1 benchmarks/live_cost.py

The same steps run alternately in a plain loop, which is one attempt of ``live``, and each in an attempt of its own. So
both have the same processes, process group and model, and other load of the machine affects both.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from elastic_hpc.training import live

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--step", type=float, default=0.02, metavar="SECONDS", help="of a step (default: %(default)s)")
parser.add_argument("--steps", type=int, default=50, metavar="N", help="in turn (default: %(default)s)")
parser.add_argument("--rounds", type=int, default=15, metavar="N", help="default: %(default)s")
parser.add_argument("--compute", action="store_true", help="compute for as long as a step takes, instead of sleeping")
parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
args = parser.parse_args()

net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 1))
optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
inputs, matrix = torch.ones(4, 64), torch.ones(256, 256)
torch.set_num_threads(1)
run = live(net, optimizer)


def train() -> None:
    """One step. The ranks synchronize at the end of the backward pass."""
    ends = time.perf_counter() + args.step
    optimizer.zero_grad()
    loss = run.model(inputs).square().mean()
    if args.compute:
        while time.perf_counter() < ends:
            torch.mm(matrix, matrix)
    else:
        time.sleep(max(0.0, ends - time.perf_counter()))  # as if waiting for a GPU: caches get cold
    loss.backward()
    optimizer.step()


CLOCKS = time.perf_counter, time.thread_time  # CPU time does not count other load of the machine
costs: list[list[float]] = []
began = ended = plain = [0.0, 0.0]


def now() -> list[float]:
    return [clock() for clock in CLOCKS]


for attempt in run.steps(until=(args.rounds + 1) * (args.steps + 1)):
    with attempt as step:
        if step % (args.steps + 1):
            train()
            ended = now()
            continue
        if step:
            costs.append([(ended[i] - began[i] - plain[i]) / args.steps for i in range(2)])
        before = now()
        for _ in range(args.steps):
            train()
        began = now()
        plain = [began[i] - before[i] for i in range(2)]

if run.world.rank == 0 and not run.stopped:
    measured, processor = zip(*costs[1:], strict=True)  # in the first round much runs for the first time
    cost, cpu = statistics.median(measured), statistics.median(processor)
    if args.json:
        found = {"step": args.step, "cost": cost, "min": min(measured), "max": max(measured), "cpu": cpu}
        args.json.write_text(json.dumps(found | {"rounds": len(measured), "torch": torch.__version__}) + "\n")
    print(
        f"{1e6 * cost:.0f} us a step ({1e6 * min(measured):.0f} to {1e6 * max(measured):.0f}, {len(measured)} rounds), "
        f"{cost / args.step:.2%} of {1e3 * args.step:g} ms; processor time of the main thread {1e6 * cpu:.0f} us, "
        f"{cpu / args.step:.2%}; {run.world.size} workers, torch {torch.__version__}"
    )
    sys.exit(cost > 0.01 * args.step)
