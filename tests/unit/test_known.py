"""The table of known causes: a reported line for each row, whose fault it is, and lines that match no row."""

from __future__ import annotations

import causes_page
import pytest

from elastic_hpc.membership.causes import explain
from elastic_hpc.membership.known import BY_NAME, KNOWN, known_of, party_of

_NCCL = "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/NCCLUtils.cpp:94, {}, NCCL version 2.27"

LINES = {
    # the kernel's log, with the worker's own message
    "GPU lost": ("NVRM: Xid (PCI:0000:4b:00): 79, pid='<unknown>', GPU has fallen off the bus.",),
    "GPU memory is damaged": (
        "NVRM: Xid (PCI:0000:4b:00): 48, pid=31, name=python, DBE (double bit error)",
        "NVRM: Xid (PCI:0000:4b:00): 95, pid=31, name=python, Uncontained: FBHUB. RST: Yes, D-RST: No",
    ),
    "GPU driver hangs": ("NVRM: Xid (PCI:0000:4b:00): 119, pid=31, Timeout after 6s of waiting for RPC response",),
    "NVLink is broken": ("NVRM: Xid (PCI:0000:4b:00): 74, pid=31, NVLink: fatal error detected on link 3",),
    "GPU memory error was contained": ("NVRM: Xid (PCI:0000:4b:00): 94, pid=31, Contained: CE User Channel (0x9)",),
    "CPU or memory of the node is damaged": (
        "mce: [Hardware Error]: Machine check events logged, Uncorrected",
        "Memory failure: 0x12: Killing python:31 due to hardware memory corruption",
    ),
    "disk of the node is damaged": (
        "blk_update_request: I/O error, dev sda, sector 12",
        "EXT4-fs (sda2): error count since last fsck: 3",
    ),
    "kernel lost the file system": (
        "LustreError: 167-0: work-MDT0000: This client was evicted by work-MDT0000; in progress operations fail",
        "nfs: server home not responding, still trying",
    ),
    "GPU page fault": ("NVRM: Xid (PCI:0000:4b:00): 31, pid=31, name=python, Ch 00000008, MMU Fault",),
    # memory
    "GPU memory, shared with another process": (
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
            "79.15 GiB of which 1.06 MiB is free. Process 31 has 39.50 GiB memory in use. Including non-PyTorch memory"
        ),
    ),
    "GPU memory": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB",
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
        "RuntimeError: CUDA error: out of memory",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        _NCCL.format("unhandled cuda error") + "\nLast error:\nCuda failure 2 'out of memory'",
    ),
    "memory of the job": (
        "MemoryError",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.28 TiB",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory",
        "OSError: [Errno 12] Cannot allocate memory",
        "killed by SIGKILL (out of memory; request more, for example --mem)",
    ),
    "/dev/shm is too small": (
        "RuntimeError: DataLoader worker (pid 31) is killed by signal: Bus error. It is possible that dataloader's",
        "RuntimeError: unable to open shared memory object </torch_31_12_0> in read-write mode: No space",
        (
            _NCCL.format("unhandled system error")
            + "\nLast error:\nError while creating shared memory segment /dev/shm/nccl-x: No space left on device"
        ),
        "OSError: [Errno 28] No space left on device: '/dev/shm/cache'",
    ),
    "a data loader's process was killed": (
        "RuntimeError: DataLoader worker (pid 31) is killed by signal: Killed. ",
        "RuntimeError: DataLoader worker (pid(s) 31, 32) exited unexpectedly",
    ),
    # elastic_hpc.training.audit
    "computes wrongly": (
        "elastic_hpc.training.audit.Diverged: this rank, 2, differs in the parameters at step 300 from 3 of 4 ranks",
    ),
    "ranks differ": (
        "elastic_hpc.training.audit.Diverged: the ranks differ in the parameters at step 300, and no majority of",
    ),
    # CUDA
    "uncorrectable error of the GPU's memory": (
        "RuntimeError: CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be",
        "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered",
        (
            "killed by SIGABRT: c10::DistBackendError: [PG ID 0 Rank 1] Process group watchdog thread terminated with "
            "exception: CUDA error: uncorrectable ECC error encountered"
        ),
    ),
    "driver and its library differ": (
        "pynvml.NVMLError_LibRmVersionMismatch: RM has detected an NVML/RM version mismatch.",
    ),
    "GPU is lost": ("pynvml.NVMLError_GpuIsLost: GPU is lost",),
    "NVLink": ("RuntimeError: CUDA error: uncorrectable NVLink error detected during the execution",),
    "GPUs are not ready": ("RuntimeError: CUDA error: system not yet initialized",),
    "torch is not built for this GPU": (
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
    ),
    "an index on the GPU is out of range": ("torch.AcceleratorError: CUDA error: device-side assert triggered",),
    "no such GPU": ("RuntimeError: CUDA error: invalid device ordinal",),
    "illegal access on the GPU": (
        "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        "RuntimeError: CUDA error: misaligned address",
    ),
    "driver is too old": (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).",
        (
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted "
            "on non supported HW"
        ),
    ),
    "no GPU": (
        "RuntimeError: No CUDA GPUs are available",
        "RuntimeError: Found no NVIDIA driver on your system.",
    ),
    "torch without CUDA": (
        "AssertionError: Torch not compiled with CUDA enabled",
        "ValueError: ProcessGroupNCCL is only supported with GPUs, no GPUs found!",
    ),
    "GPU library": (
        "RuntimeError: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ),
    # NCCL
    "NCCL: two ranks on one GPU": (
        _NCCL.format("invalid usage") + "\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device",
    ),
    "NCCL: versions differ": (
        _NCCL.format("invalid usage") + "\nLast error:\nMismatched NCCL version detected : rank 0 version 22005",
    ),
    "NCCL: no such interface": (
        _NCCL.format("internal error") + "\nLast error:\nBootstrap : no socket interface found",
    ),
    "NCCL: invalid usage": (_NCCL.format("invalid usage") + "\nncclInvalidUsage: This usually reflects",),
    "collectives differ": (
        "RuntimeError: Detected mismatch between collectives on ranks. Rank 1 is running collective",
        "RuntimeError: DDP expects same model across all ranks, but Rank 0 has 2 params, while rank 1 has 3",
    ),
    "NCCL: a call of CUDA failed": (_NCCL.format("unhandled cuda error") + "\nncclUnhandledCudaError: Call to CUDA",),
    "NCCL: internal error": (_NCCL.format("internal error") + "\nncclInternalError: Internal check failed.",),
    "CUDA error": ("RuntimeError: CUDA error: unspecified launch failure",),
    "port is taken": (
        (
            "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
            "port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use"
        ),
        "OSError: [Errno 98] Address already in use",
    ),
    # echoes
    "NCCL: another rank or the network": (
        (
            _NCCL.format("remote process exited or there was a network error")
            + "\nncclRemoteError: A call failed possibly due to a network error\nLast error:\nNET/IB : Got completion "
            "from peer 10.0.0.2<54862> with status=12 opcode=0 len=0 vendor err 129 (Recv)"
        ),
        _NCCL.format("unhandled system error") + "\nLast error:\nsocketStartConnect: Connect to 10.0.0.2<1> failed",
    ),
    "a collective took too long": (
        (
            "killed by SIGABRT: c10::DistBackendError: [PG ID 0 Rank 1] Watchdog caught collective operation timeout: "
            "WorkNCCL(SeqNum=8, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600020 milliseconds before timing out."
        ),
    ),
    "gloo: another rank or the network": (
        "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]",
    ),
    "the store is out of reach": (
        "torch.distributed.DistNetworkError: The client socket has timed out after 60000ms while trying to connect",
        "torch.distributed.DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed.",
    ),
    # files
    "local disk is full": ("OSError: [Errno 28] No space left on device: '/tmp/cache/x'",),
    "disk is full": ("OSError: [Errno 28] No space left on device: '/work/me/ckpt.pt'",),
    "quota": ("OSError: [Errno 122] Disk quota exceeded: '/home/me/ckpt.pt'",),
    "a file could not be written": (
        "RuntimeError: [enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0",
    ),
    "stale file handle": ("OSError: [Errno 116] Stale file handle: '/data/train.bin'",),
    "file system of the node": (
        "OSError: [Errno 5] Input/output error: '/data/train.bin'",
        "OSError: [Errno 108] Cannot send after transport endpoint shutdown",
        "OSError: [Errno 30] Read-only file system: '/work/x'",
    ),
    "too many open files": (
        "OSError: [Errno 24] Too many open files: '/data/x'",
        "RuntimeError: received 0 items of ancdata",
    ),
    "too many processes": (
        "RuntimeError: can't start new thread",
        "BlockingIOError: [Errno 11] Resource temporarily unavailable",
    ),
    "no way to the internet": (
        "requests.exceptions.ConnectionError: (MaxRetryError(\"HTTPSConnectionPool(host='huggingface.co', port=443)",
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files",
        "socket.gaierror: [Errno -3] Temporary failure in name resolution",
    ),
    # the script
    "the script cannot be parsed": ("SyntaxError: invalid syntax", "IndentationError: unexpected indent"),
    "missing module": (
        "ModuleNotFoundError: No module named 'einops'",
        "ImportError: cannot import name 'FlashAttention' from 'flash'",
    ),
    "missing library": (
        "ImportError: libcudart.so.12: cannot open shared object file: No such file or directory",
        "ImportError: /lib64/libc.so.6: version `GLIBC_2.34' not found (required by x.so)",
    ),
    "shapes do not fit": (
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x10 and 20x5)",
        "RuntimeError: The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1",
        "ValueError: Expected input batch_size (8) to match target batch_size (4).",
        "RuntimeError: Error(s) in loading state_dict for Net:\n\tsize mismatch for w: copying a param",
    ),
    "types or devices do not fit": (
        "RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
        "RuntimeError: mat1 and mat2 must have the same dtype, but got Float and Half",
    ),
    "the backward pass cannot be done": (
        "RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn",
        "RuntimeError: Expected to have finished reduction in the prior iteration before starting a new one.",
    ),
    "a mistake in the script": (
        "AttributeError: 'NoneType' object has no attribute 'shape'",
        "NameError: name 'modle' is not defined",
    ),
    "arguments of the script": ("exit code 2: train.py: error: unrecognized arguments: --lr",),
    "command not found": ("exit code 127: sh: 1: accelerate: not found",),
    # signals
    "bus error": ("killed by SIGBUS",),
    "illegal instruction": ("killed by SIGILL",),
    "crash": ("killed by SIGSEGV", "killed by SIGABRT"),
    "killed": ("killed by SIGKILL", "killed by SIGTERM"),
}
"""By row: the end of the worker; for rows about the kernel's log, the line of that log."""

