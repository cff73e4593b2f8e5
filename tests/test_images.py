"""Image loading: each mode that Pillow opens arrives upright, in its own range, with the values expected."""

import importlib
import io
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from PIL import Image

unetr = importlib.import_module("UNETR-2D")

RAMP = np.arange(64 * 64).reshape(64, 64) % 256  # 8-bit values
GREY = unetr.UNETRConfig(**SMALL, in_channels=1)
RGB = unetr.UNETRConfig(**SMALL, in_channels=3)


def load(tmp_path, image, config, name="image.png", **options):
    image.save(tmp_path / name, **options)
    tensor = unetr.load_image(tmp_path / name, config)
    assert tensor.shape == (1, config.in_channels, *config.size) and tensor.dtype == torch.float32
    assert tensor.is_contiguous() and tensor.min() >= 0 and tensor.max() <= 1
    return tensor[0].numpy()


def near(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(actual, np.broadcast_to(expected, actual.shape), rtol=0, atol=tolerance)


@pytest.mark.parametrize("config", [GREY, RGB])
def test_grey(tmp_path, config):
    near(load(tmp_path, Image.fromarray(RAMP.astype(np.uint8)), config), RAMP / 255)


def colours():
    return np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2).astype(np.uint8)


def test_rgb(tmp_path):
    near(load(tmp_path, Image.fromarray(colours()), RGB), colours().transpose(2, 0, 1) / 255)


def test_rgb_as_grey_is_its_luma(tmp_path):
    luma = colours() @ np.array([0.299, 0.587, 0.114])
    near(load(tmp_path, Image.fromarray(colours()), GREY), luma / 255, 1 / 255)


def test_palette(tmp_path):
    image = Image.fromarray((RAMP % 3).astype(np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 51])
    expected = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0.2]])[RAMP % 3].transpose(2, 0, 1)
    near(load(tmp_path, image, RGB), expected)


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.fromarray((RAMP % 2).astype(np.uint8), mode="P")
    image.putpalette([255, 255, 255, 0, 255, 0])
    expected = np.array([[0, 0, 0], [0, 1, 0]])[RAMP % 2].transpose(2, 0, 1)
    near(load(tmp_path, image, RGB, transparency=0), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_turns_black(tmp_path, mode):
    bands = [Image.new("L", (64, 64), 200)] * (len(mode) - 1)
    image = Image.merge(mode, [*bands, Image.fromarray(RAMP.astype(np.uint8))])
    for config in (GREY, RGB):
        near(load(tmp_path, image, config), 200 / 255 * RAMP / 255, 0.51 / 255)


def test_grey_with_a_transparent_value(tmp_path):
    image = Image.fromarray(RAMP.astype(np.uint8))
    near(load(tmp_path, image, GREY, transparency=255), np.where(RAMP == 255, 0, RAMP / 255))


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    near(load(tmp_path, image, RGB, "image.tif"), np.array([0, 1, 1]).reshape(3, 1, 1))


def test_one_bit(tmp_path):
    near(load(tmp_path, Image.fromarray(RAMP % 2 == 1), GREY), RAMP % 2)


@pytest.mark.parametrize("config", [GREY, RGB])
@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_sixteen_bits_are_scaled_by_their_own_range(tmp_path, name, config):
    values = (1000 + np.arange(64 * 64).reshape(64, 64)).astype(np.uint16)  # a 12-bit X-ray
    near(load(tmp_path, Image.fromarray(values), config, name), (values - 1000) / 4095)


def test_thirty_two_bits_are_scaled_by_their_own_range(tmp_path):
    values = np.linspace(-2_000_000_000, 2_000_000_000, 64 * 64).reshape(64, 64).astype(np.int32)
    near(load(tmp_path, Image.fromarray(values), GREY, "image.tif"), (values / 4e9) + 0.5)


def test_floats_are_scaled_by_their_own_range(tmp_path):
    values = np.linspace(-3, 5, 64 * 64, dtype=np.float32).reshape(64, 64)
    near(load(tmp_path, Image.fromarray(values), GREY, "image.tif"), (values + 3) / 8)


def test_floats_that_are_no_numbers_take_the_ends_of_the_range(tmp_path):
    values = np.linspace(-3, 5, 64 * 64, dtype=np.float32).reshape(64, 64)
    values[9, :3] = np.nan, -np.inf, np.inf
    loaded = load(tmp_path, Image.fromarray(values), GREY, "image.tif")[0]
    assert loaded[9, :3].tolist() == [0, 0, 1]
    assert loaded[0, 0] == 0 and loaded[63, 63] == 1


def test_an_image_without_any_number_is_refused(tmp_path):
    Image.new("F", (64, 64), float("nan")).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError) as error:
        unetr.load_image(tmp_path / "nan.tif", GREY)
    sentence = f"cannot read {tmp_path / 'nan.tif'} as an image (no pixel of it is a number); a file that Pillow opens"
    assert str(error.value) == f"{sentence} would do"


def test_floats_of_one_value_are_black(tmp_path):
    near(load(tmp_path, Image.new("F", (64, 64), 7.5), GREY, "image.tif"), 0)


def test_exif_rotation_is_undone(tmp_path):
    image = Image.fromarray(RAMP.astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    near(load(tmp_path, image, GREY, exif=exif), np.rot90(RAMP, 3) / 255)


def test_a_damaged_exif_tag_is_no_reason_to_refuse_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "a description"
    image = Image.fromarray(RAMP.astype(np.uint8))
    with pytest.warns(UserWarning, match="Truncated"):  # Pillow's own, which is not hidden
        near(load(tmp_path, image, GREY, exif=exif.tobytes()[:-10]), RAMP / 255)


@pytest.mark.parametrize("name", ["image.gif", "image.tif"])
def test_first_frame_of_many(tmp_path, name):
    frames = [Image.new("L", (64, 64), value) for value in (51, 102, 153)]
    near(load(tmp_path, frames[0], GREY, name, save_all=True, append_images=frames[1:]), 0.2)


@pytest.mark.parametrize("mode", ["L", "F"])
def test_resizing_keeps_the_places_and_the_mean(tmp_path, mode):
    config = unetr.UNETRConfig(**{**SMALL, "image_size": (32, 96)}, in_channels=1)
    values = np.zeros((128, 200), np.uint8)
    values[64:, :100] = 255  # lower left
    loaded = load(tmp_path, Image.fromarray(values).convert(mode), config, "image.tif")[0]
    assert loaded.shape == (32, 96) and loaded.mean() == pytest.approx(0.25, abs=0.01)
    assert loaded[20:, :40].min() == 1 and not loaded[:12].any() and not loaded[:, 56:].any()


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ValueError) as error:
        unetr.load_image(ROOT / "sample.png", unetr.UNETRConfig(in_channels=4))
    assert str(error.value) == (
        "an image file is read with in_channels 1 (grey) or 3 (RGB), got 4; the class UNETR itself takes any number"
    )


def test_pillows_safety_limit_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    Image.new("L", (64, 64)).save(tmp_path / "bomb.png")
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"cannot read .*bomb\.png as an image.*exceeds limit"),
    ):
        warnings.simplefilter("error")
        unetr.load_image(tmp_path / "bomb.png", GREY)


def test_sample_is_what_the_readme_says():
    file = ROOT / "sample.png"
    image = Image.open(io.BytesIO(file.read_bytes()))
    assert image.mode == "L" and image.size == (296, 350) and file.stat().st_size < 60_000
    assert "McConnell Brain Imaging Centre" in image.text["Copyright"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert image.text["Copyright"] in readme.replace("> ", "")
