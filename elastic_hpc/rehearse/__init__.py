"""A script under faults, on this machine. Start with ``run``."""
