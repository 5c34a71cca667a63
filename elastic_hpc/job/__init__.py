"""A job before it runs, and the handle of a job that runs or ran. Reads configuration files and the script, writes what
is put aside for a job; ``slurm`` submits it.

Start with ``spec.build``: ``request`` (a caller's wishes over those of ``config``) -> ``spec.JobSpec`` -> ``script``
(the batch script) -> ``submission`` (the last checks, and what must be in place).

* ``programs``, ``script_file``, ``snapshot``, ``outputs``: files of the job, as they are on this machine.
* ``commands``, ``quoting``: the lines of the batch script. ``toml_file``: configuration files.
* ``handle.Job``, with ``look`` and ``lookup``: a job that was submitted. ``launch``, ``functions``: functions as jobs.
"""
