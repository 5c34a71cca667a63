"""One node's agent. Start with ``main``."""
