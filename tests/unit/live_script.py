"""A training in place for the tests: writes a line for each step, with the loss and the weights."""

import os
import signal
import threading
import time

import torch
from live_faults import fault, options, write
from torch import nn

from elastic_hpc.training import live

torch.set_num_threads(1)


class Done:
    """The number of steps that have changed the weights, as part of the state, which moves with the weights."""

    def __init__(self):
        self.steps = []

    def state_dict(self):
        return {"steps": list(self.steps)}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def hit_soon(name):
    """Send this signal to this process when it has begun to send or receive a large tensor."""
    write(fault=name)
    threading.Timer(0.05, os.kill, (os.getpid(), getattr(signal, name))).start()


def freeze_at(large):
    """Stop this process when the first numbers that ``large`` receives have arrived, long before the last."""
    write(fault="SIGSTOP")
    while not large[0]:
        time.sleep(0)
    os.kill(os.getpid(), signal.SIGSTOP)


class Ballast(Done):
    """Makes the state large, and sends a signal to one rank of a round while the state is sent."""

    def __init__(self):
        super().__init__()
        self.steps = torch.zeros(options.get("ballast", 0))
        if "in_share" in options:
            reduce, (*where, name) = torch.distributed.all_reduce, options["in_share"]

            def all_reduce(tensor, *args, **kwargs):
                here = [int(os.environ[name]) for name in ("ELASTIC_HPC_ROUND", "RANK")]
                if tensor.numel() > options["ballast"] and here == where:
                    hit_soon(name)
                return reduce(tensor, *args, **kwargs)

            torch.distributed.all_reduce = all_reduce

    def state_dict(self):
        return {"steps": self.steps}


torch.manual_seed(0)
done = Done()
net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(options.get("dropout", 0.0)), nn.Linear(16, 1))
if "compile" in options:
    net.compile(backend=options["compile"])
optimizers = [torch.optim.Adam(net[0].parameters(), lr=1e-2), torch.optim.Adam(net[3].parameters(), lr=1e-2)]
scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], 10, gamma=0.9)
run = live(net, *optimizers, scheduler=scheduler, done=done, ballast=Ballast(), **options.get("live", {}))
write(world=run.world, began=run.step)


def attempts():
    for until in options.get("loops", [options["until"]]):
        yield from run.steps(until=until)


for attempt in attempts():
    with attempt as step:
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(12, 8, generator=generator)
        mine = batch[run.world.rank :: run.world.size]
        write(at=step, drawn=torch.rand(1).item())
        if step == options.get("break"):
            break
        fault("forward", step, run.world.rank)
        loss = ((run.model(mine) - mine.sum(1, keepdim=True)) ** 2).sum() * run.world.size / len(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        fault("backward", step, run.world.rank)
        if step == options.get("halfway"):
            # gloo drops a message in transit when a connection ends
            if run.world.rank == 0:
                torch.distributed.send(torch.ones(1 << 26), 1)
            else:
                large = torch.zeros(1 << 26)
                threading.Thread(target=freeze_at, args=[large], daemon=True).start()
                torch.distributed.recv(large, 0)
        loss.backward()
        fault("between", step, run.world.rank)
        optimizers[0].step()
        fault("torn", step, run.world.rank)
        if options.get("torn") == "all":
            torch.distributed.barrier()
        elif options.get("torn") == "one" and run.world.size == 3 and run.world.rank > 0:
            exchange = [torch.distributed.recv, torch.distributed.send][run.world.rank - 1]
            exchange(torch.zeros(1), 3 - run.world.rank)
        optimizers[1].step()
        scheduler.step()
        done.steps.append(step)
        fault("logging", step, run.world.rank)
        mean = loss.detach() / run.world.size
        if run.world.size > 1 and options.get("log", True):
            numbers = mean.repeat(100)  # with fewer numbers than ranks, gloo may hang when a rank is lost
            torch.distributed.all_reduce(numbers)
            mean = numbers[0]
        write(step=step, loss=mean.item(), world=run.world, lr=scheduler.get_last_lr()[0])
        time.sleep(options.get("pause", 0))
write(end=run.step, stopped=run.stopped, done=done.steps, weights=[p.sum().item() for p in net.parameters()])
