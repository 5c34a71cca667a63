"""What a job leaves on disk: its run directory, and the record in it. Touches files only.

Start reading with ``rundir``, whose class has the list of the files. ``recorder`` is the leader's writer of the record.
``stamps`` notes when the workers' output files grew, and ``worker_logs`` reads those files. ``registry`` remembers
where the run directories of a user's jobs are.
"""
