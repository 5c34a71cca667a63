"""Lightning's Trainer in place: a strategy whose workers keep their processes when other workers are lost or join."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from elastic_hpc.environment import LIVE
from elastic_hpc.errors import UsageError
from elastic_hpc.training.live_run import LiveRun
from elastic_hpc.training.reform import LiveWorld

__all__ = ["LiveStrategy"]

_IS_WHOLE = "lightning.pytorch" in sys.modules or not find_spec("pytorch_lightning")
_NAME = "lightning.pytorch" if _IS_WHOLE else "pytorch_lightning"
_strategies, _environments = import_module(f"{_NAME}.strategies"), import_module(f"{_NAME}.plugins.environments")


class LiveEnvironment(_environments.TorchElasticEnvironment):  # type: ignore[name-defined]
    """Gives Lightning the rank that a worker has now."""

    def world_size(self) -> int:
        return LiveWorld.now().size

    def global_rank(self) -> int:
        if LIVE in os.environ and "RANK" not in os.environ:
            return 1  # its node has no place in a world yet; only rank 0 writes files
        return LiveWorld.now().rank

    def local_rank(self) -> int:
        return LiveWorld.now().local_rank

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Checks nothing: Lightning need not know the size of the world."""


class LiveStrategy(_strategies.DDPStrategy):  # type: ignore[name-defined]
    """DDP whose workers continue in place, with automatic optimization. See docs/in-place.md::

        strategy = LiveStrategy()
        loader = DataLoader(dataset, batch_sampler=strategy.batches(len(dataset), 96))
        trainer = Trainer(strategy=strategy, use_distributed_sampler=False, devices=1, max_steps=750)
        trainer.fit(module, loader, ckpt_path=newest)

    A step that a change of the world interrupts is repeated in the new world. A worker that joins receives, from
    another worker's memory, what Lightning would have saved; ``ckpt_path`` counts only if no worker has trained yet.
    An interruption elsewhere, for example in a validation, ends the worker, which is then restarted.

    ``options``: the options of DDPStrategy. ``fit`` raises UsageError for what this strategy cannot do.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(cluster_environment=LiveEnvironment(), **options)
        self._run: LiveRun | None = None
        self._alone = True
        """Whether this rank exchanges nothing with the others: they are ahead of it, or have not begun yet."""
        self._got: dict[str, Any] | None = None
        self._failed = self._skips = self._stepping = False
        self._loss = torch.tensor(torch.nan)

    @property
    def stopped(self) -> bool:
        """Whether the job must stop; then save, and set ``trainer.should_stop``. All ranks get the same answer after
        the same step.
        """
        return self._run is not None and self._run.stopped

    def batches(self, length: int, batch_size: int, *, seed: int = 0) -> torch.utils.data.Sampler[list[int]]:
        """A ``batch_sampler`` for a dataset of ``length`` samples, which it shuffles in each epoch. ``batch_size``: the
        samples of all ranks together. An epoch has the same batches in each world, and a worker that joins begins with
        the right batch. The last samples of an epoch, if they do not fill a batch, are left out.
        """
        return LiveBatches(self, length, batch_size, seed)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        raise UsageError(
            "LiveStrategy: a DistributedSampler belongs to one world; expected Trainer(use_distributed_sampler=False), "
            "and DataLoader(dataset, batch_sampler=strategy.batches(len(dataset), batch_size))"
        )

    @property
    def world_size(self) -> int:
        """1 while this rank exchanges nothing with the others, so that Lightning does not either."""
        return 1 if self._alone else LiveWorld.now().size

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    def setup_distributed(self) -> None:
        """Does not connect the ranks: ``setup`` does, after all that a worker can do alone."""
        self.set_world_ranks()

    def configure_ddp(self) -> None:
        """Does nothing: ``LiveRun`` wraps the module in each world."""

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        if not trainer.training:
            raise UsageError(f"LiveStrategy: expected trainer.fit, not {trainer.state.fn}, which needs another Trainer")
        if not self.lightning_module.automatic_optimization or len(self.optimizers) != 1:
            raise UsageError("LiveStrategy: expected automatic optimization with one optimizer")
        if trainer.accumulate_grad_batches != 1 or isinstance(self.optimizers[0], torch.optim.LBFGS):
            raise UsageError("LiveStrategy: expected an optimizer that steps once a batch: no accumulation, no LBFGS")
        self._run = LiveRun(
            self.lightning_module, {"lightning": self}, None, None, None, self._wrap, optimizers=self.optimizers
        )
        self._enter_world(alone=True)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Do the step, with its forward and backward pass, in as many worlds as it takes."""
        run, trainer = self._live, self.lightning_module.trainer
        self._got, run.step, self._loss = None, trainer.global_step, torch.tensor(torch.nan)
        output, done = None, False
        for attempt in run.attempts():
            self._enter_world(alone=False)
            self._stepping = True
            with attempt:
                loss = closure()
                output = super().optimizer_step(optimizer, lambda: loss, model, **kwargs)  # noqa: B023 - called at once
                done = True
            self._stepping = False
        if not done:
            self._skip(closure)
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._skips:
            return self._loss.requires_grad_()
        output = super().training_step(*args, **kwargs)
        loss = output["loss"] if isinstance(output, Mapping) else output
        self._loss = loss.detach().clone()
        return output

    def backward(self, closure_loss: Any, *args: Any, **kwargs: Any) -> Any:
        return closure_loss if self._skips else super().backward(closure_loss, *args, **kwargs)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self._with_others(lambda: super(LiveStrategy, self).barrier(*args, **kwargs), None)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self._with_others(lambda: super(LiveStrategy, self).broadcast(obj, src), obj)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        decide = super().reduce_boolean_decision
        return bool(self._with_others(lambda: decide(decision, all), decision))

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Raises an interruption, unlike ``broadcast``: ranks with different metrics would take different decisions."""
        return tensor if self._alone else super().reduce(tensor, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._got or super().load_checkpoint(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """For ``LiveRun``: what Lightning saves, as it was before the current batch."""
        checkpoint = self._connector.dump_checkpoint(weights_only=False)
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]
        for progress in (batches, loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]):
            for counts in (progress["total"], progress["current"]):
                counts.update(dict.fromkeys(counts, counts["completed"]))
        batches["is_last_batch"] = False
        return dict(checkpoint)

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """For ``LiveRun``: a newcomer restores everything; a rank that is one step behind restores model, optimizer and
        precision, and does the rest in its own loop.
        """
        if self._run is None:
            self._got = checkpoint
            self._connector.restore("the memory of another worker")
            return
        own = [optimizer.state_dict()["param_groups"] for optimizer in self.optimizers]
        pairs = zip(checkpoint["optimizer_states"], own, strict=True)
        states = [{**state, "param_groups": groups} for state, groups in pairs]  # its schedulers have not stepped yet
        self.load_model_state_dict(checkpoint)
        self.load_optimizer_state_dict({"optimizer_states": states})
        if precision := checkpoint.get(type(self.precision_plugin).__qualname__):
            self.precision_plugin.load_state_dict(precision)

    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        super().on_exception(exception)

    def teardown(self) -> None:
        if self._run and not self._failed:
            self._run.finish()
        super().teardown()

    @property
    def _live(self) -> LiveRun:
        assert self._run is not None
        return self._run

    @property
    def _connector(self) -> Any:
        """The part of Lightning that saves and restores; the only private name of Lightning here."""
        return self.lightning_module.trainer._checkpoint_connector  # noqa: SLF001

    def _wrap(self, module: Any) -> Any:
        self.model = module
        super().configure_ddp()
        return self.model

    def _with_others(self, what: Callable[[], Any], own: Any) -> Any:
        """Do ``what`` with the other ranks. Returns this rank's ``own`` answer if a change of the world interrupts
        ``what`` between two steps, or there is nothing to exchange. A rank that stops alone after that is restarted.
        """
        if self._alone:
            return own
        try:
            return what()
        except Exception as error:
            if self._stepping or not self._live.is_interruption(error):
                raise
            self._enter_world(alone=True)
            return own

    def _enter_world(self, *, alone: bool) -> None:
        self._alone = alone
        self.model = self.lightning_module if alone else self._live.model.wrapped
        self.set_world_ranks()

    def _skip(self, closure: Callable[[], Any]) -> None:
        """Do what comes between two steps, without the step: this rank has received its result from another rank."""
        self._enter_world(alone=True)
        self._skips = True
        closure()  # Lightning wants a result
        self._skips = False


class LiveBatches(torch.utils.data.Sampler[list[int]]):
    """See ``LiveStrategy.batches``."""

    def __init__(self, strategy: LiveStrategy, length: int, batch_size: int, seed: int) -> None:
        self._strategy, self._length, self._seed, self.batch_size = strategy, length, seed, batch_size

    def __len__(self) -> int:
        return self._length // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        trainer = self._strategy.lightning_module.trainer
        generator = torch.Generator().manual_seed(self._seed + trainer.current_epoch)
        order = torch.randperm(self._length, generator=generator)
        for number in range(trainer.fit_loop.epoch_loop.batch_progress.current.ready, len(self)):
            world = LiveWorld.now()
            batch = order[number * self.batch_size :][: self.batch_size]
            yield batch[world.rank :: world.size].tolist()
