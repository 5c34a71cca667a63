"""What can be asked for: options and values, how they are written and read. Pure. Start with ``spec``."""