WITH_KERNEL = {name for name, row in BY_NAME.items() if row.explains}


def test_every_row_has_a_name_of_its_own_and_a_line() -> None:
    assert len(BY_NAME) == len(KNOWN)
    assert list(LINES) == list(BY_NAME), "in the order of the table"


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, lines in LINES.items() for line in lines])
def test_a_reported_failure_is_in_the_table(name: str, line: str) -> None:
    if name in WITH_KERNEL:
        ended = "OSError: [Errno 5] Input/output error" if "disk" in name or "file" in name else "killed by SIGABRT"
        found = known_of([ended], [line])
    else:
        found = known_of([line])
    assert found
    assert found.name == name
    assert found.what
    assert (found.answer == "leave") <= (found.party == "node")
    assert found.answer.startswith("stop") <= (found.party == "script")
    assert party_of(name) == found.party


@pytest.mark.parametrize(
    "text",
    [
        "ValueError: uncorrectable ECC error encountered",
        "ValueError: sample 3: CUDA error: uncorrectable ECC error encountered",
        "LookupError: GPU is lost",
        "exit code 3: CUDA error: uncorrectable ECC error encountered",
        "exit code 1: NVRM: Xid (PCI:0000:4b:00): 79, GPU has fallen off the bus.",
        "kernel panic in my simulation",
        "KeyError: 'NVRM: Xid (PCI:0000:4b:00): 79'",
        "AssertionError: Stale file handle",
        "ValueError: loss is nan",
        "exit code 2: nothing to do",
        "",
    ],
)
def test_a_scripts_own_message_costs_no_node(text: str) -> None:
    found = known_of([text])
    assert found is None or found.party != "node" or found.answer != "leave"


