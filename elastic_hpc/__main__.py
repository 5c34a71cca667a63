"""``python -m elastic_hpc``: the same as ``elastic-hpc``."""

import sys

from elastic_hpc.cli.hpc import main

sys.exit(main())
