"""``elastic-hpc rehearse``: a training script on agents of this machine, under faults. Touches files, processes and the
network.

Start with ``run``, which starts the agents, carries out one act after another (kill a worker, a node, ...) and records
the steps that the script reports. ``plan`` is pure: it orders the acts, and judges from the steps whether the script
resumed correctly.
"""
