"""The commands ``elastic-sbatch``, ``elastic-srun`` and ``elastic-hpc``: only arguments and printing.

Start with ``sbatch``, or with ``hpc``, whose commands are modules with HELP, EPILOG, ``add_arguments`` and ``run``,
which returns the exit code: ``status``, ``logs``, ``why``, ``timeline``, ``serve``, ``metrics``, ``shell``, ``stop``,
``clean``, ``notice``, ``plan``, ``config``, ``doctor``, ``rehearse``.
``entry`` turns errors into one line and an exit code, ``manual`` has the layout of the help, ``jobs`` the argument JOB,
``agents`` the agents of ``srun``.
"""
