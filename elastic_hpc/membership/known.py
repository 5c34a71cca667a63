"""The known causes: what a worker's failure looks like, whose fault it is, and what the leader does. Pure.

``docs/causes.md`` shows this table. A pattern has to match from the start of what ended the worker: type and text of an
exception, ``exit code 3: `` with the last line on stderr, ``killed by SIGBUS``; or ``kernel: `` and a line of the
kernel's log. What a script merely prints, or raises under another type, matches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Party = Literal["script", "node", "network", "site"]
"""Whose fault a failure is. ``network``: the connection to another rank broke, often the echo of that rank's death."""

Answer = Literal["leave", "restart", "stop", "stop if others fail too"]
"""``leave``: the node gets no more workers, as long as other nodes are left. ``stop``: the job fails at once if it has
made no progress. ``restart``: a new round; a failure that repeats without progress on the same node alone is that
node's fault; on other nodes, it ends the job.
"""


@dataclass(frozen=True)
class Known:
    """One row of the table."""

    name: str
    pattern: re.Pattern[str]
    party: Party
    answer: Answer
    what: str
    """What has happened, and what helps."""
    explains: re.Pattern[str] | None = None
    """For a line of the kernel's log: which failures may come from it."""


def _row(name: str, party: Party, answer: Answer, pattern: str, what: str, explains: str = "") -> Known:
    return Known(name, re.compile(pattern, re.DOTALL), party, answer, what, re.compile(explains) if explains else None)


_TORCH = r"(?:killed by SIGABRT: (?:c10|std)::[\w:]+: |(?:torch[\w.]*\.\w+|RuntimeError): )"
"""Exceptions of torch, including those that C++ threads throw."""
_CUDA = _TORCH + r"(?:[^\n]*exception: )?(?i:cuda|hip|xpu)(?: driver| runtime)? error(?: \(\d+\))? ?: "
_NCCL = _TORCH + r".*NCCL (?:error|Error|ERROR).*"
_ANY = r"(?:[\w.]+\.)?"
_OS = _ANY + r"(?:\w*Error): (?:[^\n]*)"
_LOCAL = r"'(?:/tmp|/var/tmp|/local|/localscratch|/lscratch|/run)/"
_XID = r"kernel: .*NVRM: Xid \([^)]*\): "
_OF_GPU = r"CUDA|HIP|NCCL|CUBLAS|CUDNN|cuDNN|NVML|GPU|^killed by"
_OF_FILES = r"^\w*OSError: |^\w+Error: .*Errno|PytorchStream|SIGBUS"

