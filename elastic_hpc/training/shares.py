"""This rank's share of a global batch, whatever the world size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from elastic_hpc.errors import UsageError
from elastic_hpc.training.checkpoint import world


@dataclass(frozen=True)
class Share:
    """One rank's part of a global batch, in micro batches; all ranks have the same number of them."""

    slices: tuple[slice, ...]
    """The micro batches, as slices of the global batch. The last slice is empty only if the batch has fewer samples
    than there are ranks; an earlier slice only if ``micro_batch`` is 1."""
    scale: float
    """Factor for the *sum* of a micro batch's losses. With it, the average over the ranks (DDP) of the accumulated
    gradients is the gradient of the mean over the global batch."""

    def micro_batches(self, model: Any) -> Iterator[slice]:
        """Yields the slices for forward and backward passes; the gradients of the ranks are averaged in the last pass.

        ``model``: a DistributedDataParallel; or any other model, whose gradients are then not averaged.
        """
        for part in self.slices[:-1]:
            with getattr(model, "no_sync", contextlib.nullcontext)():
                yield part
        yield self.slices[-1]


def accumulation(
    global_batch: int, micro_batch: int, *, world_size: int | None = None, rank: int | None = None
) -> Share:
    """This rank's share of a batch of ``global_batch`` samples, at most ``micro_batch`` of them at a time.

    The shares of all ranks make up the batch, whatever the world size, and differ by at most one sample. ``world_size``
    and ``rank``: by default those of the process group; give both if only some ranks are replicas of each other. Raises
    UsageError for impossible numbers.
    """
    if world_size is None or rank is None:
        rank, world_size = world()
    if global_batch < 1 or micro_batch < 1 or not 0 <= rank < world_size:
        raise UsageError(
            f"accumulation({global_batch}, {micro_batch}, {world_size=}, {rank=}): "
            "expected batches of at least 1 sample, and 0 <= rank < world_size"
        )
    count = -(-global_batch // world_size // micro_batch)  # rounded up twice, for the largest share
    begin, end = rank * global_batch // world_size, (rank + 1) * global_batch // world_size
    bounds = [begin + (end - begin) * i // count for i in range(count + 1)]
    return Share(tuple(map(slice, bounds[:-1], bounds[1:])), world_size / global_batch)
