"""One node's agent: it takes part in the job, leads the job if necessary, and runs the node's workers. Touches
everything.

Start with ``main``, which puts an agent together from its command line (``arguments``, ``assembly``, ``preflight``) and
runs it. Two threads run from then on. On the main thread, torch's agent asks ``rendezvous`` for its place in the next
round. On the other, the membership of ``network`` follows the leader; ``bridge`` lies between the two. ``leading`` has
what an agent needs to lead: stores for the workers (``store``), nodes that Slurm brings (``supply``, ``joiners``), and
what Slurm and the site say about the job (``lookout``): which nodes are about to fail (``health``), and which jobs wait
for its nodes (``giving_way``). At the end of a run, or when no leader can be found, ``ending`` has ``conclude`` do what
the verdict says: requeue the job, or end it.

* ``first``: which agent leads at the beginning. ``turns``: which agent acts when no leader is left.
* ``promise_file``, ``last_words``: files in memory, for the next agent of the node, and for the batch script.
* ``warned``: Slurm's warning, on its way from the batch script to the leader. ``log``: the agent's own log.
* ``notify``: messages to the user about an end or a standstill. ``telling``: the leader's look at the progress, for
  them and for the job's comment in Slurm.
* ``threads``: calls that may block.
* ``once_more``: one more run of an ended job; this run ends at once.
* ``beside``: a shell of the user, beside the agent.
* ``unreached``: the verdict on a run in which srun could not reach a node.
"""

from elastic_hpc import slurm

slurm.load()
