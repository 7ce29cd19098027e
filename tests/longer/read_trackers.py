"""The data of a run in trackio, wandb and MLflow, as JSON: `python -m tests.longer.read_trackers RUN MLFLOW_URI`.

For each library the names of its runs, and all (step, value) of the last one, by metric.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Points = dict[str, list[tuple[int, float]]]


def read_trackio() -> tuple[list[str], Points]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    runs = list(trackio.Api().runs("dist_train"))
    points = defaultdict(list)
    for row in SQLiteStorage.get_logs("dist_train", runs[-1].name, run_id=runs[-1].id):
        for name, value in row.items():
            if name not in ("timestamp", "step"):
                points[name].append((row["step"], value))
    return [run.name for run in runs], points


def read_mlflow(uri: str) -> tuple[list[str], Points]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("dist_train")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    assert runs[-1].data.params["batch.global_size"] == "100"
    assert runs[-1].info.status == "FINISHED"
    histories = {name: client.get_metric_history(runs[-1].info.run_id, name) for name in runs[-1].data.metrics}
    points = {name: [(each.step, each.value) for each in history] for name, history in histories.items()}
    return [run.info.run_name for run in runs], points


def read_wandb(run: Path) -> tuple[list[str], Points]:
    from wandb.proto.wandb_internal_pb2 import Record

    names: list[str] = []
    points: Points = defaultdict(list)
    for folder in sorted(run.glob("wandb/offline-run-*"), key=lambda folder: folder.stat().st_mtime):
        points.clear()
        [file] = folder.glob("run-*.wandb")
        for content in complete_records(file.read_bytes()):
            record = Record.FromString(content)
            if record.HasField("run"):
                assert record.run.run_group.startswith(f"{record.run.display_name}-")
                names.append(record.run.display_name)
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    points[name].append((record.history.step.num, json.loads(item.value_json)))
    return list(dict.fromkeys(names)), points


def complete_records(content: bytes) -> Iterator[bytes]:
    """Yield the complete records of a wandb file: LevelDB's log format after a header of seven bytes."""
    position, parts = 7, b""
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        size, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4) and position <= len(content):
            yield parts
            parts = b""


if __name__ == "__main__":
    run, uri = sys.argv[1:]
    found: dict[str, Any] = {"trackio": read_trackio(), "wandb": read_wandb(Path(run)), "mlflow": read_mlflow(uri)}
    print(json.dumps(found))
