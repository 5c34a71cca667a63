"""What a job leaves on disk: its run directory and the record in it. Start with ``rundir``."""
