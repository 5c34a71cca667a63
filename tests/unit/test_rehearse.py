"""``elastic-hpc rehearse``: its findings on good and bad scripts, and that it leaves nothing behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch_214 import IN_PLACE, TORCH_214

from elastic_hpc.errors import UsageError
from elastic_hpc.record.registry import remembered
from elastic_hpc.rehearse.plan import (
    Crash,
    DoneAct,
    Judgement,
    PlannedAct,
    ReportedStep,
    RoundStart,
    continued_from_before,
    exit_code,
    judge,
    plan,
)

ROOT = Path(__file__).parents[2]
REHEARSE = [str(ROOT / "bin" / "elastic-hpc"), "rehearse"]
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}

KILLED = DoneAct("worker", 1, 10.0, "rank 2 was killed")
DRAINED = DoneAct("drain", 1, 10.0, "the script was asked to save", saves=True)


def steps(
    round: int, first: int, last: int, *, loss_of: Any = lambda step: 10 / step, world: int = 3
) -> list[ReportedStep]:
    return [ReportedStep(round, step, loss_of(step), world) for step in range(first, last + 1)]


def only(findings: list[Judgement]) -> tuple[str, str]:
    """The verdict and all output."""
    (finding,) = findings
    return finding.verdict, "\n".join(finding.said)


def test_a_script_that_continues_from_its_checkpoint_is_ok() -> None:
    verdict, said = only(judge([*steps(1, 1, 50), *steps(2, 41, 95, world=2)], [KILLED]))
    assert verdict == "ok"
    assert "continued with step 41 after step 50: 10 steps repeated, none skipped" in said
    assert "a checkpoint of 3 workers was loaded by 2" in said


def test_a_script_that_starts_from_scratch_is_bad() -> None:
    verdict, said = only(judge([*steps(1, 1, 50), *steps(2, 1, 55)], [KILLED]))
    assert verdict == "bad"
    assert "started over with step 1 after step 50: no checkpoint was loaded" in said


def test_a_skipped_step_is_bad_unless_the_script_reports_only_some() -> None:
    verdict, said = only(judge([*steps(1, 1, 50), *steps(2, 52, 95)], [KILLED]))
    assert verdict == "bad"
    assert "continued with step 52 after step 50: the steps between were never done" in said
    every_tenth = [
        ReportedStep(round, step, 1 / step, 2) for round in (1, 2) for step in range(600 * round, 600 * round + 600, 10)
    ]
    assert only(judge(every_tenth, [KILLED]))[0] == "ok"


def test_after_a_drain_no_step_is_repeated() -> None:
    assert only(judge([*steps(1, 1, 50), *steps(2, 51, 95)], [DRAINED]))[0] == "ok"
    verdict, said = only(judge([*steps(1, 1, 50), *steps(2, 41, 95)], [DRAINED]))
    assert verdict == "bad"
    assert "was asked to save after step 50, but continued with step 41" in said


def test_a_loss_that_is_back_at_its_initial_value_is_bad() -> None:
    verdict, said = only(judge([*steps(1, 1, 50), *steps(2, 41, 95, loss_of=lambda step: 10 / (step - 40))], [KILLED]))
    assert verdict == "bad"
    assert "the weights or the optimizer were not loaded" in said


def test_a_noisy_loss_that_continues_is_ok() -> None:
    noisy = [
        ReportedStep(1 + (step > 60), step, 5 * math.exp(-step / 50) + (step * 7919 % 13) / 13, 3)
        for step in range(1, 121)
    ]
    assert only(judge(noisy, [KILLED]))[0] == "ok"


def test_a_loss_that_has_become_nan_is_bad() -> None:
    assert only(judge([*steps(1, 1, 50), *steps(2, 41, 95, loss_of=lambda _: math.nan)], [KILLED]))[0] == "bad"


def test_without_a_loss_rehearse_cannot_judge_whether_the_weights_were_loaded() -> None:
    silent = [*steps(1, 1, 50, loss_of=lambda _: None), *steps(2, 41, 95, loss_of=lambda _: None)]
    verdict, said = only(judge(silent, [KILLED]))
    assert verdict == "cannot tell"
    assert "report_progress(step, loss)" in said


def test_without_steps_rehearse_can_judge_nothing_and_shows_what_to_add() -> None:
    findings = judge([], [], end="no step for 120 s (--timeout)", left=["worker", "node"])
    assert [finding.verdict for finding in findings] == ["cannot tell", "cannot tell"]
    assert "from elastic_hpc.training import report_progress" in findings[0].said[0]


@pytest.mark.parametrize(
    ("first", "second", "continued"), [(0, 1, False), (1, 2, False), (9, 19, False), (10, 20, False), (181, 182, True)]
)
def test_a_script_that_begins_with_a_later_step_has_continued_an_earlier_run(
    first: int, second: int, *, continued: bool
) -> None:
    reported = [ReportedStep(1, step, None, 1) for step in (first, second)]
    assert continued_from_before(reported) == continued
    assert not continued_from_before(reported[:1])
    assert not continued_from_before([reported[0], replace(reported[1], round=2)])


def test_a_crash_after_the_resume_is_bad_but_the_injected_crash_is_not() -> None:
    recovered = [*steps(1, 1, 50), *steps(3, 41, 95)]
    made = Crash(1, 10.1, "killed by SIGKILL")
    assert only(judge(recovered, [KILLED], [made]))[0] == "ok"
    findings = judge(recovered, [KILLED], [made, Crash(2, 15.0, "KeyError: 'step'", "Traceback ...")])
    assert findings[0].verdict == "bad"
    assert findings[0].traceback == "Traceback ..."
    assert "the script failed in round 2, after the resume: KeyError: 'step'" in findings[0].said


def test_no_step_after_a_fault_is_bad_unless_the_training_had_ended() -> None:
    assert only(judge(steps(1, 1, 50), [KILLED], end="no step for 120 s"))[0] == "bad"
    assert only(judge(steps(1, 1, 50), [KILLED], end="it was over", finished=True))[0] == "cannot tell"


def test_each_act_is_judged_by_the_rounds_that_follow_it() -> None:
    acts = [KILLED, DoneAct("head", 2, 20.0, "killed")]
    findings = judge([*steps(1, 1, 50), *steps(2, 41, 95), *steps(3, 1, 50)], acts)
    assert [finding.verdict for finding in findings] == ["ok", "bad"]
    assert exit_code(findings) == 1
    assert exit_code(findings[:1]) == 0
    assert exit_code(judge(steps(1, 1, 50), [KILLED], finished=True)) == 3


def test_rehearse_reports_whether_the_workers_kept_their_processes() -> None:
    live = [replace(step, not_in_place="") for step in [*steps(1, 1, 50), *steps(2, 51, 95, world=2)]]
    (finding,) = judge(live, [KILLED], starts={1: RoundStart(0, 3), 2: RoundStart(2, 0)})
    assert finding.verdict == "ok"
    assert finding.workers_kept == 2
    assert finding.said[-1] == "in place: 2 of 2 workers kept their process, 0 steps repeated"
    assert "the state of 3 workers continued with 2" in finding.said


def test_a_step_that_another_rank_has_done_is_not_lost_in_place() -> None:
    live = [replace(step, not_in_place="") for step in [*steps(1, 1, 50), *steps(2, 52, 95)]]
    verdict, said = only(judge(live, [KILLED], starts={2: RoundStart(2, 1)}))
    assert verdict == "ok"
    assert "continued with step 52 after step 50: step 51 was done by another rank, whose state was kept" in said
    assert only(judge(live, [KILLED], starts={2: RoundStart(0, 3)}))[0] == "bad"


@pytest.mark.parametrize(
    ("not_in_place", "world", "said"),
    [
        (None, 3, "restarted: the script does not call live"),
        ("torch 2.13.0 cannot reconfigure", 3, "restarted: torch 2.13.0 cannot reconfigure"),
        ("", 1, "restarted: there was no other worker"),
        ("", 3, "restarted: no worker could be kept; the agents say why in the output"),
    ],
)
def test_rehearse_reports_why_the_workers_were_restarted(not_in_place: str | None, world: int, said: str) -> None:
    reported = [*steps(1, 1, 50, world=world), *steps(2, 41, 95, world=world)]
    if not_in_place is not None:
        reported = [replace(step, not_in_place=not_in_place) for step in reported]
    (finding,) = judge(reported, [KILLED], starts={2: RoundStart(0, world)})
    assert (finding.verdict, finding.workers_kept, finding.said[-1]) == ("ok", 0, said)


def test_a_restarted_training_is_not_judged_by_its_processes() -> None:
    (finding,) = judge([*steps(1, 1, 50), *steps(2, 51, 95)], [DRAINED], starts={2: RoundStart(0, 3)})
    assert finding.workers_kept is None
    assert not any("restarted" in said for said in finding.said)


def test_a_drain_restores_the_nodes_that_an_act_needs() -> None:
    assert plan(["node", "head"], 3) == (PlannedAct("node", 2), PlannedAct("drain", 3), PlannedAct("head", 2))
    assert plan(["shrink", "grow", "grow"], 3) == (
        PlannedAct("shrink", 2),
        PlannedAct("grow", 3),
        PlannedAct("grow", 4),
    )
    with pytest.raises(UsageError, match="--acts head with --nodes 2: expected --nodes 3 or more"):
        plan(["head"], 2)


def test_only_rank_0_logs_its_steps_and_only_where_a_folder_is_named(tmp_path: Path) -> None:
    code = "from elastic_hpc.training import report_progress; report_progress(7, 0.5); report_progress(8)"
    world = {"WORLD_SIZE": "4", "ELASTIC_HPC_ROUND": "3", "TORCHELASTIC_RUN_ID": "4711"}
    for rank, log in (("1", str(tmp_path)), ("0", ""), ("0", str(tmp_path / "missing")), ("0", str(tmp_path))):
        assert not list(tmp_path.iterdir())
        environ = {**os.environ, **world, "RANK": rank, "ELASTIC_HPC_STEP_LOG": log}
        subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=60)
    logged = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in logged] == [(7, 0.5), (8, None)]
    assert (logged[0]["run"], logged[0]["round"], logged[0]["world_size"]) == ("4711", 3, 4)


PLAIN = """
import json, os, sys, time
from pathlib import Path
from elastic_hpc.training import report_progress
path, step = Path(os.environ["ELASTIC_HPC_RUN_DIR"], "saved.json"), 0
{load}
while True:
    step += 1
    report_progress(step, 10 / step)
    if os.environ["RANK"] == "0" and step % 10 == 0:
        path.with_suffix(".tmp").write_text(json.dumps({{"step": step, "world": os.environ["WORLD_SIZE"]}}))
        os.replace(path.with_suffix(".tmp"), path)
    time.sleep(0.01)
