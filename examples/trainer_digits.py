"""Hugging Face Trainer: a small net on handwritten digits, which continues at any world size from its last checkpoint.

elastic-sbatch --nodes 2:4 examples/trainer_digits.py       python examples/trainer_digits.py
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from elastic_hpc.training import drain_requested, report_progress


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Elastic(TrainerCallback):
    """Saves and stops when the job must: before the time limit, a preemption, or a larger world."""

    def on_train_begin(self, args: TrainingArguments, state: Any, _control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            print(f"{args.world_size} workers, continuing after step {state.global_step}", flush=True)

    def on_step_end(self, _args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        report_progress(state.global_step)
        if state.is_world_process_zero and state.global_step % 20 == 0:
            print(f"step {state.global_step}", flush=True)
        if drain_requested():
            control.should_save = control.should_training_stop = True


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()
folder = Path(os.environ.get("ELASTIC_HPC_RUN_DIR", "digits"), "trainer")
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
model = Net()
trainer = Trainer(
    model,
    TrainingArguments(
        str(folder),
        use_cpu=not torch.cuda.is_available(),
        max_steps=options.steps,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=32,
        save_steps=20,
        save_total_limit=3,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
    ),
    train_dataset=[{"images": image, "labels": label} for image, label in zip(images, labels, strict=True)],
    callbacks=[Elastic()],
)
# Trainer writes trainer_state.json last: the writer of a folder without it was killed.
saved = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.partition("-")[2]))
trainer.train(resume_from_checkpoint=str(saved[-1].parent) if saved else None)
if trainer.is_world_process_zero() and trainer.state.global_step == options.steps:
    accuracy = (model.layers(images.to(trainer.args.device)).argmax(1).cpu() == labels).float().mean()
    print(f"step {trainer.state.global_step}: accuracy {accuracy:.4f}", flush=True)
