"""Checks that all ranks still have the same parameters, and that all compute the same: a node may compute wrong results
without an error.

The checks compare bits: in data-parallel training all ranks do the same steps with the same averaged gradients.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from elastic_hpc.errors import UsageError
from elastic_hpc.training.checkpoint import control_group

log = logging.getLogger("elastic_hpc")


class Diverged(RuntimeError):
    """This rank differs from most ranks or, where no majority agrees, the ranks differ from each other."""


def verify(
    model: Any,
    step: int,
    every: int = 100,
    loss: Callable[[Any, Any], Any] | None = None,
    batch: Any = None,
    tolerance: float = 0.0,
) -> None:
    """Compare the ranks in each ``every``-th step, so that the job leaves a node that computes wrong results.

    All ranks must call this at the same place with the same ``step``, usually at the beginning of a step. ``model``: a
    module whose parameters are the same on all ranks (DistributedDataParallel, but not FSDP), or these parameters. The
    ranks exchange a checksum of the bits of their parameters, one number for each rank.

    ``loss``: a function that gets the module and a batch (tensors, or mappings, lists and tuples of tensors) and
    returns the loss. If given, all ranks also compute the gradients of the same micro batch: the ranks take turns in
    sending their ``batch`` to the others. This changes no gradients, buffers or random numbers of the training; all
    ranks use the same random seed for it. ``tolerance``: 0 compares bits, for deterministic kernels; otherwise the loss
    and the norm of all gradients may differ from the median of the ranks by this fraction of the median.

    Raises Diverged on the ranks that differ from the majority: the job leaves their node and records that, and the
    other ranks continue as after the loss of any worker. If no more than half of the ranks agree, as when two ranks
    differ, all ranks raise Diverged, and the workers restart from the last checkpoint. Raises UsageError for sharded
    parameters. Does nothing in a world of one rank.
    """
    if every < 1:
        raise UsageError(f"verify(every={every}): expected a number of steps, at least 1")
    control = control_group() if step % every == 0 else None
    if control is None:
        return
    parameters = list(model.parameters()) if hasattr(model, "parameters") else list(model)
    for parameter in parameters:
        if (kind := type(parameter).__name__) in {"DTensor", "FlatParameter"}:
            raise UsageError(f"verify: a parameter is a {kind}: expected parameters that all ranks have alike")
    _compare(control, step, "parameters", _bits(parameters))
    if loss is not None:
        module = getattr(model, "module", model)
        computed = _audit(control, module, step // every, loss, batch)
        if tolerance:
            _compare_norms(control, step, computed, tolerance)
        else:
            _compare(control, step, "gradients of one micro batch", _bits(computed))


def _compare(control: tuple[Any, Any], step: int, what: str, own: int) -> None:
    numbers = _exchange(control, own, sys.modules["torch"].int64)
    (most, count), *_ = Counter(numbers).most_common(1)
    _judge(control, step, what, [rank for rank, number in enumerate(numbers) if number != most], count)


def _compare_norms(control: tuple[Any, Any], step: int, computed: Sequence[Any], tolerance: float) -> None:
    """``computed``: the loss, then the gradients."""
    torch = sys.modules["torch"]
    norms = torch.stack([torch.linalg.vector_norm(each.detach().double().cpu()) for each in computed[1:]])
    odd: set[int] = set()
    for own in (float(computed[0]), float(torch.linalg.vector_norm(norms))):
        numbers = _exchange(control, own, torch.float64)
        median = sorted(numbers)[len(numbers) // 2]
        odd.update(rank for rank, number in enumerate(numbers) if not abs(number - median) <= tolerance * abs(median))
    what = f"loss and gradients of one micro batch (by more than {tolerance:g})"
    _judge(control, step, what, sorted(odd), len(numbers) - len(odd))


def _judge(control: tuple[Any, Any], step: int, what: str, odd: list[int], agree: int) -> None:
    """``odd``: the ranks that differ from the ``agree`` others."""
    dist, group = control
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if not odd:
        return
    if 2 * agree <= size:
        raise Diverged(f"the ranks differ in the {what} at step {step}, and no majority of the {size} agrees")
    if rank in odd:
        raise Diverged(
            f"this rank, {rank}, differs in the {what} at step {step} from {agree} of {size} ranks, which agree"
        )
    if rank == next(other for other in range(size) if other not in odd):
        log.warning("ranks %s differ in the %s at step %d from the %d others", odd, what, step, agree)


def _exchange(control: tuple[Any, Any], own: float, dtype: Any) -> list[Any]:
    """The ``own`` numbers of all ranks, by rank."""
    dist, group = control
    size = dist.get_world_size(group)
    # One number more than ranks: an all-reduce of fewer numbers may hang when a rank is lost (reform.py).
    numbers = sys.modules["torch"].zeros(size + 1, dtype=dtype, device="cpu")
    numbers[dist.get_rank(group)] = own
    dist.all_reduce(numbers, group=group)
    found: list[Any] = numbers[:size].tolist()
    return found


def _bits(tensors: Iterable[Any]) -> int:
    """A checksum of the bits of ``tensors``: any single flipped bit changes it."""
    torch = sys.modules["torch"]
    sums: dict[Any, list[Any]] = {}
    for tensor in tensors:
        sums.setdefault(tensor.device, []).append(_sum(torch, tensor.detach()))
    digest = 0
    for of_device in sums.values():
        for number in torch.stack(of_device).tolist():
            digest = (digest * 1_000_003 + number) % (1 << 61)
    return digest


def _sum(torch: Any, tensor: Any) -> Any:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(whole).sum(dtype=torch.int64)


def _audit(
    control: tuple[Any, Any], module: Any, number: int, loss: Callable[[Any, Any], Any], batch: Any
) -> list[Any]:
    """The loss of the batch of the rank whose turn it is, then the gradients. ``number`` is the number of the turn."""
    torch, (dist, group) = sys.modules["torch"], control
    sender = number % dist.get_world_size(group)
    device = next(module.parameters()).device
    sent = [_moved(torch, batch, "cpu") if dist.get_rank(group) == sender else None]
    dist.broadcast_object_list(sent, dist.get_global_rank(group, sender), group=group)
    same = _moved(torch, sent[0], device)
    before = [buffer.detach().clone() for buffer in module.buffers()]
    try:
        with _seeded(torch, number, device):
            found = loss(module, same)
            wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(found, wanted, allow_unused=True)
    finally:
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.data.copy_(value)
    return [found, *(gradient for gradient in gradients if gradient is not None)]


def _moved(torch: Any, batch: Any, device: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.detach().to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(torch, value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)([_moved(torch, value, device) for value in batch])
    return batch


@contextlib.contextmanager
def _seeded(torch: Any, seed: int, device: Any) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
