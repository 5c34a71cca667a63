"""Who takes part in a job, who leads it, and what its leader does next and why.

Everything here is pure: no clock, file, thread, process, connection or environment. The callers, ``network`` and
``agent``, pass in what has arrived, with the time, and send or do what is returned. Start reading with ``leader``.

* ``leader``: the state machine, its inputs and outputs. ``decisions``: what the leader decides and does about its parts
  ``mandate`` (does a majority agree), ``peers`` (agents connected), ``admission`` (who may take part, and who leaves),
  ``rounds`` (how a round begins and ends), ``world`` (the running round), ``inputs`` (requests, stores, nodes on their
  way) and ``orders`` (what was sent).
* ``policy``: what the user allows, and what the leader sees. ``rules``: the decision that follows from both, such as to
  form a round or to stop it, with its reason.
* ``election``: majorities over the rounds, which keep two worlds from training at once. ``promises``: what a node has
  promised to the leaders that its agent obeyed.
* ``follower``: what an agent does about the leader's latest order. ``leaderless``: what it does without a leader.
* ``messages`` and ``roster``: what agents and leader send to each other, and what every agent holds to take over.
* ``sizing``: how many nodes the job may have now, and which must leave, as ``wishes`` that outlive the leader.
  ``growth``: how many nodes further jobs must bring. ``yielding``: for which jobs the job gives up nodes, and how many.
  ``strikes``: nodes that the job avoids after a requeue. ``departures``: nodes that it leaves before they fail.
  ``links``: nodes that do not reach each other, and which of them it leaves.
* ``causes`` and ``tracebacks``: why a worker died. ``known``: the table of known causes, and whose fault they are.
  ``failures``: whether the script is to blame, or a node. ``hangs``: how long workers may be silent. ``slow``: which
  nodes are slower than the others. ``standstill``: whether the job makes no progress. ``events``: the events of the
  record. ``nodes``: numbers and names.
"""
