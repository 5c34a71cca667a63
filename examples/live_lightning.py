"""Lightning in place: when workers are lost or join, the other workers' Trainers continue with their current step.

elastic-sbatch --nodes 2:4 examples/live_lightning.py       python examples/live_lightning.py
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

from elastic_hpc.training.lightning import LiveStrategy


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class SaveAndStop(Callback):
    """Saves and stops when the job must end: before the time limit or a preemption."""

    def on_train_batch_end(self, trainer: pl.Trainer, _module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step % 20 == 0 and trainer.is_global_zero:
            print(f"step {trainer.global_step}, {trainer.world_size} workers", flush=True)
        if strategy.stopped:
            trainer.save_checkpoint(folder / f"step={trainer.global_step}.ckpt")
            trainer.should_stop = True


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300)
default = Path(os.environ.get("ELASTIC_HPC_RUN_DIR", "digits"), "lightning")
parser.add_argument("--folder", type=Path, default=default, help="default: lightning in the run directory")
args = parser.parse_args()
folder = args.folder
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)

strategy = LiveStrategy()
# 96 samples per step over all ranks; a worker that joins begins with the current batch of the others
data = DataLoader(TensorDataset(images, labels), batch_sampler=strategy.batches(len(labels), 96))
keep = ModelCheckpoint(
    folder,
    "{step}",
    every_n_train_steps=20,
    save_top_k=2,
    monitor="step",
    mode="max",
    enable_version_counter=False,  # SaveAndStop may have saved this step already
)
trainer = pl.Trainer(
    strategy=strategy,
    use_distributed_sampler=False,
    devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    accelerator="gpu" if torch.cuda.is_available() else "cpu",
    max_steps=args.steps,
    max_epochs=-1,
    callbacks=[SaveAndStop(), keep],
    enable_progress_bar=False,
    enable_model_summary=False,
    logger=False,
)
model = Digits()
# Read only if no worker has trained yet. Lightning's files may be incomplete: such a file is no zip file.
whole = filter(zipfile.is_zipfile, folder.glob("step=*.ckpt"))
saved = sorted(whole, key=lambda path: int(path.stem.partition("=")[2]))
trainer.fit(model, data, ckpt_path=saved[-1] if saved else None)
if trainer.is_global_zero and trainer.global_step == args.steps:
    accuracy = (model.net(images).argmax(1) == labels).float().mean()
    print(f"step {trainer.global_step}: accuracy {accuracy:.4f}", flush=True)
