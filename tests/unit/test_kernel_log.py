"""The kernel's log during the run of workers."""

from __future__ import annotations

import os
from pathlib import Path

from elastic_hpc.membership.causes import explain
from elastic_hpc.workers.kernel_log import KernelLog


def test_only_new_log_lines_explain_the_end_of_a_worker(tmp_path: Path) -> None:
    device = tmp_path / "kmsg"
    device.write_text("3,1,10,-;NVRM: Xid (PCI:0000:4b:00): 48, pid=1, DBE (double bit error)\n")
    log = KernelLog(device)
    assert log.news() == []
    with device.open("a") as file:
        file.write("6,2,20,-;usb 1-1: new device\n SUBSYSTEM=usb\n")
        file.write("3,3,30,-;NVRM: Xid (PCI:0000:4b:00): 79, GPU has fallen off the bus.\n")
    kernel = log.news()
    assert kernel == ["usb 1-1: new device", "NVRM: Xid (PCI:0000:4b:00): 79, GPU has fallen off the bus."]
    assert log.news() == []
    log.close()
    assert log.news() == []
    cause = explain(-6, "", kernel=kernel)
    assert (cause.known, cause.collateral) == ("GPU lost", False)
    assert cause.message == (
        "killed by SIGABRT (the kernel's log: NVRM: Xid (PCI:0000:4b:00): 79, GPU has fallen off the bus.)"
    )


def test_an_unreadable_log_explains_nothing(tmp_path: Path) -> None:
    assert KernelLog(tmp_path / "none").news() == []


def test_the_log_of_this_machine_breaks_nothing_whether_it_can_be_read_or_not() -> None:
    before = len(os.listdir("/proc/self/fd"))
    log = KernelLog()
    assert log.news() == [] or all(log.news())
    log.close()
    assert len(os.listdir("/proc/self/fd")) == before
