"""submitit's executors. Start with ``executors``."""
