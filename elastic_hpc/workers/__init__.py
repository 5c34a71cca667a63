"""The worker processes of one node: started, watched and killed. Touches files and processes.

Start with ``elastic_agent``, which extends torch's agent; ``sides`` declares what it needs from the rest of the agent.
It takes workers from ``standbys`` (through ``handover``), has their output copied to the log file (``logs``,
``output``), signals them to save and stop (``drain``), notices when they fail (``failures``, ``memory``,
``kernel_log``) or hang (``watch``, ``work``, ``stacks``), and at the end of a round kills them (``killing``), or has
them pause and keeps them (``lives``; ``live_worker`` for each worker). ``ahead`` starts the workers of a node that has
no place yet. ``proc`` reads what the kernel knows about a process, ``folder`` keeps this process in its working
directory. ``guard`` and ``standby`` with its ``aside`` and ``seen`` are programs, run by path without the package:
``guard`` kills what a dead or frozen agent leaves behind, ``standby`` is a worker that has started and imported before
its round.
"""
