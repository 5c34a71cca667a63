"""Hugging Face Accelerate: a small net on handwritten digits, which continues from its last checkpoint at any size.

elastic-sbatch --nodes 2:4 examples/accelerate_digits.py       python examples/accelerate_digits.py
"""

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_hpc.training import Checkpoints, drain_requested, report_progress

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300)
args = parser.parse_args()

accelerator = Accelerator(cpu=not torch.cuda.is_available())  # joins the world that the launcher's variables describe
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
# 96 samples per step in a world of any size that divides 96; the loader gives each rank its part
loader = DataLoader(
    TensorDataset(images, labels), batch_size=96 // accelerator.num_processes, shuffle=True, drop_last=True
)
net, optimizer, loader = accelerator.prepare(net, optimizer, loader)

checkpoints = Checkpoints()  # in the run directory; loads only complete ones, and an earlier round cannot save
step = checkpoints.load(lambda path: accelerator.load_state(str(path)) or int((path / "step").read_text())) or 0
accelerator.print(f"{accelerator.num_processes} workers, continuing after step {step}", flush=True)
stop = False
while step < args.steps and not stop:
    for batch, expected in loader:
        loss = nn.functional.cross_entropy(net(batch), expected)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        step += 1
        report_progress(step, loss.item())
        stop = drain_requested() or step == args.steps
        if step % 20 == 0:
            accelerator.print(f"step {step}: loss {loss:.4f}", flush=True)
        if step % 20 == 0 or stop:
            with checkpoints.save(step) as path:
                accelerator.save_state(str(path))
                if accelerator.is_main_process:
                    (path / "step").write_text(str(step))
        if stop:
            break

if accelerator.is_main_process and step == args.steps:
    with torch.no_grad():
        guessed = accelerator.unwrap_model(net)(images.to(accelerator.device)).argmax(1).cpu()
    accuracy = (guessed == labels).float().mean()
    print(f"step {step}: accuracy {accuracy:.4f}", flush=True)
accelerator.end_training()
