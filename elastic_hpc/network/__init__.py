"""Authenticated connections between the agents of a job, and what runs over them. Touches the network, and no file.

Start with ``session``, which keeps one agent connected to the leader. Its parts: ``finding`` looks for the leader,
``following`` obeys it, ``probing`` tries to reach other nodes for it, ``own_leader`` holds the leader on this node, if
there is one; ``node`` declares what they need from their agent. ``server`` connects a leader (``membership.leader``) to
its agents. Below them lie ``channel`` (one connection, a line of JSON a message), ``proofs`` (who speaks on it),
``identity`` (of an agent) and ``addresses``. ``tasks`` waits for asyncio's tasks, and ends them. ``client`` sends a
leader the requests of other processes: to drain, to stop, to release a node. Only ``client`` reads a file, to find the
leader.
"""
