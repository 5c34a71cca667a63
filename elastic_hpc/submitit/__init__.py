"""submitit's executors: Python functions as elastic jobs. Touches files and processes, as ``job`` does.

Start with ``executors``, which submitit finds by an entry point. submitit imports this module in every program that
uses submitit, so the module imports little. ``parameters`` translates submitit's parameters into options, ``jobs`` has
the jobs that an executor returns. ``environment`` and ``worker`` run in the workers: ``environment`` gives submitit the
rank and the world, ``worker`` adapts process groups and checkpoints. ``job.functions`` has the code that this folder
shares with ``elastic_launch``.
"""
