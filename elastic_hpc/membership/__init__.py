"""Who takes part in a job, who leads it, and what its leader does next and why.

Everything here is pure: no clock, file, thread, process, connection or environment. What has arrived is passed in with
the time, and what is to be sent or done is returned; ``network`` and ``agent`` do it. Start reading with ``leader``.

* ``leader``: the state machine, with its parts ``mandate`` (does a majority agree), ``peers`` (agents in touch),
  ``admission`` (who may take part), ``rounds`` (how a round begins and ends), ``world`` (the round that runs),
  ``inputs`` (requests, stores, nodes on their way) and ``orders`` (what was sent).
* ``policy``: what the user allows, and what the leader sees. ``rules``: the decision made of both, such as to form a
  round or to stop it, with its reason.
* ``election``: majorities over the rounds, which keep two worlds from training at once. ``promises``: what a node has
  promised to the leaders that its agent obeyed.
* ``follower``: what an agent does about the leader's latest order. ``leaderless``: what it does without a leader.
* ``messages`` and ``roster``: what agents and leader send to each other, and what every agent holds to take over.
* ``growth``: how many nodes further jobs are to bring. ``strikes``: nodes that the job avoids after a requeue.
* ``causes`` and ``tracebacks``: why a worker died. ``failures``: whether the script is to blame, or a node.
  ``events``: the events of the record. ``nodes``: numbers and names.
"""
