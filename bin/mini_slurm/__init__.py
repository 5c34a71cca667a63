"""The code of bin/mini-slurm: a real Slurm of several nodes on one machine. Uses only the standard library.

It changes the state directory and kernel namespaces, and runs apt-get where packages are missing. Start reading with
``lifecycle.bring_up``, which makes a cluster step by step; each step is a module:

* ``cli``: arguments and help. ``lifecycle``, ``faults``, ``execute``: the subcommands.
* ``packages``: the required packages, and the uid of the jobs' user.
* ``files``: slurm.conf and the machines' other files in /etc.
* ``site``: what sites configure beyond that: accounting, limits, prologs. ``cgroups``: the machines' control groups.
* ``machines``: namespaces, mounts and interfaces of a machine.
* ``daemons``: munged, slurmctld and slurmd; the states of the nodes.
* ``cluster``: the state directory, and commands inside a machine. ``system``: system calls and processes.
"""
