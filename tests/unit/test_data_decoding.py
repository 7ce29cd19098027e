from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from torchvision import transforms
from torchvision.transforms import functional

from dist_train.data.decoding import ATTEMPTS, DRAWS, random_box
from dist_train.outcome import CodedError, FaultError, UsageError
from dist_train.reproducible import key, uniform
from tests.raising import raises
from tests.unit.image_folders import damage, write_image
from tests.unit.image_sets import decode

SIDES = st.integers(1, 3000)
UNIT = st.floats(0, 1, exclude_max=True, width=32)


def draws_of(sample: int) -> list[float]:
    values: list[float] = uniform(key(3, "test"), torch.arange(sample * DRAWS, (sample + 1) * DRAWS)).tolist()
    return values


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 301), (97, 97), (500, 375), (20, 31)])
def test_without_augmentation_an_image_is_what_torchvision_makes_of_it(tmp_path: Path, width: int, height: int) -> None:
    write_image(tmp_path / "a.png", width, height, seed=1)
    usual = transforms.Compose([transforms.Resize(73), transforms.CenterCrop(64)])
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(usual(image)).transpose(2, 0, 1).astype(int)
    found = decode(str(tmp_path / "a.png"), 64, None)
    assert found.dtype == np.uint8
    assert found.shape == (3, 64, 64)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("sample", range(6))
def test_an_augmented_image_is_torchvision_s_resized_crop_of_the_random_box(tmp_path: Path, sample: int) -> None:
    write_image(tmp_path / "a.png", 80, 60, seed=1)
    draws = draws_of(sample)
    left, top, right, bottom = random_box(80, 60, draws)
    with Image.open(tmp_path / "a.png") as image:
        cut = functional.resized_crop(image, top, left, bottom - top, right - left, [32, 32])
        expected = functional.hflip(cut) if draws[-1] < 0.5 else cut
    assert np.array_equal(decode(str(tmp_path / "a.png"), 32, draws), np.asarray(expected).transpose(2, 0, 1))


@settings(deadline=None, max_examples=200)
@given(SIDES, SIDES, st.lists(UNIT, min_size=DRAWS, max_size=DRAWS))
def test_a_random_box_lies_within_the_image(width: int, height: int, draws: list[float]) -> None:
    left, top, right, bottom = random_box(width, height, draws)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_boxes_have_the_areas_aspects_and_places_they_are_said_to_have() -> None:
    boxes = np.array([random_box(400, 400, draws_of(sample)) for sample in range(3000)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, aspects = wide * high / 160000, wide / high
    assert 0.07 < areas.min() < 0.1
    assert 0.9 < areas.max() <= 1
    assert 0.74 < aspects.min() < 0.77
    assert 1.3 < aspects.max() < 1.35
    assert abs(np.log(aspects).mean()) < 0.02
    room = wide < 400
    assert abs((boxes[room, 0] / (400 - wide[room])).mean() - 0.5) < 0.03
    # Attempts that do not fit are drawn again, so that large areas are rarer than uniform ones.
    assert 0.45 < areas.mean() < 0.54


def test_half_of_the_images_are_mirrored() -> None:
    assert 0.45 < np.mean([draws_of(sample)[-1] < 0.5 for sample in range(2000)]) < 0.55


def test_where_no_attempt_fits_the_centre_is_taken() -> None:
    largest = [0.99] * (2 * ATTEMPTS) + [0.0, 0.0, 0.0]
    assert random_box(1000, 30, largest) == (480, 0, 520, 30)
    assert random_box(30, 1000, largest) == (0, 480, 30, 520)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "LA"])
@pytest.mark.parametrize("draws", [None, draws_of(0)], ids=["plain", "augmented"])
def test_images_of_any_mode_come_as_three_channels(tmp_path: Path, mode: str, draws: list[float] | None) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (30, 20), (10, 200, 30)).convert(mode).save(path)
    assert decode(str(path), 8, draws).shape == (3, 8, 8)


@pytest.mark.parametrize(("suffix", "kind"), [("png", np.uint16), ("tif", np.uint16), ("tif", np.float32)])
def test_images_of_more_than_8_bits_are_refused(tmp_path: Path, suffix: str, kind: type[np.generic]) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.full((9, 9), 3000, kind)).save(path)
    for reference in (str(path), (str(path), 0, path.stat().st_size, f"{path}, sample 0")):
        with raises(UsageError, "image-depth") as refused:
            decode(reference, 4, None)
        assert str(path) in str(refused.value)


def test_a_palette_with_transparency_raises_no_warning(tmp_path: Path) -> None:
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 250, 120, 10])
    image.save(tmp_path / "a.png", transparency=b"\x00\xff")
    assert decode(str(tmp_path / "a.png"), 4, None)[:, 0, 0].tolist() == [250, 120, 10]


def test_a_long_thin_image_is_not_blown_up(tmp_path: Path) -> None:
    Image.new("RGB", (60000, 1), (9, 8, 7)).save(tmp_path / "a.png")
    assert decode(str(tmp_path / "a.png"), 224, None)[:, 5, 5].tolist() == [9, 8, 7]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_a_damaged_image_is_a_fault_that_names_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_image(path, 40, 40, seed=0)
    damage(path)
    with raises(FaultError, "image-unreadable") as fault:
        decode(str(path), 8, None)
    assert str(path) in str(fault.value)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_whatever_is_wrong_with_the_bytes_it_is_a_fault_or_an_image(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    path = folder / f"a{data.draw(st.sampled_from(['.png', '.jpg', '.tif', '.webp']))}"
    write_image(path, 12, 12, seed=0)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    assert outcome(path) in ("image-unreadable", "image-depth", "an image")


def outcome(path: Path) -> str:
    try:
        decoded = decode(str(path), 4, None)
    except CodedError as error:
        return error.code
    return "an image" if decoded.shape == (3, 4, 4) else f"{decoded.shape}"


def test_a_file_that_ghostscript_would_draw_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg", "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", Mock(side_effect=AssertionError))
    with raises(FaultError, "image-unreadable") as fault:
        decode(str(tmp_path / "a.jpg"), 8, None)
    assert "it is none of JPEG, PNG" in str(fault.value)


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000"])
def test_the_format_is_that_of_the_content(tmp_path: Path, form: str) -> None:
    more = {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]} if form == "MPO" else {}
    Image.new("RGB", (9, 9), (9, 8, 7)).save(tmp_path / "a.jpg", form, **more)
    assert np.abs(decode(str(tmp_path / "a.jpg"), 4, None)[:, 0, 0].astype(int) - [9, 8, 7]).max() <= 2


def test_files_that_are_no_images_missing_or_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    for name in ("text.jpg", "empty.jpg", "folder.jpg", "gone.jpg"):
        with raises(FaultError, "image-unreadable"):
            decode(str(tmp_path / name), 8, None)


def test_who_has_an_image_of_too_many_pixels_need_not_remove_it(tmp_path: Path) -> None:
    (tmp_path / "huge.pgm").write_bytes(b"P5 20000 10000 255\n")
    with raises(FaultError, "image-unreadable") as fault:
        decode(str(tmp_path / "huge.pgm"), 8, None)
    assert "make it smaller" in str(fault.value)


def test_a_name_that_is_no_unicode_is_read_and_printed(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 9, 9, seed=0)
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    os.rename(tmp_path / "a.png", strange)
    assert decode(strange, 4, None).shape == (3, 4, 4)
    damage(Path(strange))
    with raises(FaultError, "image-unreadable") as raised:
        decode(strange, 4, None)
    assert "caf\N{REPLACEMENT CHARACTER}" in str(raised.value)
    str(raised.value).encode()