"""
LOADS = """
if path.exists():
    saved = json.loads(path.read_text())
    step = saved["step"]
"""
ONE_SIZE = f"{LOADS}    assert saved['world'] == os.environ['WORLD_SIZE'], 'saved at another size'\n"

TORCH = """
import argparse, gc
import torch, torch.distributed as dist
from elastic_hpc.training import Checkpoints, drain_requested, report_progress
parser = argparse.ArgumentParser()
parser.add_argument("--checkpoints")
dist.init_process_group("gloo")
checkpoints = Checkpoints(parser.parse_args().checkpoints)
saved = checkpoints.load(lambda path: torch.load(path / "state.pt")) or {"step": 0, "weight": torch.full((4,), 8.0)}
step, weight, stop = saved["step"], saved["weight"], False
while not stop:
    gradient = 2 * weight / dist.get_world_size()
    dist.all_reduce(gradient)
    weight -= 0.005 * gradient
    step += 1
    report_progress(step, (weight**2).sum())
    stop = drain_requested()
    if step % 10 == 0 or stop:
        with checkpoints.save(step) as path:
            if dist.get_rank() == 0:
                torch.save({"step": step, "weight": weight}, path / "state.pt")
gc.collect()
dist.destroy_process_group()
"""


def rehearse(
    folder: Path, script: str, *options: str, args: tuple[str, ...] = (), python: str = sys.executable
) -> tuple[int, str, str]:
    (folder / "train.py").write_text(script)
    command = [python, *REHEARSE, *options, "--steps", "25", "train.py", *args]
    done = subprocess.run(command, cwd=folder, env=ENVIRON, capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_script_that_resumes_correctly_passes_its_rehearsal(tmp_path: Path) -> None:
    options = ("--acts", "worker,head,drain", "--json", "--keep", "kept")
    code, out, err = rehearse(tmp_path, TORCH, *options, args=("--checkpoints", "{folder}/saved"))
    assert code == 0, out + err
    report = json.loads(out)
    assert [(found["act"], found["verdict"]) for found in report["findings"]] == [
        ("worker", "ok"),
        ("head", "ok"),
        ("drain", "ok"),
    ]
    said = [" ".join(found["said"]) for found in report["findings"]]
    assert "a checkpoint of 3 workers was loaded by 2" in said[1]
    assert [found["workers_kept"] for found in report["findings"]] == [0, 0, None]
    assert "restarted: the script does not call live" in said[0]
    assert "asked to save and stop" in said[2]
    assert "none repeated, none skipped" in said[2]
    assert list((tmp_path / "kept" / "saved").glob("step-*"))
    assert "another agent leads now" in err


LIVE = """
import torch, torch.nn as nn
from elastic_hpc.training import live, report_progress
net = nn.Linear(1, 1, bias=False)
nn.init.constant_(net.weight, 8.0)
optimizer = torch.optim.SGD(net.parameters(), lr=0.002)
run = live(net, optimizer, checkpoint_every=10)
for attempt in run.steps(until=10**6):
    with attempt as step:
        loss = (run.model(torch.ones(1, 1)) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report_progress(step + 1, loss.item())
"""


@IN_PLACE
def test_a_script_that_calls_live_is_reported_to_continue_in_place(tmp_path: Path) -> None:
    code, out, err = rehearse(tmp_path, LIVE, "--acts", "worker,head,worker", "--json", python=TORCH_214)
    assert code == 0, out + err
    found = json.loads(out)["findings"]
    assert [(of["act"], of["verdict"], of["workers_kept"]) for of in found] == [
        ("worker", "ok", 2),
        ("head", "ok", 2),
        ("worker", "ok", 1),
    ]
    assert found[0]["said"][-1] == "in place: 2 of 2 workers kept their process, 0 steps repeated"
    assert "the state of 2 workers continued with 3" in found[0]["said"]
    assert all("workers kept their process, " in of["said"][-1] for of in found[:2])
    assert found[2]["said"][0] == "rank 1 was killed"


def test_for_a_script_that_calls_live_under_an_old_torch_rehearse_shows_why_it_is_restarted(tmp_path: Path) -> None:
    code, out, err = rehearse(tmp_path, LIVE, "--acts", "worker", "--json", "--nodes", "2")
    assert code == 0, out + err
    (found,) = json.loads(out)["findings"]
    assert found["workers_kept"] == 0
    assert "restarted: torch 2.13.0" in found["said"][-1]
    assert "needs 2.14" in found["said"][-1]


def test_a_script_that_loads_no_checkpoint_fails_its_rehearsal(tmp_path: Path) -> None:
    code, out, _ = rehearse(tmp_path, PLAIN.format(load=""), "--nodes", "2", "--acts", "worker", "--keep", "kept")
    assert code == 1, out
    assert "started over with step 1" in out
    assert f"{tmp_path}/kept/output" in out


def test_a_script_that_loads_at_one_size_only_fails_with_its_traceback(tmp_path: Path) -> None:
    script = PLAIN.format(load=ONE_SIZE)
    code, out, _ = rehearse(tmp_path, script, "--nodes", "2", "--acts", "node,worker", "--keep", "kept")
    assert code == 1, out
    assert "AssertionError: saved at another size" in out
    assert "train.py" in out
    assert "cannot tell  not done:" in out


def test_for_a_script_that_reports_no_steps_rehearse_shows_what_to_add(tmp_path: Path) -> None:
    script = "import time; time.sleep(15); print('trained')"
    code, out, _ = rehearse(tmp_path, script, "--nodes", "1", "--acts", "worker,drain,grow", "--keep", "kept")
    assert code == 3, out
    assert "no step reported yet; if the script does not report its steps, add: from elastic_hpc.training imp" in out
    assert "\nworker  cannot tell  not done: the script has reported no step; add: from elastic_hpc" in out
    assert "\ndrain, grow: the same\n" in out
    assert tmp_path / "kept" / "run" not in remembered(), "status lists no rehearsals"


def test_ctrl_c_leaves_no_process_and_shows_where_the_output_is(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PLAIN.format(load=LOADS))
    command = [sys.executable, *REHEARSE, "--nodes", "2", "--steps", "1000000", "--keep", "kept", "train.py"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        assert any("first step" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert f"{tmp_path}/kept/output" in process.stderr.read()
    deadline = time.monotonic() + 20  # the guards end after all guarded processes
    while left := _of(tmp_path / "kept"):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert (tmp_path / "kept" / "output").exists()


def _of(folder: Path) -> list[str]:
    """The running processes of a rehearsal in ``folder``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            known = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in known:
            found.append(entry.name)
    return found


def test_bad_options_are_reported_before_anything_starts(tmp_path: Path) -> None:
    code, _, err = rehearse(tmp_path, "", "--acts", "worker,power")
    assert code == 2
    assert "'power' is unknown; expected some of worker,head,drain,node,shrink,grow" in err
    assert rehearse(tmp_path, "", "--nproc-per-node", "few", "--keep", "kept")[0] == 2
    assert not (tmp_path / "kept").exists()
    (tmp_path / "there").mkdir()
    assert rehearse(tmp_path, "", "--keep", "there")[0] == 2
    assert not (tmp_path / "elastic-logs").exists()
