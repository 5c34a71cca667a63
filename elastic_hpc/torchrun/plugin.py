"""What torch finds by the entry point ``torchrun.handlers``: ``torchrun --rdzv-backend=elastic-hpc``.

torch loads this whenever its rendezvous is imported, in every agent and in some workers, hence nothing is imported
before this backend is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def get_handler() -> Callable[[Any], Any]:
    """What makes a handler of torch's ``RendezvousParameters``."""
    return create_handler


def create_handler(parameters: Any) -> Any:
    """Join the job that ``parameters`` name, or lead it. Raises ElasticError."""
    from elastic_hpc.torchrun.handler import join

    return join(parameters)