def test_earlier_output_of_a_worker_is_not_its_end() -> None:
    printed = "RuntimeError: CUDA error: uncorrectable ECC error encountered\nkilled by SIGBUS\n"
    raised = (
        'Traceback (most recent call last):\n  File "t.py", line 1, in <module>\n    main()\nValueError: bad data\n'
    )
    assert explain(1, printed + raised).known == ""
    assert explain(3, f"{printed}giving up\n").known == ""
    assert explain(-11, printed).known == "crash"


def test_the_kernels_log_explains_only_failures_that_it_may_cause() -> None:
    gone = "NVRM: Xid (PCI:0000:4b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
    disk = "blk_update_request: I/O error, dev sda, sector 12"
    assert known_of(["ValueError: bad data"], [gone, disk]) is None
    assert known_of(["RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x1 and 2x5)"], [gone]).party == "script"  # type: ignore[union-attr]
    assert known_of(["RuntimeError: CUDA error: unknown error"], [disk, gone]).name == "GPU lost"  # type: ignore[union-attr]
    echo = "torch.distributed.DistBackendError: NCCL error in: x.cpp:1, remote process exited"
    assert known_of([echo], [gone]).name == "GPU lost"  # type: ignore[union-attr]
    assert known_of(["RuntimeError: CUDA error: unknown error"], ["usb 1-1: new device", disk]).name == "CUDA error"  # type: ignore[union-attr]


def test_the_cause_is_found_in_exceptions_of_a_data_loaders_worker_or_of_a_group() -> None:
    text = (
        "OSError: Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        "  File \"x.py\", line 3, in f\nOSError: [Errno 116] Stale file handle: '/data/x'"
    )
    assert known_of([text]).name == "stale file handle"  # type: ignore[union-attr]
    assert known_of(["ExceptionGroup: two\nKeyError: 1\nMemoryError"]).name == "memory of the job"  # type: ignore[union-attr]


def test_the_page_has_the_current_table() -> None:
    text = causes_page.PAGE.read_text()
    assert causes_page.page(text) == text, "run: python tests/unit/causes_page.py"
