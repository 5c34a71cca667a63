"""A Lightning script for test_lightning: lightning_script.py FOLDER. Each process writes its state after each batch.
After step 40 of round 1, rank 1 is killed, and rank 2 is interrupted before it has done that step. The training ends
after three ranks have trained together again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from elastic_hpc.training.lightning import LiveStrategy
from elastic_hpc.training.reform import LiveWorld

FAULT = 40


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(8, 1)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def on_after_backward(self) -> None:
        world = LiveWorld.now()
        if (self.global_step + 1, world.rank, world.round) == (FAULT, 2, 1):
            raise RuntimeError("gloo/test: a member is gone")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Steps(Callback):
    """Writes the state of this process after each batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *rest: Any) -> None:
        world = LiveWorld.now()
        with (self.folder / f"steps.{os.getpid()}.jsonl").open("a") as file:
            learned = sum(parameter.double().sum().item() for parameter in module.parameters())
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            has = {"learned": learned, "rate": rate, "epoch": trainer.current_epoch, "batch": rest[1]}
            line = {"step": trainer.global_step, "rank": world.rank, "round": world.round, "has": has}
            file.write(json.dumps({**line, "loss": outputs["loss"].item()}) + "\n")
        if (trainer.global_step, world.rank, world.round, world.size) == (FAULT, 1, 1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        if world.size == 2:
            time.sleep(0.02)  # leaves CPU time to the new worker
        if world.size == 3 and world.round > 1 and trainer.global_step % 20 == 10:
            trainer.should_stop = True


def fit(folder: Path, steps: int, checkpoint: Path | None = None, **options: Any) -> Net:
    strategy = LiveStrategy()
    torch.manual_seed(0)
    net, inputs = Net(), torch.randn(960, 8)
    loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_sampler=strategy.batches(960, 96))
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    settings = {**quiet, "accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "use_distributed_sampler": False}
    callbacks = [Steps(folder), ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)]
    trainer = pl.Trainer(strategy=strategy, callbacks=callbacks, **{**settings, **options})
    trainer.fit(net, loader, ckpt_path=checkpoint)
    return net


if __name__ == "__main__":
    fit(Path(sys.argv[1]), -1)
