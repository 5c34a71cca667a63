"""The entry point ``torchrun.handlers``, by which torch finds ``torchrun --rdzv-backend=elastic-hpc``.

torch loads this module whenever its rendezvous is imported, in every agent and in some workers. So the module imports
nothing before this backend is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def get_handler() -> Callable[[Any], Any]:
    """The function that makes a handler of torch's ``RendezvousParameters``."""
    return create_handler


def create_handler(parameters: Any) -> Any:
    """Join the job that ``parameters`` name, or lead it. Raises ElasticError."""
    from elastic_hpc.torchrun.handler import join

    return join(parameters)
