"""For the scripts of the in-place tests: options, records, and the faults that a test requests."""

import json
import os
import signal
import time

options = json.loads(os.environ["OPTIONS"])
_record = open(os.environ["RECORD"], "a", buffering=1)  # noqa: SIM115 - until this process ends


def write(**line):
    _record.write(json.dumps({"pid": os.getpid(), "time": time.time(), **line}) + "\n")


def fault(where, step, rank):
    """Inject the fault that the test requests at this place, once."""
    for number, wish in enumerate(options.get("faults", [])):
        if (wish["where"], wish["step"], wish["rank"]) == (where, step, rank):
            try:
                os.close(os.open(f"{os.environ['RECORD']}.{number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            write(fault=wish["do"])
            if wish["do"] == "raise":
                raise ValueError("of the script itself")
            os.kill(os.getpid(), getattr(signal, wish["do"]))
