"""Images are loaded upright, in their own range, with exact values; other files are refused."""

import numpy as np
import pytest
import torch
from conftest import ROOT, small, unetr
from PIL import Image

RAMP = np.arange(64 * 64).reshape(64, 64) % 256  # 8-bit values
COLORS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2).astype(np.uint8)
GRAY, RGB = small(in_channels=1), small(in_channels=3)
ORIENTATION = 0x0112  # tag of EXIF and TIFF


def gray(values=RAMP):
    return Image.fromarray(values.astype(np.uint8))


def load(path, config):
    tensor = unetr.load_image(path, config)
    assert tensor.shape == (1, config.in_channels, *config.size)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor.min() >= 0
    assert tensor.max() <= 1
    return tensor[0].numpy()


@pytest.fixture
def saved(tmp_path):
    def save_and_load(image, config, name="image.png", **options):
        image.save(tmp_path / name, **options)
        return load(tmp_path / name, config)

    return save_and_load


def near(actual, expected, tolerance=1e-6):
    expected = np.broadcast_to(expected, actual.shape)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_color_and_grayscale(saved, tmp_path):
    near(saved(gray(), GRAY), RAMP / 255)
    near(saved(gray(), RGB), RAMP / 255)
    near(load(str(tmp_path / "image.png"), GRAY), RAMP / 255)  # a path may be a string
    near(saved(Image.fromarray(COLORS), RGB), COLORS.transpose(2, 0, 1) / 255)
    luma = COLORS @ np.array([0.299, 0.587, 0.114])
    near(saved(Image.fromarray(COLORS), GRAY), luma / 255, 1 / 255)


def test_cmyk_and_one_bit(saved):
    cyan = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    near(saved(cyan, RGB, "image.tif"), np.array([0, 1, 1]).reshape(3, 1, 1))
    near(saved(Image.fromarray(RAMP % 2 == 1), GRAY), RAMP % 2)


