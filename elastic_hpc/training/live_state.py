"""What a rank has learned so far: the registered objects and the model. The ranks exchange these without broadcasts:
gloo's broadcasts often hang when a member is lost, see reform.py.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from elastic_hpc.training.step_time import StepTimer

_PIECE = 1 << 28
"""Bytes that are sent to the other ranks at a time."""
_LEAST = 1024
"""The fewest elements to send, so that each rank of a world sends and receives."""

WHOLE, STEPPED, NEW, TORN = "whole", "stepped", "new", "torn"
"""The state of a rank. WHOLE: after a completed step. STEPPED: all optimizers have stepped, but what the script does
after them, such as ``scheduler.step()``, was interrupted. NEW: no step done. TORN: only some optimizers have stepped.
"""


class LiveStates:
    """The objects that a script registers, by name, each with ``state_dict`` and ``load_state_dict``."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = objects

    def dump(self, file: Any, step: int) -> None:
        torch.save({"step": step, **{name: of.state_dict() for name, of in self._objects.items()}}, file)

    def load(self, file: Any) -> int:
        """Load all objects. Returns the step."""
        saved = torch.load(file, map_location="cpu", weights_only=False)
        for name, of in self._objects.items():
            of.load_state_dict(saved[name])
        return int(saved["step"])

    def save_into(self, folder: Path, step: int) -> None:
        with (folder / "state.pt").open("wb") as file:
            self.dump(file, step)

    def load_from(self, folder: Path) -> int:
        return self.load(folder / "state.pt")

    def share(self, source: int, step: int, *, lacking: bool) -> int:
        """Send the state of rank ``source`` to all ranks; the ``lacking`` ranks load it. Returns the step. Meanwhile
        ``source`` and the ``lacking`` ranks hold a second copy of the state in host memory.
        """
        sends, buffer = dist.get_rank() == source, io.BytesIO()
        if sends:
            self.dump(buffer, step)
        told = torch.full((_LEAST,), buffer.tell(), device="cpu")  # the script may have set another default device
        dist.all_reduce(told)
        size = int(told[0])
        whole = -(-size // _LEAST) * _LEAST
        content = torch.zeros(whole if lacking else min(whole, _PIECE), dtype=torch.uint8, device="cpu")
        for begin in range(0, whole, _PIECE):
            length = min(_PIECE, whole - begin)
            piece = content[begin : begin + length] if lacking else content[:length].zero_()
            if sends:
                part = torch.frombuffer(buffer.getbuffer()[begin : begin + length], dtype=torch.uint8)
                piece[: len(part)] = part
            dist.all_reduce(piece)
        return self.load(io.BytesIO(content[:size].numpy())) if lacking else step


class Buffers:
    """The buffers of ``net`` as they are now: a module may replace one. ``saved``: only buffers in ``state_dict()``."""

    def __init__(self, net: torch.nn.Module, *, saved: bool) -> None:
        keys = net.state_dict().keys() if saved else None
        self._places = [
            (module._buffers, name)  # noqa: SLF001 - ten times as fast as getattr
            for prefix, module in net.named_modules()
            for name, _ in module.named_buffers(recurse=False)
            if keys is None or f"{prefix}.{name}".lstrip(".") in keys
        ]

    def __bool__(self) -> bool:
        return bool(self._places)

    @property
    def now(self) -> list[torch.Tensor]:
        """The tensors, by ``data``: autograd does not see changes to them, and refuses no later backward pass."""
        return [buffer.data for buffers, name in self._places if (buffer := buffers[name]) is not None]

    def take(self) -> None:
        """Copy the buffers of rank 0 to all ranks, as a sum to which the other ranks contribute zeros."""
        for device in dict.fromkeys(buffer.device for buffer in self.now):
            alike: dict[torch.dtype, list[torch.Tensor]] = {}
            for buffer in self.now:
                if buffer.device == device:
                    alike.setdefault(buffer.dtype, []).append(buffer.reshape(-1))
            groups = sorted(alike.values(), key=lambda group: -group[0].element_size())  # each is aligned then
            parts = [torch.cat(group).view(torch.uint8) for group in groups]
            sizes = [part.numel() for part in parts]
            rest = max(0, _LEAST - sum(sizes))
            content = torch.cat([*parts, torch.zeros(rest, dtype=torch.uint8, device=device)])
            if dist.get_rank():
                content.zero_()
            dist.all_reduce(content)
            if dist.get_rank():
                for group, part in zip(groups, content.split([*sizes, rest]), strict=False):
                    numbers = part.view(group[0].dtype).split([buffer.numel() for buffer in group])
                    torch._foreach_copy_(group, list(numbers))


def replica(net: torch.nn.Module, timer: StepTimer) -> DistributedDataParallel:
    """``net`` wrapped for ranks that have the same state. Each forward pass of the training that leads to an exchange
    of gradients begins by copying the buffers of rank 0 to all ranks. ``timer``: does not count that time.
    """
    made = DistributedDataParallel(net, init_sync=False, forward_sync_buffers=False)
    if buffers := Buffers(net, saved=False):

        def take(*_: Any) -> None:
            if not (made.training and torch.is_grad_enabled() and made.require_backward_grad_sync):
                return  # ranks may evaluate alone, or different numbers of batches
            timer.pause()
            buffers.take()
            timer.resume()

        made.register_forward_pre_hook(take)
    return made


def sharded(model: torch.nn.Module) -> str:
    """Why one rank does not hold the whole ``model``; empty if each does."""
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":  # by name, to save the import
            return "the model is sharded, so no rank has the whole state"
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            return f"the parameter {name} is sharded, so no rank has the whole state"
    return ""


class LiveModel(torch.nn.Module):
    """Stands for the model in every world. Passes calls on to the model as wrapped for the current world."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self._wrapped = [module]  # in a list, so that torch does not find the parameters twice

    def enter(self, wrapped: torch.nn.Module) -> None:
        if wrapped is not self.module:
            wrapped.training = self.training  # the script may set the mode once for all worlds
        self._wrapped[0] = wrapped

    @property
    def wrapped(self) -> torch.nn.Module:
        return self._wrapped[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped[0](*args, **kwargs)

    def train(self, mode: bool = True) -> LiveModel:
        super().train(mode)
        self._wrapped[0].train(mode)
        return self

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """As ``DistributedDataParallel.no_sync``: the gradients of the ranks are not averaged."""
        if hasattr(self._wrapped[0], "no_sync"):
            with self._wrapped[0].no_sync():
                yield
        else:
            yield
