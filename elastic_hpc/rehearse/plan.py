"""What a rehearsal does to a training script, in which order, and how the reported steps are judged. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import median
from typing import Literal

from elastic_hpc.errors import UsageError

Verdict = Literal["ok", "bad", "cannot tell"]

ORDER = ("worker", "head", "drain", "node", "shrink", "grow")
"""All acts, in an order in which the training must be restarted for few of them."""

FAULTS = {"worker", "node", "head"}
"""Acts after which the same training continues; after the other acts it is started again."""

LEAST = {"worker": 1, "node": 2, "head": 3, "drain": 1, "shrink": 2, "grow": 1}
"""How many nodes an act needs: when the leader's node is lost, more than half of the nodes must be left."""

WINDOW = 10
"""Number of steps for a median of the loss."""

JUMP = 10
"""The loss may rise at a resume by this multiple of its usual change from step to step."""

TWO_LINES = "add: from elastic_hpc.training import report_progress, and once a step: report_progress(step, loss)"


@dataclass(frozen=True)
class PlannedAct:
    act: str
    nodes: int
    """How many nodes the act leaves or starts."""


@dataclass(frozen=True)
class ReportedStep:
    """A step that rank 0 has reported; ``loss`` is None if the report has none."""

    round: int
    step: int
    loss: float | None
    world_size: int
    not_in_place: str | None = "the script does not call live"
    """Why a fault restarts this worker; empty if it can continue in place."""


@dataclass(frozen=True)
class RoundStart:
    """How the workers of a round were started."""

    kept: int
    """Number of workers that kept their process from the previous round."""
    new: int


@dataclass(frozen=True)
class DoneAct:
    """An act that was carried out. ``time`` is in seconds since the epoch."""

    act: str
    round: int
    """The round that the act ended."""
    time: float
    what: str
    """The act in words, for example ``rank 2 was killed``."""
    saves: bool = False
    """Whether the script was asked to save first, and calls ``drain_requested``."""


@dataclass(frozen=True)
class Crash:
    """A worker that failed first in its round."""

    round: int
    time: float
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Judgement:
    act: str
    verdict: Verdict
    said: tuple[str, ...]
    """What was observed, a sentence each."""
    traceback: str = ""
    workers_kept: int | None = None
    """Number of workers that kept their process; None if the act starts the training again, or if it is not known."""


def plan(acts: Iterable[str], nodes: int) -> tuple[PlannedAct, ...]:
    """The acts in their order, from a world of ``nodes``. A drain comes before an act that needs more nodes than are
    left. Raises UsageError for an act that needs more than ``nodes`` nodes.
    """
    planned: list[PlannedAct] = []
    current = nodes
    for act in acts:
        if LEAST[act] > nodes:
            raise UsageError(f"--acts {act} with --nodes {nodes}: expected --nodes {LEAST[act]} or more")
        if LEAST[act] > current:
            planned.append(PlannedAct("drain", nodes))
            current = nodes
        match act:
            case "node" | "head" | "shrink":
                current -= 1
            case "drain":
                current = nodes
            case "grow":
                current = nodes if current < nodes else nodes + 1
        planned.append(PlannedAct(act, current))
    return tuple(planned)


def judge(
    steps: Sequence[ReportedStep],
    acts: Sequence[DoneAct],
    crashes: Sequence[Crash] = (),
    starts: Mapping[int, RoundStart] | None = None,
    *,
    end: str = "",
    finished: bool = False,
    left: Sequence[str] = (),
) -> list[Judgement]:
    """Whether the script resumed correctly after each of ``acts``, all of which came after a step.

    ``steps``: in the order of the reports. ``end``: why no more steps follow. ``finished``: the training has finished.
    ``left``: the acts that were not carried out, because of ``end``. ``starts``: by round.
    """
    judgements = []
    for at, act in enumerate(acts):
        following = acts[at + 1] if at + 1 < len(acts) else None
        before = [step for step in steps if step.round <= act.round]
        after = [step for step in steps if act.round < step.round <= (following.round if following else math.inf)]
        own = [crash for crash in crashes if _belongs(crash, act, following)]
        judgements.append(_judge_act(act, before, after, own, starts or {}, end, finished=finished))
    why = end if steps else f"the script has reported no step; {TWO_LINES}"
    return [*judgements, *(Judgement(act, "cannot tell", (f"not done: {why}",)) for act in left)]


def exit_code(judgements: Sequence[Judgement]) -> int:
    """0 if all judgements are ok, 1 if one is bad, else 3."""
    verdicts = {judgement.verdict for judgement in judgements}
    return 1 if "bad" in verdicts else 3 if "cannot tell" in verdicts else 0


