"""The options of a job, and how their values are written and read. Pure: it touches nothing.

Start with ``table``, which has all options of elastic jobs, and ``spec.LaunchSpec``, the options of the agents.

* ``values``, ``durations``, ``moments``: the values, each with its parser.
* ``sbatch``: sbatch's options, which of them are refused and why, the scanner of command lines. ``sbatch_lines`` and
  ``sbatch_environment`` read the same options from #SBATCH lines and from variables.
* ``of_joiners``: the same options for the jobs by which a job grows.
* ``torchrun``: torchrun's options, and the counterpart of each. ``from_python``: values given in Python.
"""
