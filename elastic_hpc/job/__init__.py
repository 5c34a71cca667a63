"""A job before it runs, and the handle of a job that runs or ran. Reads configuration files and the script, and writes
the files that the job needs; ``slurm`` submits the job.

Start with ``spec.build``: ``request`` (a caller's options over those of ``config``) -> ``spec.JobSpec`` -> ``script``
(the batch script) -> ``submission`` (the last checks, the files that the job needs).

* ``programs``, ``script_file``, ``snapshot``, ``outputs``: files of the job, as they are on this machine.
* ``commands``, ``quoting``: the lines of the batch script. ``compiled``: its templates.
* ``toml_file``: one configuration file. ``typed``: types.
* ``handle.Job``, with ``look``, ``lookup``, ``resizing`` and ``notices``: a job that was submitted.
* ``resume``: a job that has ended continues; ``recorded``: how it was submitted, as recorded in its batch script.
* ``cleaning``, ``remains``: what jobs that ended long ago have left. ``launch``, ``functions``: functions as jobs.
"""
