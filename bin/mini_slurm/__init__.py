"""A real Slurm of several nodes on one machine: what bin/mini-slurm consists of. Nothing but the standard library.

It touches the state directory, namespaces of the kernel, and, where packages are missing, apt-get. Start reading with
``lifecycle.bring_up``, which makes a cluster step by step; each step is a module:

* ``cli``: arguments and help. ``lifecycle``, ``faults``, ``execute``: the subcommands.
* ``packages``: what must be installed, and the uid of the jobs' user.
* ``files``: slurm.conf and what else the machines see in /etc.
* ``site``: what sites configure beyond that: accounting, limits, prologs. ``cgroups``: those of the machines.
* ``machines``: namespaces, mounts and interfaces of a machine.
* ``daemons``: munged, slurmctld and slurmd; the states of the nodes.
* ``cluster``: the state directory, and commands inside a machine. ``system``: system calls and processes.
"""
