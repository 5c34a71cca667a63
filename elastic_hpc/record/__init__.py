"""What a job leaves on disk: its run directory, and the record in it. Touches files only.

Start reading with ``rundir``, whose class has the list of the files. ``recorder`` writes the record for the leader;
``events`` has the files of events, one for each node that has led, and their reader. ``endpoint`` is the address of the
leader in that directory, ``folders`` makes the directory and refuses an unsafe one. ``worker_logs`` has the format of
the workers' log files, and reads them. ``registry`` remembers where the run directories of a user's jobs are.
``health``: marks of nodes that the job must not use.
"""
