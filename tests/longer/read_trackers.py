"""What trackio, wandb and MLflow have of a run, as JSON: `python -m tests.longer.read_trackers RUN MLFLOW_URI`.

By library, the names of its live runs, and by metric the (step, value) of the last of them, with every repetition.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Points = dict[str, list[tuple[int, float]]]


def of_trackio() -> tuple[list[str], Points]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    runs = list(trackio.Api().runs("dist_train"))
    points = defaultdict(list)
    for row in SQLiteStorage.get_logs("dist_train", runs[-1].name, run_id=runs[-1].id):
        for name, value in row.items():
            if name not in ("timestamp", "step"):
                points[name].append((row["step"], value))
    return [run.name for run in runs], points


def of_mlflow(uri: str) -> tuple[list[str], Points]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("dist_train")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    assert runs[-1].data.params["batch.global_size"] == "100"
    assert runs[-1].info.status == "FINISHED"
    histories = {name: client.get_metric_history(runs[-1].info.run_id, name) for name in runs[-1].data.metrics}
    points = {name: [(each.step, each.value) for each in history] for name, history in histories.items()}
    return [run.info.run_name for run in runs], points


def of_wandb(run: Path) -> tuple[list[str], Points]:
    from wandb.proto.wandb_internal_pb2 import Record

    names: list[str] = []
    points: Points = defaultdict(list)
    for folder in sorted(run.glob("wandb/offline-run-*"), key=lambda folder: folder.stat().st_mtime):
        points.clear()
        [file] = folder.glob("run-*.wandb")
        for content in whole_records(file.read_bytes()):
            record = Record.FromString(content)
            if record.HasField("run"):
                assert record.run.run_group.startswith(f"{record.run.display_name}-")
                names.append(record.run.display_name)
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    points[name].append((record.history.step.num, json.loads(item.value_json)))
    return list(dict.fromkeys(names)), points


def whole_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a wandb file: LevelDB's log format behind a head of seven bytes; a torn end is left out."""
    place, parts = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4) and place <= len(content):
            yield parts
            parts = b""


if __name__ == "__main__":
    run, uri = sys.argv[1:]
    read: dict[str, Any] = {"trackio": of_trackio(), "wandb": of_wandb(Path(run)), "mlflow": of_mlflow(uri)}
    print(json.dumps(read))
