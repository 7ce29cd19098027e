"""A study such as a sweep leaves behind, made up: two batches, noise at two strengths, three seeds, analyses."""

from __future__ import annotations

import hashlib
import json
import math
import random
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from dist_train.config import Config, dump_config, parse_config
from dist_train.rundir.records import EvaluationRecord, EventRecord, Record, TrainRecord
from dist_train.rundir.status import Status
from tests.unit.records import write_records

BEGAN = 1_795_000_000.0


@dataclass(frozen=True)
class Treatment:
    """A variant: its settings, and what comes of it."""

    name: str
    title: str
    settings: Mapping[str, object]
    accuracy: float
    train_accuracy: float
    width: float
    epochs: int
    steps_per_epoch: int


def treatments() -> tuple[Treatment, ...]:
    """Return baseline and noise at batch 128 and 8192."""
    found = []
    for short, batch, accuracy, train, width, epochs, steps in (
        ("sb", 128, 0.912, 0.9999, 0.62, 20, 10),
        ("lb", 8192, 0.898, 0.992, 0.28, 40, 2),
    ):
        base: dict[str, object] = {"batch.global_size": batch, "run.epochs": epochs}
        found.append(Treatment(short, f"{short.upper()}, baseline", base, accuracy, train, width, epochs, steps))
        for amplitude, better, wider in ((0.03, -0.006, 0.2), (0.01, 0.004, 0.1), (0.001, 0.0006, 0.01)):
            noise = {"noise.method": "smoothout", "noise.amplitude": amplitude}
            found.append(
                Treatment(
                    f"{short}-noise-amplitude-{amplitude}",
                    f"{short.upper()}, noise, amplitude {amplitude}",
                    {**base, **noise},
                    accuracy + better,
                    train + min(0.0, better),
                    width + wider,
                    epochs,
                    steps,
                )
            )
    return tuple(found)


