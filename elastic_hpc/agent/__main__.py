"""``python -m elastic_hpc.agent``: one node's agent as a process."""

import os
import sys

from elastic_hpc.agent.log import Stderr
from elastic_hpc.agent.main import main
from elastic_hpc.agent.threads import within
from elastic_hpc.errors import ElasticError

sys.stderr = Stderr()
try:
    status = main()
except (ElasticError, OSError) as error:
    print(f"elastic_hpc.agent: {error}", file=sys.stderr)
    status = getattr(error, "exit_code", 1)
within(5, sys.stdout.flush)  # blocks if srun is frozen
within(5, sys.stderr.flush)
os._exit(status)  # threads that block on a dead store or file system must not keep the node
