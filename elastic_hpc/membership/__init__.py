"""Who takes part in a job, who leads it, and what the leader does next. Pure. Start with ``leader``."""
