"""Facts of a run as text: rates, remaining time, records as lines. Does not import rich, to keep the exporter small."""

from __future__ import annotations

import math
from collections import deque

from dist_train.outcome import escaped
from dist_train.rundir.records import EvaluationRecord, EventRecord, RunFacts, TrainRecord


def duration(seconds: float) -> str:
    """Return `seconds` as 2:31, 1:02:31 or 3d 04:05:06."""
    if not math.isfinite(seconds):
        return "not finite"
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86_400)
    hours, rest = divmod(rest, 3_600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(share: float) -> str:
    """Return a fraction in [0, 1] as 87.41 %."""
    return f"{share * 100:.2f} %" if math.isfinite(share) else "not finite"


def rate(per_second: float) -> str:
    """Return a rate with at least three digits: 1,234 or 12.3."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def epochs(number: float) -> str:
    """Return a number of epochs with at least four digits: 2.125 or 19,500."""
    return f"{number:.4g}" if number < 1000 else f"{number:,.0f}"


def plural(number: int, word: str) -> str:
    """Return `number` with `word` in the singular or plural."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}{'es' if word.endswith('ch') else 's'}"


def current_epoch(facts: RunFacts, step: int) -> str:
    """Return the epoch of update number `step` and the number of epochs: 3/30, counted from 1."""
    return f"{max(1, math.ceil(facts.passes.done(step)))}/{math.ceil(facts.epochs)}"


def introduction(facts: RunFacts) -> tuple[str, ...]:
    """Return the lines that introduce a run: model, data, batch and schedule."""
    to_come = (stage for stage in facts.stages[1:] if stage.step > facts.start_step)
    sizes = ", ".join(f"{stage.global_size:,} from epoch {stage.epoch + 1}" for stage in to_come)
    lines = [
        f"{facts.name}: {facts.data}; {facts.model}, {plural(facts.parameters, 'trainable parameter')}; "
        f"noise {facts.noise}",
        f"batch {facts.global_size:,} as {plural(facts.micro_batches, 'micro-batch')} of {facts.micro_size:,} on "
        f"{plural(facts.world_size, 'rank')} ({facts.controller}), "
        f"{epochs(facts.epochs)} epoch{'' if facts.epochs == 1 else 's'} of "
        f"{plural(facts.steps_per_epoch, 'step')}, {plural(facts.total_steps, 'step')} in all",
    ]
    if sizes:
        lines.append(f"then batches of {sizes}")
    if facts.device:
        lines.append(f"on {facts.device}")
    if facts.start_step:
        lines.append(f"resuming from step {facts.start_step:,}")
    if facts.start_step >= facts.total_steps:
        lines.append("all steps are done: set another run.name to train anew, or raise run.epochs or run.max_steps")
    return tuple(map(escaped, lines))


def evaluation(facts: RunFacts, record: EvaluationRecord) -> str:
    """Return an evaluation as one line."""
    return (
        f"epoch {epochs(facts.passes.done(record.step)):>4}  step {record.step:>6,}  {escaped(record.split):<5}  "
        f"loss {record.loss:.4f}  accuracy {percent(record.accuracy)}"
    )


def event(record: EventRecord) -> str:
    """Return an event as one line."""
    details = escaped(
        ", ".join(f"{value}" if name == "reason" else f"{name} {value}" for name, value in record.details.items())
    )
    name = escaped(record.event.replace("_", " "))
    return f"step {record.step:,}: {name} ({details})" if details else f"step {record.step:,}: {name}"


_MARK_SECONDS = 1.0
_MARKS = 61


class Pace:
    """Seconds per sample, or per epoch, over the last minute or more, including all that happens between steps."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, float]] = deque(maxlen=_MARKS)
        """Times, and samples or epochs done, a second or more apart, but for the latest."""

    def mark(self, done: float, now: float) -> None:
        """Note that `done` samples, or epochs, were done at `now`, in seconds."""
        if self._marks and now < self._marks[-1][0]:  # the clock was set back
            self._marks.clear()
        if len(self._marks) > 1 and self._marks[-1][0] - self._marks[-2][0] < _MARK_SECONDS:
            self._marks.pop()
        self._marks.append((now, done))

    def seconds_left(self, total: float) -> float | None:
        """Return the seconds until `total` samples, or epochs, are done; None before two different marks."""
        if not self._marks:
            return None
        (begun, first), (now, last) = self._marks[0], self._marks[-1]
        return max(0, total - last) * ((now - begun) / (last - first)) if last > first else None


def update(facts: RunFacts, record: TrainRecord, pace: Pace) -> str:
    """Return an update as one line, with the time left if `pace` is known."""
    left = pace.seconds_left(facts.planned_samples)
    return (
        f"epoch {current_epoch(facts, record.step)}  step {record.step:,}/{facts.total_steps:,}  "
        f"loss {record.loss:.4f}  accuracy {percent(record.accuracy)}  {rate(record.samples_per_second)} images/s"
        + ("" if left is None else f"  {duration(left)} left")
    )
