"""Data sets and augmentations of a user's: read lazily, drawn by (seed, epoch, sample), mistakes named."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from dist_train.config import DataSettings
from dist_train.data import loader
from dist_train.data.decoding import Work
from dist_train.data.images import BatchRequest, ImageSet, Split
from dist_train.data.loader import Splits, open_splits, training_labels
from dist_train.data.plugin_samples import PluginSamples
from dist_train.outcome import UsageError
from tests.raising import raises
from tests.unit.drawing_data import SIZE, Drawing
from tests.unit.image_folders import write_folder
from tests.unit.image_sets import write_arrays, write_shards

CPU = torch.device("cpu")
HERE = "tests.unit.drawing_data"
OWN: dict[str, Any] = {"name": f"{HERE}:drawing", "shape": (3, SIZE, SIZE), "classes": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"))


def opened(seed: int = 5, **values: object) -> Splits:
    return open_splits(DataSettings.model_validate(values), seed, CPU)


def read(splits: Splits, indices: Sequence[int], epoch: int | None, split: Split = "train") -> torch.Tensor:
    images: torch.Tensor = splits.of(split).read(BatchRequest(torch.tensor(indices), epoch))[0]
    return images


def test_a_data_set_is_read_when_samples_are_due() -> None:
    splits = opened(**OWN)
    source = splits.train._decoder._reader._opened["train"]  # type: ignore[attr-defined]
    before = source.readings
    assert before <= 16, "those that are tried at the start"
    read(splits, [3, 4, 5], 0)
    assert source.readings == before + 3
    images, labels = splits.test.read(BatchRequest(torch.arange(24)))
    assert labels.tolist() == [0, 1] * 12
    assert images.shape == (24, 3, SIZE, SIZE)


def test_promise_2_draws_depend_on_seed_epoch_and_sample_alone(root: Path) -> None:
    folder: dict[str, Any] = {
        "name": "imagefolder",
        "root": root,
        "classes": 3,
        "image_size": SIZE,
        "augment": f"{HERE}:erased",
    }
    for values in (OWN, {**OWN, "augment": f"{HERE}:erased"}, {**OWN, "augment": "crop-flip"}, folder):
        splits = opened(**values)
        first = read(splits, [7, 2, 9], 3)
        assert torch.equal(read(splits, [9], 3)[0], first[2])
        assert torch.equal(read(splits, [2, 7], 3), first[[1, 0]])
        assert not torch.equal(read(splits, [7, 2, 9], 4), first)
        assert torch.equal(read(splits, [4], 2, "test"), read(splits, [4], None, "test"))
        assert not torch.equal(read(opened(6, **values), [7, 2, 9], 3), first)


def test_the_program_s_own_draws_are_not_disturbed() -> None:
    splits = opened(**OWN)
    torch.default_generator.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = torch.rand(2), random.random(), np.random.random()
    torch.default_generator.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    read(splits, [1, 2], 0)
    assert torch.equal(torch.rand(2), expected[0])
    assert (random.random(), np.random.random()) == expected[1:]


def test_images_that_are_drawn_alike_for_both_splits_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    opened(5, **{**OWN, "name": f"{HERE}:generated"})
    assert [f" train and test of {HERE}:generated " in message for message in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("values", "names", "split"),
    [
        ({"augment": f"{HERE}:mirrored"}, f"{HERE}:drawing or {HERE}:mirrored", "train"),
        ({"name": f"{HERE}:mirroring"}, f"{HERE}:mirroring", "test"),
    ],
)
def test_draws_from_a_generator_of_the_code_s_own_are_warned_of(
    values: dict[str, str], names: str, split: str, caplog: pytest.LogCaptureFixture
) -> None:
    opened(**{**OWN, **values})
    assert [f" of {names} ({split}) " in message for message in caplog.messages] == [True]


def test_promise_2_a_data_set_is_divided_by_the_seed_alone_into_parts_without_a_common_sample(
    caplog: pytest.LogCaptureFixture,
) -> None:
    halves: dict[str, Any] = {**OWN, "name": f"{HERE}:halves", "augment": f"{HERE}:raised"}

    def colours(splits: Splits, epoch: int | None, split: Split = "train") -> list[int]:
        found: list[int] = read(splits, range(24), epoch, split)[:, 0, 0, 0].mul(255).round().int().tolist()
        return found

    seen = []
    for seed in (5, 5, 6):
        splits = opened(seed, **halves)
        train, test = colours(splits, None), colours(splits, None, "test")
        assert sorted(train + test) == list(range(48))
        seen.append((train, test, colours(splits, 0)))
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
    assert not caplog.records
    # as a loader process, which opens the data set when it makes the first sample
    pixels, labels = np.empty((1, 3, SIZE, SIZE), np.uint8), np.empty(1, np.int64)
    for index in (3, 20):
        loader = PluginSamples(DataSettings.model_validate(halves), 5, {})
        loader.read(Work([index], split="train", numbers=[index], epoch=0), pixels, labels)
        assert pixels[0, 0, 0, 0] == seen[0][2][index]


def test_what_is_held_in_memory_and_parts_of_files_are_augmented_alike(root: Path, tmp_path: Path) -> None:
    """The same pixels in one order give the same draws; arrays are as large as the crop that files are cut to."""
    arrays = write_arrays(tmp_path / "arrays", root, 3, SIZE, 5)
    held: dict[str, Any] = {"name": "numpy", "root": arrays, "classes": 3, "shape": (3, SIZE, SIZE)}
    plain = opened(**held)
    whole = opened(**held, augment=f"{HERE}:erased", augment_options={"chance": 0.0}, normalize=True)
    assert not torch.equal(read(whole, [1, 2], 0), read(whole, [1, 2], 1))
    assert torch.equal(read(plain, [1, 2], None), read(opened(**held, augment=f"{HERE}:erased"), [1, 2], None))
    folder: dict[str, Any] = {"root": root, "classes": 3, "image_size": SIZE, "augment": f"{HERE}:erased"}
    shards: dict[str, Any] = {**folder, "name": "webdataset", "root": write_shards(tmp_path / "shards", root, 3)}
    assert torch.equal(read(opened(**shards), [3, 1], 2), read(opened(**folder, name="imagefolder"), [3, 1], 2))


def test_the_images_by_which_inputs_are_normalized_are_chosen_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "STATISTICS_SAMPLES", 10)
    monkeypatch.setattr(Drawing, "__getitem__", lambda self, index: (torch.full((3, SIZE, SIZE), index).byte(), 0))
    found = [opened(seed, **OWN, normalize=True).normalization for seed in (5, 5, 6)]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_what_is_held_out_of_a_data_set_is_not_trained_on() -> None:
    splits = opened(**OWN, validation_size=6, train_size=12)
    samples = [splits.train, splits.of("validation")]
    indices = [each._listing.numbers.tolist() for each in samples]  # type: ignore[attr-defined]
    assert [len(each) for each in indices] == [12, 6]
    assert not set(indices[0]) & set(indices[1])
    for each, count in zip(samples, (6, 3), strict=True):
        assert each.read(BatchRequest(torch.arange(len(each))))[1].bincount().tolist() == [count, count]
    held = read(splits, [0, 1], 3, "validation")
    assert torch.equal(held, read(splits, [0, 1], None, "validation"))
    assert not torch.equal(held, read(splits, [0, 1], None))


@pytest.mark.parametrize("held", [torch.full((3, SIZE, SIZE), 55).byte(), np.full((3, SIZE, SIZE), 55, np.uint8)])
def test_a_transform_that_writes_to_its_image_does_not_change_the_data_set(
    held: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Drawing, "__getitem__", lambda self, index: (held[:], 0))
    splits = opened(**OWN, augment=f"{HERE}:inverted")
    for epoch, pixel in ((0, 200), (1, 200), (None, 55)):
        assert read(splits, [0], epoch).mul(255).round().unique().tolist() == [pixel]
    assert held[0, 0, 0] == 55


def test_a_subset_is_balanced_by_the_labels_or_the_targets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    splits = opened(**OWN, train_size=8)
    assert "all 24 samples" in caplog.text
    _, labels = splits.train.read(BatchRequest(torch.arange(8)))
    assert labels.bincount().tolist() == [4, 4]
    assert torch.equal(training_labels(DataSettings.model_validate({**OWN, "train_size": 8}), 5), labels)
    from tests.unit import drawing_data

    monkeypatch.setattr(drawing_data.Drawing, "targets", [1, 0] * 12, raising=False)
    caplog.clear()
    assert training_labels(DataSettings.model_validate(OWN), 5).tolist() == [1, 0] * 12
    assert not caplog.text
    unusable: tuple[object, ...] = (["cat", "dog"] * 12, [[0], [0, 1]] * 12, 24, property(lambda self: 1 / 0))
    for targets in unusable:
        monkeypatch.setattr(drawing_data.Drawing, "targets", targets)
        assert training_labels(DataSettings.model_validate(OWN), 5).tolist() == [0, 1] * 12


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"augment": f"{HERE}:failing"}, "plugin-failed"),
        ({"augment": f"{HERE}:floats"}, "plugin-data-form"),
        ({"augment": f"{HERE}:nothing"}, "plugin-result"),
        ({"name": f"{HERE}:broken", "options": {"index": 0, "how": "label"}}, "plugin-data-form"),
        ({"name": f"{HERE}:broken", "options": {"index": 0, "how": "shape"}}, "plugin-data-form"),
        ({"name": f"{HERE}:broken", "options": {"index": 0, "how": "float"}}, "plugin-data-form"),
        ({"name": f"{HERE}:broken", "options": {"index": 0, "how": "raises"}}, "plugin-failed"),
        ({"name": f"{HERE}:nothing"}, "plugin-result"),
    ],
)
def test_a_mistake_in_the_code_is_found_before_the_first_step(
    values: dict[str, Any], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.unit import drawing_data

    if values.get("name") == f"{HERE}:nothing":
        monkeypatch.setattr(drawing_data, "nothing", lambda settings, split, seed: None)
    with raises(UsageError, code):
        opened(**{**OWN, **values})


@pytest.mark.parametrize(
    "label", [1, np.uint8(1), np.array(1), np.array([1]), [1], torch.tensor(1), torch.tensor(1, dtype=torch.int16)]
)
def test_labels_may_be_whole_numbers_of_any_kind(label: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drawing, "__getitem__", lambda self, index: (torch.zeros(3, SIZE, SIZE).byte(), label))
    splits = opened(**OWN)
    assert splits.train.read(BatchRequest(torch.tensor([0])))[1].tolist() == [1]


@pytest.mark.parametrize(
    "label", [0.9, 1.0, "1", None, True, np.float32(1), np.array([1, 0]), torch.tensor(1.0), torch.tensor([])]
)
def test_labels_that_are_not_whole_numbers_are_refused(label: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drawing, "__getitem__", lambda self, index: (torch.zeros(3, SIZE, SIZE).byte(), label))
    with raises(UsageError, "plugin-data-form") as refused:
        opened(**OWN)
    assert f"sample 0 of {HERE}:drawing (train)" in str(refused.value)
    if isinstance(label, np.ndarray):
        assert "the label int64 of [2]" in str(refused.value)


def test_a_data_set_whose_length_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drawing, "__len__", lambda self: 1 // 0)
    with raises(UsageError, "plugin-failed") as refused:
        opened(**OWN)
    assert "ZeroDivisionError" in str(refused.value)


class Stream(IterableDataset[tuple[torch.Tensor, int]]):
    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return iter(Drawing(24))


def test_a_data_set_that_can_only_be_iterated_over_is_refused_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit import drawing_data

    monkeypatch.setattr(drawing_data, "nothing", lambda settings, split, seed: Stream())
    with raises(UsageError, "plugin-result") as refused:
        opened(**{**OWN, "name": f"{HERE}:nothing"})
    assert "returned Stream for train" in str(refused.value)
    assert "map-style" in str(refused.value)


def test_an_image_set_of_other_types_names_them() -> None:
    images, labels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    for wrong in (images.float(), images.numpy()):
        with pytest.raises(AssertionError, match=r"not torch\.uint8"):
            ImageSet(wrong, labels, 2)  # type: ignore[arg-type]  # a usual mistake
    with pytest.raises(AssertionError, match=r"int32, not torch\.int64"):
        ImageSet(images, labels.int(), 2)
    with pytest.raises(AssertionError, match=r"\[1\] labels, 2 images"):
        ImageSet(images, labels[:1], 2)


def test_a_data_set_whose_file_has_moved_is_the_same(tmp_path: Path) -> None:
    def identity(folder: str, name: str) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / folder / "mine.py"
        file.write_text(f"from {HERE} import Drawing\none = two = lambda settings, split, seed: Drawing(24)")
        return opened(**{**OWN, "name": f"{file}:{name}"}).identity

    assert identity("before", "one") == identity("now", "one")
    assert identity("before", "one") != identity("before", "two")


def test_a_data_set_without_samples_is_refused() -> None:
    with raises(UsageError, "data-counts"):
        opened(**OWN, options={"test": 0})


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ({"image": 0, "label": 1}, "returned dict, not"),
        ((0, 1, "name"), "returned tuple of length 3,"),
        (torch.tensor(7), "returned Tensor, not"),
        (7, "returned int, not"),
    ],
)
def test_a_sample_that_is_no_pair_is_named_with_what_it_is(
    monkeypatch: pytest.MonkeyPatch, returned: object, told: str
) -> None:
    monkeypatch.setattr(Drawing, "__getitem__", lambda self, index: returned)
    with raises(UsageError, "plugin-data-form") as refused:
        read(opened(**OWN), [0], 0)
    assert told in str(refused.value)
    assert "(image, label)" in str(refused.value)


@pytest.mark.parametrize(("how", "code"), [("shape", "plugin-data-form"), ("raises", "plugin-failed")])
def test_a_mistake_in_a_later_sample_names_it(how: str, code: str) -> None:
    name = f"{HERE}:broken"
    splits = opened(**{**OWN, "name": name, "options": {"index": 13, "how": how}})
    read(splits, range(12), 0)
    with raises(UsageError, code) as error:
        read(splits, range(12, 24), 0)
    assert f"sample 13 of {name} (train)" in str(error.value)


def test_a_mistake_in_another_file_than_the_plug_in_s_has_a_line(tmp_path: Path) -> None:
    (tmp_path / "pictures.py").write_text("""
