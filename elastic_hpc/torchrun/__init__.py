"""The rendezvous backend ``elastic-hpc`` of a stock ``torchrun``, whose agent runs the workers. Touches everything.

Start with ``handler``. ``plugin`` is the entry point by which torch finds the handler, ``settings`` reads the options.
"""