# fmt: off
KNOWN = (
    # what the kernel reports about the node; the first row that matches decides
    _row("GPU lost", "node", "leave", _XID + r"79\b", "the GPU has fallen off the bus: power, PCIe or the GPU itself; the node needs a reboot or repair", _OF_GPU),
    _row("GPU memory is damaged", "node", "leave", _XID + r"(?:48|64|92|95|140)\b", "the GPU's memory has an error that could not be corrected (ECC); reset its driver, or replace the GPU", _OF_GPU),
    _row("GPU driver hangs", "node", "leave", _XID + r"(?:62|119|120|143)\b", "the GPU's own processor does not answer; the GPU needs a reset", _OF_GPU),
    _row("NVLink is broken", "node", "leave", _XID + r"(?:74|14[4-9]|150)\b", "a link between GPUs of the node has failed; reset the GPUs, or check the cables", _OF_GPU),
    _row("GPU memory error was contained", "node", "restart", _XID + r"(?:63|94)\b", "the GPU no longer uses a damaged row of its memory; a restart is enough, unless the error is repeated", _OF_GPU),
    _row("CPU or memory of the node is damaged", "node", "leave", r"kernel: .*(?:Machine Check Exception|mce: \[Hardware Error\].*(?:[Uu]ncorrected|Fatal)|hardware memory corruption|EDAC .*\bUE\b)", "the kernel reports an error of the hardware that could not be corrected", r"^killed by"),
    _row("disk of the node is damaged", "node", "leave", r"kernel: .*(?:(?:critical medium|critical target|I/O) error, dev |(?:EXT4-fs|XFS|BTRFS)[^\n]*(?:error|shut ?down|Corrupt))", "the kernel reports errors of a local disk", _OF_FILES),
    _row("kernel lost the file system", "node", "restart", r"kernel: .*(?:LustreError: .*evicted|nfs: server \S+ not responding|beegfs: .*(?:timed out|unreachable))", "the node has lost its connection to a shared file system", _OF_FILES),
    _row("GPU page fault", "script", "restart", _XID + r"(?:13|31)\b", "a kernel on the GPU has used memory of another allocation: an index out of range, or a fault of a library", _OF_GPU),
    # memory
    _row("GPU memory, shared with another process", "script", "stop if others fail too", _ANY + r"(?:OutOfMemoryError|RuntimeError): (?:CUDA|HIP|XPU) out of memory.*Process \d+ has [\d.]+ [KMGT]iB memory in use", "the GPU ran out of memory, and another process uses some of it: do all ranks use GPU 0? The script must choose the GPU of its LOCAL_RANK"),
    _row("GPU memory", "script", "stop if others fail too", rf"{_ANY}OutOfMemoryError\b|(?:{_TORCH}|{_NCCL}).*(?:(?:CUDA|HIP|XPU) out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure (?:\d+ )?'out of memory')", "the GPU ran out of memory: use a smaller batch on each rank, or less memory per sample"),
    _row("memory of the job", "script", "restart", rf"{_ANY}_?(?:Array)?MemoryError\b|killed by SIGABRT: std::bad_alloc|{_TORCH}.*DefaultCPUAllocator: (?:can't allocate|not enough) memory|{_OS}Cannot allocate memory|killed by SIGKILL \(out of memory|kernel: .*(?:Memory cgroup out of memory|Out of memory: Killed process)", "the node, or the job's share of the node, ran out of memory: request more (--mem), or use fewer data loader workers"),
    _row("/dev/shm is too small", "site", "restart", _TORCH + r".*(?:DataLoader worker \(pid.*\) is killed by signal: Bus error|unable to (?:open|write to|allocate|resize|mmap)[^\n]*(?:shared memory|</torch_)|/dev/shm/[^\n]*No space left|shared memory segment[^\n]*No space left)|" + _OS + r"No space left on device[^\n]*'/dev/shm/", "shared memory ran out: use fewer data loader workers, or give the container or node a larger /dev/shm"),
    _row("a data loader's process was killed", "script", "restart", _TORCH + r".*DataLoader worker \(pid.*\) (?:is killed by signal: Killed|exited unexpectedly)", "usually memory ran out: request more (--mem), or use fewer data loader workers"),
    # elastic_hpc.training.audit
    _row("computes wrongly", "node", "leave", r"elastic_hpc\.training\.audit\.Diverged: this rank", "most ranks agree, and this one does not: the memory, the GPU or the processor of its node has a fault"),
    _row("ranks differ", "script", "restart", r"elastic_hpc\.training\.audit\.Diverged: ", "no majority of the ranks agrees: the script does not keep the ranks alike, or one of two nodes computes wrongly"),
    # the GPU and its driver, as CUDA reports
    _row("uncorrectable error of the GPU's memory", "node", "leave", _CUDA + "uncorrectable ECC error", "the GPU's memory is damaged (ECC); reset or replace the GPU"),
    _row("driver and its library differ", "node", "leave", r"[\w.]*NVMLError\w*: [^\n]*version mismatch", "the driver of the node was updated without a reboot"),
    _row("GPU is lost", "node", "leave", r"[\w.]*NVMLError\w*: [^\n]*(?:GPU is lost|fallen off the bus)", "the node's driver no longer reaches a GPU; the node needs a reboot or repair"),
    _row("NVLink", "node", "restart", _CUDA + "uncorrectable NVLink error", "a link between GPUs of the node has failed, or an old driver has a fault"),
    _row("GPUs are not ready", "node", "restart", rf"(?:{_CUDA}|{_TORCH}.*)system not yet initialized", "the service that joins the node's GPUs (fabric manager) does not run"),
    _row("torch is not built for this GPU", "script", "stop if others fail too", _CUDA + "no kernel image is available", "install a build of torch for the GPU's generation, or request other GPUs (--constraint)"),
    _row("an index on the GPU is out of range", "script", "stop", _CUDA + "device-side assert", "usually a label or a token outside the range of a loss or an embedding; CUDA_LAUNCH_BLOCKING=1 shows where"),
    _row("no such GPU", "script", "stop if others fail too", _CUDA + "invalid device ordinal", "the script uses a GPU that the job does not have: request one GPU on each node for each worker"),
    _row("illegal access on the GPU", "script", "restart", _CUDA + "(?:an illegal memory access|misaligned address)", "a kernel on the GPU has used memory of another allocation: a fault of the script or a library, rarely of the GPU"),
    _row("driver is too old", "site", "restart", _TORCH + r".*(?:NVIDIA driver on your system is too old|driver version is insufficient|unsupported display driver / cuda driver combination|forward compatibility was attempted)", "torch needs a newer driver than the nodes have, or the driver was updated without a reboot: install a build of torch for an older CUDA, or use other nodes"),
    _row("no GPU", "node", "restart", _TORCH + r"(?:No CUDA GPUs are available|.*CUDA driver initialization failed|.*CUDA unknown error|.*no NVIDIA driver on your system)", "the worker finds no GPU: did the job request GPUs (--gpus-per-node)? If this happens on one node only, its driver has a fault"),
    _row("torch without CUDA", "script", "stop if others fail too", rf"AssertionError: Torch not compiled with CUDA enabled|(?:{_TORCH}|ValueError: ).*ProcessGroupNCCL is only supported with GPUs", "the environment has torch for CPUs only, or the job requested no GPU: install a build for CUDA, or use the backend gloo"),
    _row("GPU library", "node", "restart", _TORCH + r".*(?:CUBLAS_STATUS_\w+|CUDNN_STATUS_\w+|cuDNN error|CUSOLVER_STATUS_\w+|CUFFT_\w+)", "a call to a library of the GPU failed: memory ran out, an index was out of range before, or the GPU has a fault"),
    # NCCL and the process group
    _row("NCCL: two ranks on one GPU", "script", "stop if others fail too", _NCCL + "Duplicate GPU detected", "the script must choose the GPU of its LOCAL_RANK, and the job must request one GPU for each worker"),
    _row("NCCL: versions differ", "script", "stop if others fail too", _NCCL + "(?i:mismatched NCCL version)", "the nodes do not use the same installation"),
    _row("NCCL: no such interface", "site", "restart", _TORCH + r".*no socket interface found", "NCCL_SOCKET_IFNAME, or --interface, names an interface that this node does not have"),
    _row("NCCL: invalid usage", "script", "restart", _NCCL + r"(?:invalid usage|ncclInvalidUsage|invalid argument|ncclInvalidArgument)", "the ranks do not call NCCL alike: sizes, types or the order of collectives differ; NCCL_DEBUG=WARN says more"),
    _row("collectives differ", "script", "stop", _TORCH + r".*(?:Detected mismatch between collectives on ranks|DDP expects same model across all ranks)", "the ranks do not call the same collectives, or do not have the same model"),
    _row("NCCL: a call of CUDA failed", "node", "restart", _NCCL + r"(?:unhandled cuda error|ncclUnhandledCudaError|Cuda failure)", "NCCL met an error of the GPU or its driver; NCCL_DEBUG=WARN says which"),
    _row("NCCL: internal error", "node", "restart", _NCCL + r"(?:internal error|ncclInternalError)", "NCCL's own state is wrong: a fault of a GPU or link of the node, or of NCCL; NCCL_DEBUG=WARN says more"),
    _row("CUDA error", "node", "restart", _TORCH + r".*(?:CUDA|HIP|XPU)(?: driver)? error", "the GPU or its driver failed, or a kernel of the script"),
    _row("port is taken", "script", "restart", rf"(?:{_TORCH}|{_OS}).*(?:EADDRINUSE|[Aa]ddress already in use)", "another process has the port: let the script use MASTER_PORT unchanged, or a free port (0)"),
    # echoes: the connection to another rank
    _row("NCCL: another rank or the network", "network", "restart", _TORCH + r".*(?:remote process exited|ncclRemoteError|ncclSystemError|unhandled system error|NCCL communicator was aborted|dump signal from another rank|NCCL operations have failed or timed out)", "the connection to another rank broke: that rank or its node is dead, or a link between the nodes is broken"),
    _row("a collective took too long", "network", "restart", _TORCH + r".*(?:[Ww]atchdog caught collective operation timeout)", "a rank did not reach the collective: the rank is late, stuck or in another collective, or a link drops packets"),
    _row("gloo: another rank or the network", "network", "restart", _TORCH + r".*(?:gloo/transport/\S+\] [^\n]*(?:closed by peer|Read error|Write error|reset by peer|Broken pipe|[Tt]imed out|[Tt]imeout|Socket closed|refused)|Gloo connectFullMesh failed|monitoredBarrier)", "the connection to another rank broke: that rank or its node is dead, or a link between the nodes is broken"),
    _row("the store is out of reach", "network", "restart", r"(?:torch\.distributed\.\w+|RuntimeError): (?:Connection (?:reset by peer|refused|timed out|was likely closed)|Broken pipe|Socket Timeout|No route to host)|" + _TORCH + r".*(?:client socket has (?:timed out|failed to connect)|wait timeout after \d+ ?ms|seconds waiting for clients|Failed to (?:recv|send), |Did the remote server shutdown or crash|\"should dump\" flag on TCPStore)", "rank 0 does not answer: rank 0 or its node is dead, or a link between the nodes is broken"),
    # files
    _row("local disk is full", "node", "restart", _OS + r"No space left on device[^\n]*" + _LOCAL, "a disk of the node is full, perhaps with files of other jobs"),
    _row("disk is full", "site", "restart", rf"(?:{_OS}|{_TORCH}.*)No space left on device", "the file system is full: remove old checkpoints, or save elsewhere"),
    _row("quota", "site", "restart", _OS + r"Disk quota exceeded", "your quota, of bytes or of files, is used up: remove old checkpoints, or save elsewhere"),
    _row("a file could not be written", "site", "restart", _TORCH + r".*(?:PytorchStreamWriter failed|iostream error|file write failed)", "usually the disk is full, or your quota is used up"),
    _row("stale file handle", "node", "restart", _OS + r"Stale file handle", "the file was replaced or removed on its server, or the node has lost that server; a restart opens the file again"),
    _row("file system of the node", "node", "restart", _OS + r"(?:Input/output error|Transport endpoint is not connected|Cannot send after transport endpoint shutdown|Read-only file system|Remote I/O error)", "the node does not reach a file system, or one of its disks fails"),
    _row("too many open files", "site", "restart", rf"{_OS}Too many open files|{_TORCH}.*(?:received 0 items of ancdata|Too many open files)", "the limit of open files is reached: use ulimit -n in --setup, or torch.multiprocessing.set_sharing_strategy('file_system')"),
    _row("too many processes", "site", "restart", rf"RuntimeError: can't start new thread|{_OS}Resource temporarily unavailable", "the limit of processes and threads is reached: use fewer data loader workers, or a smaller OMP_NUM_THREADS"),
    _row("no way to the internet", "site", "restart", r"(?:requests|urllib3|httpx|httpcore|aiohttp)\.[\w.]*(?:Error|Timeout|Exceeded): |huggingface_hub\.[\w.]*(?:Offline|LocalEntryNotFound)\w*: |(?:urllib\.error\.URLError|socket\.gaierror|URLError|gaierror): |OSError: We couldn't connect to ", "the nodes do not reach that host, as on most clusters: download the files before the job, or set the proxy in --setup"),
    # the script
    _row("the script cannot be parsed", "script", "stop", r"(?:Syntax|Indentation|Tab)Error: ", "fix the script"),
    _row("missing module", "script", "stop if others fail too", r"ModuleNotFoundError: |ImportError: (?:cannot import name|No module named)", "the environment of the workers does not have the module: install it there, or name another environment (--python, --setup)"),
    _row("missing library", "script", "stop if others fail too", r"(?:Import|OS)Error: [^\n]*(?:cannot open shared object file|undefined symbol|version `[^']+' not found)", "the nodes do not have a library, or have another version: load its module in --setup"),
    _row("shapes do not fit", "script", "stop", rf"(?:{_TORCH}|ValueError: ).*(?:shapes cannot be multiplied|must match the size of tensor|must match the existing size|to match target batch_size|shape '\[[^\n]*\]' is invalid for input of size|Given groups=\d+, weight of size|Error\(s\) in loading state_dict|size mismatch for |stack expects each tensor to be equal size|Sizes of tensors must match|expected input\[)", "the sizes of tensors in the script do not match, or the checkpoint is from another model"),
    _row("types or devices do not fit", "script", "stop", _TORCH + r".*(?:Expected all tensors to be on the same device|must have the same dtype|expected scalar type|Input type [^\n]* and weight type [^\n]* should be the same)", "the script mixes tensors of several types, or on several devices"),
    _row("the backward pass cannot be done", "script", "stop", _TORCH + r".*(?:does not require grad and does not have a grad_fn|backward through the graph a second time|modified by an inplace operation|Expected to have finished reduction in the prior iteration|Expected to mark a variable ready only once)", "fix the script; for parameters without gradients: DistributedDataParallel(..., find_unused_parameters=True)"),
    _row("a mistake in the script", "script", "stop if others fail too", r"(?:Name|UnboundLocal|Attribute|Type)Error: ", "fix the script"),
    _row("arguments of the script", "script", "stop", r"exit code 2: [^\n]*: error: ", "the script does not take these arguments"),
    _row("command not found", "script", "stop if others fail too", r"exit code 12[67]\b", "the nodes do not have the command, or it is not executable: give its path, or load its module in --setup"),
    # signals
    _row("bus error", "node", "restart", r"killed by SIGBUS", "memory of a mapped file was missing: /dev/shm or a disk is full, the file was shortened, or memory fails"),
    _row("illegal instruction", "node", "restart", r"killed by SIGILL", "a library was built for another processor than this node's: request nodes of one kind (--constraint)"),
    _row("crash", "script", "restart", r"killed by SIG(?:SEGV|ABRT|FPE)", "a library in C++ or CUDA has crashed; PYTHONFAULTHANDLER=1 shows where"),
    _row("killed", "site", "restart", r"killed by SIG(?:KILL|TERM|INT|HUP)", "a user or a program on the node has killed the worker; if the kernel did so because memory ran out, the agent could not see it"),
)
# fmt: on
"""The table. The first row that matches decides."""

