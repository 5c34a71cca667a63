"""The worker processes of one node: started, watched and killed. Touches files and processes.

Start with ``elastic_agent``, which extends torch's agent. It takes workers from ``standbys`` (through ``handover``),
has them write to ``logs``, tells them to save and stop (``drain``), and notices when they fail (``failures``,
``memory``) or stand still (``watch``, ``stacks``). ``proc`` reads what the kernel knows of a process. ``guard``,
``standby`` and its ``aside`` are programs of their own, run by path without the package: ``guard`` kills what a dead
agent leaves behind, ``standby`` is a worker that has started and imported before its round.
"""