def make_study(directory: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> Path:
    """Write the study's folder: every run finished, but for those that a test takes away or breaks."""
    written_in, files = _files_of_study(seeds)
    directory.mkdir(parents=True)
    for folder in sorted({path.parent for path in files}):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        (directory / path).write_text(text.replace(str(written_in), str(directory)))
    return directory


@cache  # composing the settings and records takes ten times as long as writing them
def _files_of_study(seeds: tuple[int, ...]) -> tuple[Path, Mapping[Path, str]]:
    """Return the texts of the study's files by their paths in its folder, and the folder that these texts name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "study")
        _write_study(folder, seeds)
        return folder, {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.is_file()}


def _write_study(directory: Path, seeds: tuple[int, ...]) -> None:
    directory.mkdir()
    planned: list[dict[str, object]] = []
    for seed in seeds:
        for treatment in treatments():
            name = f"{treatment.name}-seed-{seed}"
            settings = {**treatment.settings, "run.name": name, "run.seed": seed}
            overrides = [f"{path}={value}" for path, value in settings.items()]
            planned.append(
                {
                    "number": len(planned) + 1,
                    "name": name,
                    "variant": treatment.name,
                    "title": treatment.title,
                    "seed": seed,
                    "settings": dict(treatment.settings),
                    "overrides": overrides,
                }
            )
            make_run(directory / name, treatment, seed, settings)
    for seed in seeds:
        _write_interpolation(directory / f"sb-seed-{seed}", directory / f"lb-seed-{seed}")
    _write_plane(directory / "lb-seed-0")
    (directory / "runs.json").write_text(json.dumps(planned, indent=2))
    (directory / "study.yaml").write_text("name: fashion\ntitle: Weight noise at batch 128 and 8192\n")


def make_run(directory: Path, treatment: Treatment, seed: int, settings: Mapping[str, object]) -> Path:
    """Write one finished run, with a landscape and its sharpness."""
    draw = random.Random(f"{treatment.name} {seed}")
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(config_of(settings)))
    records = list(_records(treatment, draw))
    write_records(directory, records)
    last = records[-1]
    digest = hashlib.sha256(directory.name.encode()).hexdigest()
    sidecar = {"sha256": digest, "bytes": 1_435_431, "step": last.step}
    (directory / "checkpoints" / f"step-{last.step:08}.json").write_text(json.dumps(sidecar))
    write_status(directory, "finished", last.step)
    checkpoint = {"path": f"checkpoints/step-{last.step:08}.pt", "sha256": digest, "step": last.step}
    _write_landscape(directory / "analysis", checkpoint, treatment, draw)
    _write_sharpness(directory / "analysis", checkpoint, treatment, draw)
    return directory


def config_of(settings: Mapping[str, object]) -> Config:
    """Return the configuration with these settings, by dotted path."""
    nested: dict[str, dict[str, object]] = {}
    for path, value in settings.items():
        section, _, name = path.partition(".")
        nested.setdefault(section, {})[name] = value
    return parse_config(nested, source="made up")


def write_status(
    directory: Path,
    state: str,
    step: int,
    reason: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
    exit_code: int = 0,
) -> None:
    """Write `status.json`."""
    status = Status(
        state=state,  # type: ignore[arg-type]
        step=step,
        epoch=float(step),
        total_steps=step,
        world_size=2,
        reason=reason,
        exit_code=exit_code,
        launch="",
        host="node1",
        pid=1,
        started="2026-11-24T12:53:12.329+00:00",
        updated="2026-11-24T12:57:09.012+00:00",
        finished="2026-11-24T12:57:09.012+00:00",
        best_accuracy=None,
        samples_per_second=None,
        environment=dict(environment),
    )
    (directory / "status.json").write_text(json.dumps(asdict(status)))


def _records(treatment: Treatment, draw: random.Random) -> list[Record]:
    records: list[Record] = []
    luck = draw.gauss(0, 0.0012)
    amplitude = float(str(treatment.settings.get("noise.amplitude", 0.0)))
    batch = int(str(treatment.settings["batch.global_size"]))
    last = treatment.epochs * treatment.steps_per_epoch
    for step in range(1, last + 1):
        epoch = step / treatment.steps_per_epoch
        done = 1 - math.exp(-4.5 * step / last)
        train = 0.1 + (treatment.train_accuracy - 0.1) * done**0.4
        seconds = batch / draw.gauss(1_900, 25)
        records.append(
            TrainRecord(
                step=step,
                epoch=epoch,
                loss=2.3 * (1 - train) + 0.004 + abs(draw.gauss(0, 0.02)),
                accuracy=train - abs(draw.gauss(0, 0.01)),
                learning_rate=0.4 * (1 + math.cos(math.pi * step / last)) / 2,
                noise_amplitude=amplitude,
                gradient_norm=0.3 + abs(draw.gauss(0, 0.05)),
                step_seconds=seconds,
                samples_per_second=batch / seconds,
                time=BEGAN + step * seconds,
            )
        )
        if step % treatment.steps_per_epoch == 0:
            wobble = draw.gauss(0, 0.004 * (1 - done) + 0.0004)
            test = 0.1 + (treatment.accuracy + luck - 0.1) * done**0.35 + wobble
            for split, accuracy, samples in (("train", train, 2_000), ("test", test, 10_000)):
                loss = max(2.3 * (1 - accuracy) ** 1.2, 0.002) * (1 if split == "train" else 1.6)
                records.append(EvaluationRecord(step, epoch, split, loss, accuracy, samples, BEGAN + step * seconds))
    details: dict[str, str | float] = {
        "path": f"step-{last:08}.pt",
        "bytes": 1_435_431,
        "seconds": 0.01,
        "stall_seconds": 0.0002,
    }
    records.append(EventRecord(last, "checkpoint", BEGAN + last, details))
    return records


def _write_landscape(
    analysis: Path, checkpoint: Mapping[str, object], treatment: Treatment, draw: random.Random
) -> None:
    folder = analysis / f"direction-{checkpoint['sha256']!s:.16}"
    folder.mkdir(parents=True)
    lines = ["direction,alpha,beta,split,loss,accuracy"]
    for direction in range(2):
        steep = 0.4 / (treatment.width * draw.gauss(1, 0.06))
        for index in range(41):
            alpha = round(-1 + index / 20, 12)
            for split, floor, top in (("train", 0.012, treatment.train_accuracy), ("test", 0.38, treatment.accuracy)):
                loss = floor + 1.2 * (steep * abs(alpha)) ** 2.6
                accuracy = 0.1 + (top - 0.1) * math.exp(-0.35 * (steep * abs(alpha)) ** 2.6)
                lines.append(f"{direction},{alpha},0.0,{split},{loss},{accuracy}")
    (folder / "points.csv").write_text("\n".join(lines) + "\n")
    widths = {
        "A": {
            factor: {"mean": treatment.width * share + draw.gauss(0, 0.01), "open": 0, "directions": []}
            for factor, share in (("2", 0.6), ("10", 1.0))
        }
    }
    settings = {"format": 1, "points": 41, "statistics": "recomputed", "normalization": "filter", "directions": 2}
    fields = {"kind": "direction", "checkpoints": [checkpoint], "settings": settings, "widths": widths}
    (folder / "settings.json").write_text(json.dumps(fields))


def _write_interpolation(first: Path, second: Path) -> None:
    folder = first / "analysis" / "interpolate-0123456789abcdef"
    folder.mkdir()
    lines = ["direction,alpha,beta,split,loss,accuracy"]
    for index in range(41):
        alpha = round(-0.5 + index / 20, 12)
        near, far = abs(alpha) ** 2, abs(1 - alpha) ** 2
        loss = 6 * near * far * (1 + alpha / 2)
        for split, floor in (("train", 0.01), ("test", 0.3)):
            lines.append(f"0,{alpha},0.0,{split},{floor + loss},{max(0.1, 0.95 - floor / 10 - loss / 4)}")
    (folder / "points.csv").write_text("\n".join(lines) + "\n")
    checkpoints = []
    for run in (first, second):
        [sidecar] = (run / "checkpoints").glob("*.json")
        fields = json.loads(sidecar.read_text())
        checkpoints.append(
            {"path": str(sidecar.with_suffix(".pt")), "sha256": fields["sha256"], "step": fields["step"]}
        )
    settings = {"kind": "interpolate", "checkpoints": checkpoints, "settings": {"points": 41}, "widths": {}}
    (folder / "settings.json").write_text(json.dumps(settings))


def _write_plane(run: Path) -> None:
    folder = run / "analysis" / "plane-0123456789abcdef"
    folder.mkdir()
    (folder / "points.csv").write_text("direction,alpha,beta,split,loss,accuracy\n0,0.0,0.0,train,0.1,0.9\n")
    [sidecar] = (run / "checkpoints").glob("*.json")
    checkpoint = {"path": str(sidecar), "sha256": json.loads(sidecar.read_text())["sha256"], "step": 80}
    fields = {"kind": "plane", "checkpoints": [checkpoint], "settings": {}, "widths": {}}
    (folder / "settings.json").write_text(json.dumps(fields))
    picture = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 30"><circle cx="20" cy="15" r="9"/></svg>'
    (folder / "figure.svg").write_text(picture)


def _write_sharpness(
    analysis: Path, checkpoint: Mapping[str, object], treatment: Treatment, draw: random.Random
) -> None:
    sharp = 1 / treatment.width**2
    fields = {
        "checkpoint": checkpoint,
        "data": {"samples": 2_000, "sha256": "0" * 64},
        "settings": {"samples": 2_000, "seed": 0},
        "weights": 44_386,
        "loss": 0.01,
        "accuracy": treatment.train_accuracy,
        "keskar": {"full": 9 * sharp * draw.gauss(1, 0.1), "subspace": 0.7 * sharp * draw.gauss(1, 0.1)},
        "expected_rise": [
            {"amplitude": size, "mean": 2 * size * sharp * draw.gauss(1, 0.05), "standard_error": 0.002, "draws": 8}
            for size in (0.01, 0.1)
        ],
        "hessian": {
            "eigenvalues": [14 * sharp * draw.gauss(1, 0.08), 6 * sharp],
            "trace": 190 * sharp * draw.gauss(1, 0.05),
            "trace_standard_error": 3.0,
        },
    }
    digest = f"{checkpoint['sha256']!s:.16}"
    (analysis / f"sharpness-{digest}.json").write_text(json.dumps(fields))
