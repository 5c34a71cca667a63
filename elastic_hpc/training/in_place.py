"""A training loop whose workers continue in place: they keep their processes when other workers are lost or join."""

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

    When a worker or a node is lost, or nodes join, the other workers keep their processes and what they have learned.
    In the new world they repeat the step that was interrupted, unless it was complete. That needs an agent, torch 2.14,
    and gloo, or nccl2 for CUDA. Without these the same script runs, and after a fault its workers restart from the last
    checkpoint, as with any other script.

    ``net``: the module to train, on its device. ``optimizers``: any number of them; each step of the loop steps all
    optimizers after the gradients are complete, and after that may exchange numbers among the ranks only for a log.
    ``states``: what else a worker needs to continue, by name: objects with ``state_dict`` and ``load_state_dict``.
    Workers that join receive all of these, and checkpoints contain them.

    ``checkpoint_every``: the number of steps between checkpoints, which ``Checkpoints(folder)`` keeps; None for no
    checkpoints. ``live`` also saves at a drain and at the end, and loads the newest checkpoint if no worker of the
    world has trained yet. ``load``: for a script with checkpoints of its own; called on all ranks instead of that, and
    returns the number of steps done. ``wrap``: gets ``net`` and returns the module for a world of several ranks; the
    default is ``DistributedDataParallel``.

    This function connects the ranks: do not call ``init_process_group`` before. Raises UsageError for arguments that it
    cannot use.
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