def count(number: int, thing: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _belongs(crash: Crash, act: DoneAct, following: DoneAct | None) -> bool:
    """Whether ``act`` caused ``crash``. The failure of a worker that the act itself kills does not count."""
    while_saving = act.saves and crash.round == act.round and crash.time >= act.time
    return (while_saving or crash.round > act.round) and not (following and crash.time >= following.time)


def _judge_act(
    act: DoneAct,
    before: list[ReportedStep],
    after: list[ReportedStep],
    crashes: list[Crash],
    starts: Mapping[int, RoundStart],
    end: str,
    *,
    finished: bool,
) -> Judgement:
    observed: list[tuple[Verdict, str]] = []
    for crash in crashes:
        when = f"in round {crash.round}, after the resume" if crash.round > act.round else "while it was saving"
        observed.append(("bad", f"the script failed {when}: {crash.message}"))
    history = list(before)
    for round_, group in groupby(after, key=lambda step: step.round):
        resumed = list(group)
        in_place = bool(round_ in starts and starts[round_].kept)
        observed += _resume(act, history, resumed, in_place=in_place)
        history += resumed
    if not after:
        observed.append(("cannot tell" if finished else "bad", f"no further step was reported: {end}"))
    ranks: tuple[Verdict, ...] = ("ok", "cannot tell", "bad")
    worst = max((verdict for verdict, _ in observed), key=ranks.index)
    texts = (act.what, *(text for _, text in observed))
    traceback = next((crash.traceback for crash in crashes if crash.traceback), "")
    start = starts.get(after[0].round) if after and act.act in FAULTS else None
    if start is None:
        return Judgement(act.act, worst, texts, traceback)
    return Judgement(act.act, worst, (*texts, _in_place(before[-1], after[0], start)), traceback, start.kept)


def _in_place(last: ReportedStep, first: ReportedStep, start: RoundStart) -> str:
    """Whether the workers continued in place after a fault. ``last`` came before it, ``first`` after it."""
    if start.kept:
        repeated = count(max(0, last.step - first.step + 1), "step")
        return f"in place: {start.kept} of {start.kept + start.new} workers kept their process, {repeated} repeated"
    alone = "there was no other worker" if last.world_size == 1 else ""
    return f"restarted: {last.not_in_place or alone or 'no worker could be kept; the agents say why in the output'}"


def _resume(
    act: DoneAct, history: list[ReportedStep], resumed: list[ReportedStep], *, in_place: bool
) -> list[tuple[Verdict, str]]:
    """What the steps of a round, ``resumed``, show after the steps of all previous rounds, ``history``. ``in_place``:
    workers were kept, one of which may have done the step in which rank 0 was interrupted.
    """
    origin, last, first = history[0].step, history[-1], resumed[0]
    stride = _stride([*history, *resumed])
    repeated = (last.step - first.step) // stride + 1
    if first.step <= origin < last.step:
        why = (
            "no checkpoint was loaded; if none had been saved yet, raise --steps above the interval between checkpoints"
        )
        return [("bad", f"started over with step {first.step} after step {last.step}: {why}")]
    observed: list[tuple[Verdict, str]] = []
    if in_place and first.step == last.step + 2 * stride:
        between = f"step {last.step + stride} was done by another rank, whose state was kept"
        observed.append(("ok", f"continued with step {first.step} after step {last.step}: {between}"))
    elif first.step > last.step + stride:
        observed.append(
            ("bad", f"continued with step {first.step} after step {last.step}: the steps between were never done")
        )
    elif act.saves and last.round == act.round and repeated > 0:
        what = f"was asked to save after step {last.step}, but continued with step {first.step}"
        observed.append(("bad", f"{what}: save when drain_requested() returns True"))
    else:
        counted = f"{count(repeated, 'step')} repeated" if repeated > 0 else "none repeated"
        observed.append(("ok", f"continued with step {first.step} after step {last.step}: {counted}, none skipped"))
    if first.world_size != last.world_size:
        what = "the state" if in_place else "a checkpoint"
        how = "continued with" if in_place else "was loaded by"
        observed.append(("ok", f"{what} of {count(last.world_size, 'worker')} {how} {first.world_size}"))
    return [*observed, _loss(history, resumed)]


def _loss(history: list[ReportedStep], resumed: list[ReportedStep]) -> tuple[Verdict, str]:
    """Whether the loss continues where it was: compares the median over the first steps after the resume with the
    medians over the last steps before it and over the first steps of the training.
    """
    by_step = {step.step: step.loss for step in history if step.loss is not None and step.step < resumed[0].step}
    losses = [by_step[step] for step in sorted(by_step)]
    after = [step.loss for step in resumed[:WINDOW] if step.loss is not None]
    if not losses or not after:
        return "cannot tell", "the loss is not reported; call report_progress(step, loss)"
    if not all(map(math.isfinite, after)):
        if all(map(math.isfinite, losses)):
            return "bad", f"the loss was {median(losses[-WINDOW:]):.4g} and is {after[-1]} after the resume"
        return "cannot tell", "the loss was not finite even before the fault"
    finite = [loss for loss in losses if math.isfinite(loss)]
    start, was, now = median(finite[:WINDOW]), median(finite[-WINDOW:]), median(after)
    usual = median([abs(b - a) for a, b in pairwise(finite[-5 * WINDOW :])] or [0.0])
    change = f"the loss was {was:.4g} and is {now:.4g} after the resume"
    if now - was > max(JUMP * usual, (start - was) / 2):
        return "bad", f"{change} (at the start {start:.4g}): the weights or the optimizer were not loaded"
    if start - was < usual:
        return "ok", f"{change}; it has fallen too little since the start ({start:.4g}) to judge the weights"
    return "ok", f"{change} (at the start {start:.4g})"


def continued_from_before(steps: Sequence[ReportedStep]) -> bool:
    """Whether the second of ``steps`` shows that the first one came after steps of an earlier run. A script that
    reports each tenth step begins with step 0, 9 or 10.
    """
    if len(steps) != 2 or steps[0].round != steps[1].round:
        return False
    return steps[0].step > max(1, steps[1].step - steps[0].step)


def _stride(steps: list[ReportedStep]) -> int:
    """The usual difference between two steps that the script reports."""
    return int(median([b.step - a.step for a, b in pairwise(steps) if a.round == b.round and b.step > a.step] or [1]))
