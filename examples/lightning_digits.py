"""Lightning: a small net on handwritten digits, which continues at any world size from its last checkpoint.

elastic-sbatch --nodes 2:4 examples/lightning_digits.py       python examples/lightning_digits.py
"""

import argparse
import os
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_hpc.training import drain_requested, report_progress


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Elastic(Callback):
    """Saves and stops when the job must: before the time limit, a preemption, or a larger world."""

    def on_train_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            print(f"{trainer.world_size} workers, continuing after step {trainer.global_step}", flush=True)

    def on_train_batch_end(self, trainer: pl.Trainer, _module: pl.LightningModule, outputs: Any, *_: object) -> None:
        report_progress(trainer.global_step, outputs["loss"].item())
        if trainer.is_global_zero and trainer.global_step % 20 == 0:
            print(f"step {trainer.global_step}", flush=True)
        if drain_requested():
            trainer.save_checkpoint(folder / f"step={trainer.global_step}.ckpt")
            trainer.should_stop = True


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300)
args = parser.parse_args()
folder = Path(os.environ.get("ELASTIC_HPC_RUN_DIR", "digits"), "lightning")
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)

# Lightning requires the world's size, which changes: the launcher provides these values.
local, nodes = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
keep = ModelCheckpoint(
    folder,
    "{step}",
    every_n_train_steps=20,
    save_top_k=2,
    monitor="step",
    mode="max",
    enable_version_counter=False,  # Elastic may have saved this step already
)
trainer = pl.Trainer(
    devices=local,
    num_nodes=nodes,
    accelerator="gpu" if torch.cuda.is_available() else "cpu",
    strategy="ddp" if "RANK" in os.environ else "auto",
    max_steps=args.steps,
    max_epochs=-1,
    callbacks=[Elastic(), keep],
    enable_progress_bar=False,
    enable_model_summary=False,
    logger=False,
)
model = Digits()
# Lightning may copy its temporary file from another file system: an interrupted copy is no zip file.
whole = filter(zipfile.is_zipfile, folder.glob("step=*.ckpt"))
saved = sorted(whole, key=lambda path: int(path.stem.partition("=")[2]))
data = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
trainer.fit(model, data, ckpt_path=saved[-1] if saved else None)
if trainer.is_global_zero and trainer.global_step == args.steps:
    accuracy = (model.net(images).argmax(1) == labels).float().mean()
    print(f"step {trainer.global_step}: accuracy {accuracy:.4f}", flush=True)