class Pictures:
    def __len__(self): return 4
    def __getitem__(self, index):
        import json
        return json.loads("{"), 0
""")
    (tmp_path / "mine.py").write_text("""
from pictures import Pictures
def data(settings, split, seed): return Pictures()
""")
    with raises(UsageError, "plugin-failed") as failed:
        opened(**{**OWN, "name": f"{tmp_path / 'mine.py'}:data"})
    assert "failed at pictures.py:6: JSONDecodeError" in str(failed.value)


@pytest.mark.parametrize("image", [torch.zeros(3, SIZE, SIZE, dtype=torch.bfloat16), [[0], [0, 1]], None])
def test_an_image_that_is_no_array_is_refused(image: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drawing, "__getitem__", lambda self, index: (image, 0))
    with raises(UsageError, "plugin-data-form") as refused:
        opened(**OWN)
    assert f"sample 0 of {HERE}:drawing (train) is {type(image).__name__}" in str(refused.value)


@pytest.mark.parametrize("mode", ["P", "1"])
def test_an_image_whose_values_are_not_colours_is_refused(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("L", (SIZE, SIZE), 7)
    monkeypatch.setattr(Drawing, "__getitem__", lambda self, index: (image, 0))
    own = {**OWN, "shape": (1, SIZE, SIZE)}
    assert read(opened(**own), [0], None).unique().numel() == 1
    image = image.convert(mode)
    with raises(UsageError, "plugin-data-form") as refused:
        opened(**own)
    assert "convert('L')" in str(refused.value)


@pytest.mark.parametrize(("mode", "wanted"), [("L", "RGB"), ("RGBA", "RGB"), ("RGB", "L")])
def test_a_pil_image_of_another_mode_is_refused_with_how_to_convert_it(
    mode: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new(mode, (SIZE, SIZE))
    monkeypatch.setattr(Drawing, "__getitem__", lambda self, index: (image, 0))
    with raises(UsageError, "plugin-data-form") as refused:
        opened(**{**OWN, "shape": (len(wanted), SIZE, SIZE)})
    assert f"convert('{wanted}')" in str(refused.value)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_arrays_and_tensors_may_have_their_channels_first_or_last(as_tensor: bool) -> None:
    shape = (3, SIZE, SIZE + 1)
    values: dict[str, Any] = {"name": "synthetic", "synthetic_shape": shape, "synthetic_samples": 8}
    expected = read(opened(**values), [0, 1], 0)

    def with_axes(*axes: int) -> Splits:
        return opened(**values, augment=f"{HERE}:as_array", augment_options={"axes": axes, "as_tensor": as_tensor})

    for axes in ((0, 1, 2), (1, 2, 0)):
        assert torch.equal(read(with_axes(*axes), [0, 1], 0), expected)
    with raises(UsageError, "plugin-data-form") as refused:
        with_axes(0, 2, 1)
    assert f"uint8 of {[3, SIZE + 1, SIZE]}, not uint8 of {list(shape)}" in str(refused.value)


@pytest.mark.parametrize("image", [np.full((SIZE, SIZE), 7, np.uint8), torch.full((SIZE, SIZE), 7).byte()])
def test_a_grey_image_needs_no_axis_of_channels(image: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drawing, "__getitem__", lambda self, index: (image, 0))
    assert read(opened(**{**OWN, "shape": (1, SIZE, SIZE)}), [0], None).shape == (1, 1, SIZE, SIZE)


def test_the_documented_transform_works(root: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    [content] = re.findall(r"```python\n# transforms\.py\n(.*?)```", page, re.DOTALL)
    (tmp_path / "transforms.py").write_text(content)
    folder: dict[str, Any] = {"name": "imagefolder", "root": root, "classes": 3, "image_size": SIZE}
    augment: dict[str, Any] = {"augment": f"{tmp_path / 'transforms.py'}:strong", "augment_options": {"magnitude": 7}}
    splits = opened(**folder, **augment)
    assert not torch.equal(read(splits, [1, 2], 0), read(splits, [1, 2], 1))


def test_a_damaged_image_that_pillow_reads_late_names_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)).save(file, "PNG")
    half = file.getvalue()[: file.tell() // 2]
    monkeypatch.setattr(Drawing, "__getitem__", lambda self, index: (Image.open(io.BytesIO(half)), 0))
    monkeypatch.setattr(loader, "_try_samples", lambda *_: None)
    splits = opened(**OWN, augment=f"{HERE}:erased")
    with raises(UsageError, "plugin-failed") as failed:
        read(splits, [3], 0)
    assert f"sample 3 of {HERE}:drawing (train)" in str(failed.value)
    assert "truncated" in str(failed.value)
