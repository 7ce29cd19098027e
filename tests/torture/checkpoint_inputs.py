"""Damaged and forged checkpoints."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path

import torch
from hypothesis import strategies as st

from dist_train.checkpoint.files import Contents, read_checkpoint, write_checkpoint
from dist_train.config import Config
from dist_train.outcome import UsageError
from tests.torture.kind import Call, Kind, refused
from tests.torture.mutation import mutated


def _saved(folder: Path) -> tuple[Path, Contents]:
    model = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2)}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    config = Config().model_dump(mode="json")
    contents = Contents(7, 1.5, model, optimizer, config, {"best_accuracy": 0.5})
    return write_checkpoint(folder, contents, lambda: None).path, contents


def _is_equal(found: Contents, contents: Contents) -> bool:
    return (
        found.step == contents.step
        and all(torch.equal(found.model[name], tensor) for name, tensor in contents.model.items())
        and found.config == contents.config
    )


def checkpoints(folder: Path) -> Kind:
    path, contents = _saved(folder)
    whole, record = path.read_bytes(), path.with_suffix(".json").read_bytes()
    pairs = st.one_of(
        st.tuples(mutated(whole), st.just(record)),
        st.tuples(st.just(whole), mutated(record)),
        st.tuples(mutated(whole), mutated(record)),
    )

    def check(pair: object) -> bool:
        assert isinstance(pair, tuple)
        path.write_bytes(pair[0])
        path.with_suffix(".json").write_bytes(pair[1])
        try:
            found = read_checkpoint(path)
        except UsageError as error:
            return refused(error)
        assert _is_equal(found, contents), "weights differ from the saved ones"
        return True

    return Kind("checkpoints", pairs, check)


def forged_checkpoints(folder: Path) -> Kind:
    """Checkpoints of an attacker, whose records match their contents."""
    path, contents = _saved(folder)
    whole = path.read_bytes()
    marker = folder / "ran"
    hostile = [
        pickle.dumps(Call(marker), protocol=2),
        pickle.dumps({"format": 1, "step": Call(marker)}, protocol=2),
        *(_serialized({**contents.to_dict(), **changed}) for changed in _FORGERIES),
        _serialized([1, 2]),
        _serialized({}),
        _unsafe(Call(marker)),
    ]

    def check(content: object) -> bool:
        assert isinstance(content, bytes)
        path.write_bytes(content)
        record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "step": 7, "epoch": 1.5}
        path.with_suffix(".json").write_text(json.dumps({**record, "metrics": {}}))
        try:
            read_checkpoint(path)
        except UsageError as error:
            return refused(error)
        finally:
            assert not marker.exists(), "code was run from a checkpoint"
        return True

    return Kind("forged checkpoints", st.one_of(mutated(whole), mutated(whole), st.sampled_from(hostile)), check)


_FORGERIES: tuple[dict[str, object], ...] = (
    {"format": 2},
    {"step": "7"},
    {"step": -1},
    {"epoch": None},
    {"model": [1]},
    {"model": {"weight": "text"}},
    {"optimizer": 3},
    {"config": "text"},
    {"metrics": [1]},
)


def _serialized(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unsafe(call: Call) -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": 1, "model": call}, buffer)
    return buffer.getvalue()
