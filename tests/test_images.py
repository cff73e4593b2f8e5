"""Images are loaded upright, in their own range, with exact values; other files are refused."""

import numpy as np
import pytest
import torch
from conftest import ROOT, small, unetr
from PIL import Image

RAMP = np.arange(64 * 64).reshape(64, 64) % 256  # 8-bit values
COLORS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2).astype(np.uint8)
GRAY, RGB = small(in_channels=1), small(in_channels=3)


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
    np.testing.assert_allclose(
        actual, np.broadcast_to(expected, actual.shape), rtol=0, atol=tolerance
    )


def test_color_and_grayscale(saved):
    near(saved(gray(), GRAY), RAMP / 255)
    near(saved(gray(), RGB), RAMP / 255)
    near(saved(Image.fromarray(COLORS), RGB), COLORS.transpose(2, 0, 1) / 255)
    near(
        saved(Image.fromarray(COLORS), GRAY),
        COLORS @ np.array([0.299, 0.587, 0.114]) / 255,
        1 / 255,
    )  # luma


def test_a_path_may_be_a_string(tmp_path):
    gray().save(tmp_path / "image.png")
    near(load(str(tmp_path / "image.png"), GRAY), RAMP / 255)


def test_cmyk_and_one_bit(saved):
    near(
        saved(Image.new("CMYK", (64, 64), (255, 0, 0, 0)), RGB, "image.tif"),
        np.array([0, 1, 1]).reshape(3, 1, 1),
    )
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
def test_sixteen_bits_are_min_max_scaled(saved, name, config):
    values = (1000 + np.arange(64 * 64).reshape(64, 64)).astype(np.uint16)  # a 12-bit X-ray
    near(saved(Image.fromarray(values), config, name), (values - 1000) / 4095)


def test_sixteen_bits_of_either_byte_order(tmp_path):
    values = (np.arange(64 * 64).reshape(64, 64) * 7 % 40_000).astype(np.uint16)
    for order, first in (("<", b"II*\0"), (">", b"MM\0*")):
        entries = [
            (256, 64),
            (257, 64),
            (258, 16),
            (259, 1),
            (262, 1),
            (273, 8),
            (277, 1),
            (278, 64),
            (279, 8192),
        ]
        directory = np.array(len(entries), order + "u2").tobytes()
        for tag, value in entries:
            directory += (
                np.array([tag, 4], order + "u2").tobytes()
                + np.array([1, value], order + "u4").tobytes()
            )
        offset = np.array(8 + 8192, order + "u4").tobytes()
        path = tmp_path / "image.tif"
        path.write_bytes(
            first + offset + values.astype(order + "u2").tobytes() + directory + bytes(4)
        )
        near(load(path, GRAY), values / values.max())


def test_integers_of_32_bits_and_floats_are_min_max_scaled(saved):
    values = np.linspace(-2_000_000_000, 2_000_000_000, 64 * 64).reshape(64, 64).astype(np.int32)
    near(saved(Image.fromarray(values), GRAY, "image.tif"), (values / 4e9) + 0.5)
    values = 2_000_000_000 + np.arange(64 * 64, dtype=np.int32).reshape(64, 64)
    near(saved(Image.fromarray(values), GRAY, "image.tif"), np.arange(4096).reshape(64, 64) / 4095)
    near(saved(Image.new("F", (64, 64), 7.5), GRAY, "image.tif"), 0)
    values = np.linspace(-3, 5, 64 * 64, dtype=np.float32).reshape(64, 64)
    near(saved(Image.fromarray(values), GRAY, "image.tif"), (values + 3) / 8)


def tall(mode):
    values = np.arange(96 * 32).reshape(96, 32)
    return (
        Image.fromarray(values.astype(np.uint16))
        if mode == "I;16"
        else gray(values % 251).convert(mode)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_exif_orientation_of_a_tiff_is_undone(saved, orientation, mode, compression):
    upright = saved(tall(mode), small(image_size=(96, 32), in_channels=1), "upright.tif")[0]
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 3),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright),
    }[orientation]
    config = small(image_size=turned.shape, in_channels=1)
    near(
        saved(
            tall(mode), config, "image.tif", compression=compression, tiffinfo={0x0112: orientation}
        ),
        turned,
    )


def test_exif_orientation_of_a_png_is_undone(saved):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    near(saved(gray(), GRAY, exif=exif), np.rot90(RAMP, 3) / 255)


@pytest.mark.parametrize("name", ["image.gif", "image.tif"])
def test_first_frame_of_several(saved, name):
    frames = [Image.new("L", (64, 64), value) for value in (51, 102, 153)]
    near(saved(frames[0], GRAY, name, save_all=True, append_images=frames[1:]), 0.2)


@pytest.mark.parametrize("mode", ["L", "F"])
def test_resizing_is_bilinear_and_preserves_positions_and_mean(saved, mode):
    values = np.zeros((128, 200))
    values[64:, :100] = 255  # lower left
    (loaded,) = saved(
        gray(values).convert(mode), small(image_size=(32, 96), in_channels=1), "image.tif"
    )
    assert loaded.mean() == pytest.approx(0.25, abs=0.01)
    assert loaded[20:, :40].min() == 1
    assert not loaded[:12].any()
    assert not loaded[:, 56:].any()
    stripes = np.tile([0, 255], (64, 64))
    near(
        saved(gray(stripes).convert(mode), GRAY, "image.tif")[0, :, 1:-1], 0.5, 0.01
    )  # every other pixel would be 0 or 1
    edge = np.repeat([[0, 255]], 2, axis=0)
    (row, *_) = saved(
        gray(edge).convert(mode), small(image_size=(16, 16), in_channels=1), "image.tif"
    )[0]
    ramp = (np.arange(8) + 0.5) / 8  # between the two pixel centers
    near(row[4:12], ramp, 0.51 / 255)
    edge = Image.fromarray(np.repeat([[7, 8]], 2, axis=0).astype(np.uint16))
    near(saved(edge, small(image_size=(16, 16), in_channels=1))[0, 0, 4:12], ramp)
    edge = gray(np.repeat([[0, 1]], 2, axis=0)).convert("P")
    edge.putpalette([0, 0, 0, 255, 255, 255])
    near(saved(edge, small(image_size=(16, 16)))[0, 0, 4:12], ramp, 0.51 / 255)


def refused(path, config, error, word):
    with pytest.raises(error) as caught:
        unetr.load_image(path, config)
    assert word in str(caught.value)


def test_what_cannot_be_read_is_refused(tmp_path):
    sample = ROOT / "sample.png"
    (tmp_path / "text.png").write_bytes(b"text" * 99)
    (tmp_path / "truncated.png").write_bytes(sample.read_bytes()[:9000])
    damaged = sample.read_bytes().replace(b"IDAT", b"\x83\xa6?$", 1)
    (tmp_path / "damaged.png").write_bytes(damaged)  # neither OSError nor ValueError in Pillow
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
