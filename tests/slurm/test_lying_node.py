"""A node that computes or stores wrong values, on a real Slurm: the next audit names the
node, and the job excludes it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Job
from on_demand import ON_DEMAND

SCRIPT = """
import json, os, socket, time
import torch, torch.distributed as dist
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from elastic_hpc.training import Checkpoints, report_progress, verify

dist.init_process_group("gloo")
rank, run = dist.get_rank(), os.environ["ELASTIC_HPC_RUN_DIR"]
torch.manual_seed(0)
net = torch.nn.Linear(8, 4)
checkpoints = Checkpoints()
step = checkpoints.load(lambda path: net.load_state_dict(torch.load(path / "net")) and int(path.name[5:])) or 0
model = DistributedDataParallel(net)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
lies = os.environ["ELASTIC_HPC_ROUND"] == "1" and socket.gethostname() == "{node}"

def loss(module, batch):
    return mse_loss(module(batch), torch.zeros(8, 4))

while step < 60:
    batch = torch.randn(8, 8, generator=torch.Generator().manual_seed(1000 * rank + step))
    verify(model, step, every=5, loss=loss, batch=batch)
    if step % 10 == 0:
        with checkpoints.save(step) as path:
            if rank == 0:
                torch.save(net.state_dict(), path / "net")
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()
    step += 1
    report_progress(step)
    if lies and step == 22:
        {lie}
"""
LIES = {
    "computes": "net.register_forward_hook(lambda _module, _given, out: out * (1 + 2.0 ** -22))",
    "remembers": "net.weight.data.view(torch.int32)[0, 0] ^= 1",
}


@ON_DEMAND
@pytest.mark.parametrize(("lie", "node"), [("computes", "n1"), ("computes", "n3"), ("remembers", "n1")])
def test_a_node_with_wrong_values_is_named_at_the_next_audit_and_excluded_also_if_it_is_the_leaders_node(
    submit: Callable[..., Job], folder: Path, lie: str, node: str
) -> None:
    script = folder / "audited.py"
    script.write_text(SCRIPT.format(node=node, lie=LIES[lie]))
    job = submit("--nodes", "2:4", "--exclusive", script=script)
    assert job.wait_state("COMPLETED", "FAILED", deadline=240) == "COMPLETED", job.output()
    first = next(event for event in job.events("failure") if event["first"])
    assert first["node"] == node
    assert "at step 25 from 3 of 4 ranks" in first["message"]
    assert [event["nodes"] for event in job.events("round")[1:]] == [sorted({"n1", "n2", "n3", "n4"} - {node})]
    assert [event["node"] for event in job.events("barred")] == [node]
    assert job.events("lost") == []
