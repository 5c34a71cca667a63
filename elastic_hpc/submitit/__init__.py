"""submitit's executors: Python functions as elastic jobs. Touches what submitting, looking at and stopping a job does.

Start with ``executors``, which submitit finds by an entry point and imports in every program that uses submitit, so
that it imports little. ``parameters`` makes options of submitit's parameters, ``jobs`` has the jobs that an executor
returns. ``environment`` and ``worker`` run in the workers: the first says to submitit which rank and world they are,
the second adapts process groups and checkpoints. What ``elastic_launch`` shares with this folder is ``job.functions``.
"""
