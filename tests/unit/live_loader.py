"""A training in place whose samples come from a persistent process of a DataLoader."""

import contextlib
import os
from pathlib import Path

import torch
from live_faults import fault, options, write
from torch import nn
from torch.utils.data import DataLoader, Dataset

from elastic_hpc.training import live


class Numbers(Dataset):
    """Each sample is the number of TCP sockets of the process that makes it."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        tables = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
        tcp, mine = {f"socket:[{line.split()[9]}]" for line in tables}, set()
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the descriptor of the folder itself
                mine.add(os.readlink(f"/proc/self/fd/{name}"))
        return torch.tensor([float(index), float(len(tcp & mine))])


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-9)
    run = live(net, optimizer)
    loader = DataLoader(Numbers(), num_workers=1, multiprocessing_context=options["how"], persistent_workers=True)
    samples = iter(loader)
    for attempt in run.steps(until=options["until"]):
        with attempt as step:
            sample = next(samples)[0]
            loss = run.model(sample[:1]).sum()
            optimizer.zero_grad()
            fault("backward", step, run.world.rank)
            loss.backward()
            optimizer.step()
            write(step=step, world=run.world, sockets=sample[1].item())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in children]
    write(end=run.step, states=states)


if __name__ == "__main__":
    main()