def test_palette_also_with_a_transparent_color(saved):
    image = gray(RAMP % 3).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 51])
    expected = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0.2]])
    near(saved(image, RGB), expected[RAMP % 3].transpose(2, 0, 1))
    expected[0] = 0
    near(saved(image, RGB, transparency=0), expected[RAMP % 3].transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("config", [GRAY, RGB])
def test_transparency_is_composited_over_black(saved, mode, config):
    bands = [Image.new("L", (64, 64), 200)] * (len(mode) - 1)
    near(saved(Image.merge(mode, [*bands, gray()]), config), 200 / 255 * RAMP / 255, 0.51 / 255)
    near(saved(gray(), GRAY, transparency=255), np.where(RAMP == 255, 0, RAMP / 255))
    colored = Image.new("RGB", (64, 64), (10, 20, 30))
    near(saved(colored, config, transparency=(10, 20, 30)), 0)


@pytest.mark.parametrize("config", [GRAY, RGB])
@pytest.mark.parametrize("name", ["image.png", "image.tif"])
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bits_are_min_max_scaled(saved, name, config, mode):
    values = (1000 + np.arange(64 * 64).reshape(64, 64)).astype(np.uint16)  # a 12-bit X-ray
    stored = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    image = Image.frombytes(mode, (64, 64), stored)
    near(saved(image, config, name), (values - 1000) / 4095)


def test_integers_of_32_bits_and_floats_are_min_max_scaled(saved):
    values = np.linspace(-2_000_000_000, 2_000_000_000, 64 * 64).reshape(64, 64).astype(np.int32)
    near(saved(Image.fromarray(values), GRAY, "image.tif"), (values / 4e9) + 0.5)
    values = 2_000_000_000 + np.arange(64 * 64, dtype=np.int32).reshape(64, 64)
    near(saved(Image.fromarray(values), GRAY, "image.tif"), np.arange(4096).reshape(64, 64) / 4095)
    near(saved(Image.new("F", (64, 64), 7.5), GRAY, "image.tif"), 0)
    values = np.linspace(-3, 5, 64 * 64, dtype=np.float32).reshape(64, 64)
    near(saved(Image.fromarray(values), GRAY, "image.tif"), (values + 3) / 8)


UPRIGHT = {  # orientation: from stored to upright
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.T,
    6: lambda stored: np.rot90(stored, 3),
    7: lambda stored: stored[::-1, ::-1].T,
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_exif_orientation_of_a_tiff_is_undone(saved, orientation, mode, compression):
    """Also if it is raw, that is uncompressed: opened by its path, Pillow would scramble it."""
    values = np.arange(96 * 32).reshape(96, 32)
    sixteen_bits = Image.fromarray(values.astype(np.uint16))
    image = sixteen_bits if mode == "I;16" else gray(values % 251).convert(mode)
    stored = saved(image, small(image_size=(96, 32), in_channels=1), "stored.tif")[0]
    expected = UPRIGHT[orientation](stored)
    config = small(image_size=expected.shape, in_channels=1)
    options = dict(compression=compression, tiffinfo={ORIENTATION: orientation})
    near(saved(image, config, "image.tif", **options), expected)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_of_a_png_is_undone(saved, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    near(saved(gray(), GRAY, exif=exif), UPRIGHT[orientation](RAMP) / 255)


@pytest.mark.parametrize("name", ["image.gif", "image.tif"])
def test_first_frame_of_several(saved, name):
    frames = [Image.new("L", (64, 64), value) for value in (51, 102, 153)]
    near(saved(frames[0], GRAY, name, save_all=True, append_images=frames[1:]), 0.2)


@pytest.mark.parametrize("mode", ["L", "F"])
def test_resizing_preserves_positions_and_mean(saved, mode):
    values = np.zeros((128, 200))
    values[64:, :100] = 255  # lower left
    oblong = small(image_size=(32, 96), in_channels=1)
    (loaded,) = saved(gray(values).convert(mode), oblong, "image.tif")
    assert loaded.mean() == pytest.approx(0.25, abs=0.01)
    assert loaded[20:, :40].min() == 1
    assert not loaded[:12].any()
    assert not loaded[:, 56:].any()
    stripes = gray(np.tile([0, 255], (64, 64))).convert(mode)
    # every other pixel would be 0 or 1
    near(saved(stripes, GRAY, "image.tif")[0, :, 1:-1], 0.5, 0.01)


@pytest.mark.parametrize("mode", ["L", "F", "I;16", "P"])
def test_resizing_is_bilinear(saved, mode):
    edge = np.repeat([[0, 1]], 2, axis=0)
    image = gray(255 * edge).convert(mode) if mode in "LF" else Image.fromarray(edge.astype("u2"))
    if mode == "P":  # colors, not indices, are averaged
        image = gray(edge).convert("P")
        image.putpalette([0, 0, 0, 255, 255, 255])
    row = saved(image, small(image_size=(16, 16)), "image.tif")[:, 0, 4:12]
    near(row, (np.arange(8) + 0.5) / 8, 0.51 / 255)  # between the two pixel centers


def refused(path, config, error, word):
    with pytest.raises(error) as caught:
        unetr.load_image(path, config)
    assert word in str(caught.value)


def test_what_cannot_be_read_is_refused(tmp_path):
    sample = ROOT / "sample.png"
    (tmp_path / "text.png").write_bytes(b"text" * 99)
    content = sample.read_bytes()
    (tmp_path / "truncated.png").write_bytes(content[:9000])
    size = content.index(b"IDAT") - 4  # where the length of the compressed pixels is stored
    shorter = (int.from_bytes(content[size : size + 4]) - 100).to_bytes(4)
    (tmp_path / "damaged.png").write_bytes(content[:size] + shorter + content[size + 4 :])
    with pytest.raises(SyntaxError):  # neither OSError nor ValueError
        Image.open(tmp_path / "damaged.png").load()
    refused(tmp_path / "none.png", GRAY, FileNotFoundError, "none.png")
    refused(tmp_path, GRAY, IsADirectoryError, str(tmp_path))
    for name in ("text.png", "truncated.png", "damaged.png"):
        refused(tmp_path / name, GRAY, ValueError, name)
    refused(sample, small(in_channels=4), ValueError, "4")


def test_pillows_limit_of_pixels_is_kept(monkeypatch):
    assert Image.MAX_IMAGE_PIXELS  # still there, although the script is imported
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused(ROOT / "sample.png", GRAY, ValueError, "sample.png")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_not_finite_is_refused(tmp_path, value):
    values = np.zeros((64, 64), dtype=np.float32)
    values[5, 7] = value
    Image.fromarray(values).save(tmp_path / "image.tif")
    refused(tmp_path / "image.tif", GRAY, ValueError, "image.tif")
