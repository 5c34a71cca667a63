"""The worker processes of one node: started, watched and killed. Touches files and processes.

Start with ``elastic_agent``, which extends torch's agent. It takes workers from ``standbys`` (through ``handover``),
has what they write taken to the log file (``logs``, ``output``), tells them to save and stop (``drain``), notices when
they fail (``failures``, ``memory``) or stand still (``watch``, ``stacks``), and kills them at the end of a round.
``proc`` reads what the kernel knows of a process. ``guard`` and ``standby`` with its ``aside`` and ``seen`` are
programs, run by path without the package: ``guard`` kills what a dead or frozen agent leaves behind, ``standby`` is a
worker that has started and imported before its round.
"""
