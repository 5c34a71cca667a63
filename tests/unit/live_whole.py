"""A training in place with the features of real scripts: gradient accumulation, scaling and clipping, batch norm, a
process group of its own, a schedule, a moving average and all kinds of random numbers. It writes its final state.
"""

import os
import random
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from live_faults import fault, options, write
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from elastic_hpc.training import live

torch.set_num_threads(1)
torch.manual_seed(0)
inputs = torch.randn(96, 8, generator=torch.Generator().manual_seed(1))
targets = inputs.sum(1, keepdim=True)
net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=options["until"])
average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
torch.set_default_device("meta")  # live's own GradScaler without a device would not work
run = live(net, optimizer, schedule=schedule, average=average, scaler=scaler)
torch.set_default_device("cpu")
group = of_round = None
for attempt in run.steps(until=options["until"]):
    with attempt as step:
        rank = run.world.rank
        if of_round != run.world.round:
            group, of_round = dist.new_group(list(range(run.world.size))), run.world.round
        write(at=step, drawn=[random.random(), np.random.rand(), torch.rand(1).item()])  # noqa: NPY002
        batch = torch.randperm(96, generator=torch.Generator().manual_seed(step))[:24]
        mine = batch[rank :: run.world.size]
        optimizer.zero_grad()
        for half in range(2):
            with run.model.no_sync() if half == 0 else nullcontext():
                part = mine[half::2]
                loss = ((run.model(inputs[part]) - targets[part]) ** 2).mean() / 2
                if step % 4 == 2:
                    loss = loss * float("inf")  # the scaler skips the optimizer
                scaler.scale(loss).backward()
            fault(f"backward {half}", step, rank)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        fault("unscaled", step, rank)
        dist.all_reduce(torch.ones(100), group=group)
        scaler.step(optimizer)
        scaler.update()
        fault("skipped", step, rank)
        if step % 4 == 2:
            dist.all_reduce(torch.ones(100))
        schedule.step()
        average.update_parameters(net)
        write(step=step, loss=loss.item(), world=run.world)
has = [torch.as_tensor(value).double().sum().item() for of in (net, average) for value in of.state_dict().values()]
write(end=run.world.rank, has=[*has, scaler.get_scale(), *schedule.get_last_lr()])
os._exit(0)  # skips Python's shutdown, which takes seconds on a busy machine