BY_NAME = {known.name: known for known in KNOWN}

OUT_OF_MEMORY = frozenset({"GPU memory", "GPU memory, shared with another process", "memory of the job"})
"""Names of the rows for lack of memory."""


def known_of(chain: Sequence[str], kernel: Iterable[str] = ()) -> Known | None:
    """The known cause of a failure, if any.

    ``chain``: what ended the worker, in order of time; several texts for exceptions that were chained. An exception
    after the first may come from a collective in the cleanup: so it does not count as an echo. ``kernel``: what the
    kernel of that node logged in the meantime; a line explains only failures that may come from it.
    """
    found = next((row for at, text in enumerate(chain) if (row := _match(text, first=not at))), None)
    if found and found.party == "script" and found.answer != "restart":
        return found
    for line in kernel:
        row = _match(f"kernel: {line}")
        if row and row.explains and any(map(row.explains.search, chain)):
            return row
    return found


def party_of(name: str) -> Party | None:
    """Whose fault a failure with this ``Failure.known`` is; None if that is not known."""
    known = BY_NAME.get(name)
    return known.party if known else None


def _match(text: str, *, first: bool = True) -> Known | None:
    """The row for a text: for an exception, for what a data loader's worker raised, or for an exception in a group."""
    texts = [text]
    if "\nOriginal Traceback (most recent call last):" in text:
        texts.insert(0, re.split(r"\n(?=\S)", text)[-1])
    if re.match(r"(?:Base)?ExceptionGroup: ", text):
        texts += text.splitlines()[1:]
    for each in texts:
        for row in KNOWN:
            if (first or row.party != "network") and row.pattern.match(each):
                return row
    return None
