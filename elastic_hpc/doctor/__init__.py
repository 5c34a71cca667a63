"""``elastic-hpc doctor``: what the settings and the nodes of a site mean for elastic jobs.

Start with ``examine``, which collects all findings. It asks Slurm, reads configuration files and, with ``--run``,
submits a job.

* ``findings``: a finding, and the configuration file that follows from findings. ``slurm_settings``: findings on
  Slurm's settings, with ``delays`` (what delays starts and ends) and ``limits``; ``asked`` reads a setting.
  ``log_dir``: a finding on the file system.
* ``probe_job``: the job. ``probe``: runs on each node of the job, and writes a report. ``reports``: its fields.
* ``nodes``, ``reach``: findings on the reports.

All but ``examine``, ``log_dir``, ``probe`` and ``probe_job`` touch nothing.
"""
