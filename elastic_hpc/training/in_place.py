"""A training loop whose workers continue in place: they keep their processes when others are lost or join."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from elastic_hpc.errors import UsageError

if TYPE_CHECKING:
    from elastic_hpc.training.live_run import LiveRun


def live(
    net: Any,
    *optimizers: Any,
    checkpoint_every: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    load: Callable[[], int | None] | None = None,
    wrap: Callable[[Any], Any] | None = None,
    **states: Any,
) -> LiveRun:
    """Join the world that the launcher's variables describe, and return the run, whose ``steps`` is the training loop::

        run = live(net, optimizer, scheduler=scheduler, checkpoint_every=20)
        for attempt in run.steps(until=750):
            with attempt as step:
                mine = batch(step)[run.world.rank :: run.world.size]
                loss = cross_entropy(run.model(images[mine]), labels[mine])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()

    When a worker or a node is lost, or nodes join, the other workers keep their processes and what they have learned:
    they do the step in which that happened once more in the new world, if it was not done. That needs an agent,
    torch 2.14, and gloo, or nccl2 for CUDA. Without these the same script runs, and its workers are restarted from the
    last checkpoint, as those of any other script.

    ``net``: the module to train, on its device. Any number of ``optimizers``; each step of the loop steps all of them,
    after the gradients are complete. What comes after that may exchange numbers among the ranks for a log only.
    ``states``: what else a worker needs to continue, by name; anything with ``state_dict`` and ``load_state_dict``. All
    this is sent to workers that join, and saved.

    ``checkpoint_every``: the number of steps between checkpoints, which ``Checkpoints(folder)`` keeps; they are also
    saved at a drain and at the end, and the newest is loaded if no worker of the world has trained yet. None for none.
    ``load``: for a script with checkpoints of its own: called instead, on all ranks; returns the number of steps done.
    ``wrap``: makes of ``net`` the module for a world of several ranks, by default ``DistributedDataParallel``.

    The ranks must not be connected before: this function does that. Raises UsageError for what it cannot use.
    """
    if checkpoint_every is not None and checkpoint_every < 1:
        raise UsageError(f"live(checkpoint_every={checkpoint_every}): expected a number of steps, at least 1, or None")
    if checkpoint_every is not None and load is not None:
        raise UsageError("live(checkpoint_every=..., load=...): expected one of them: load is for other checkpoints")
    import torch

    from elastic_hpc.training.live_run import LiveRun

    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UsageError(
                f"live: {type(optimizer).__name__}: expected a torch.optim.Optimizer. If it steps others, give these, "
                "and itself by name: live(net, inner, outer=outer)"
            )
    names = ["optimizer", *(f"optimizer_{number}" for number in range(1, len(optimizers)))]
    named = {"model": net, **dict(zip(names, optimizers, strict=False))}
    if taken := named.keys() & states.keys():
        raise UsageError(f"live({', '.join(sorted(taken))}=...): expected another name, as live uses this one itself")
    for name, of in {**named, **states}.items():
        if not (hasattr(of, "state_dict") and hasattr(of, "load_state_dict")):
            raise UsageError(f"live: {name} is a {type(of).__name__}: expected state_dict() and load_state_dict()")
    return LiveRun(net, {**named, **states}, checkpoint_every, folder, load, wrap)
