"""Image loading: every kind of image arrives upright, in its own range, with exact values; everything else is refused."""

import struct
import zlib

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
    assert tensor.shape == (1, config.in_channels, *config.size) and tensor.dtype == torch.float32
    assert tensor.is_contiguous() and tensor.min() >= 0 and tensor.max() <= 1
    return tensor[0].numpy()


@pytest.fixture
def saved(tmp_path):
    def save_and_load(image, config, name="image.png", **options):
        image.save(tmp_path / name, **options)
        return load(tmp_path / name, config)

    return save_and_load


def near(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(actual, np.broadcast_to(expected, actual.shape), rtol=0, atol=tolerance)


def test_color_and_grayscale(saved):
    near(saved(gray(), GRAY), RAMP / 255)
    near(saved(gray(), RGB), RAMP / 255)
    near(saved(Image.fromarray(COLORS), RGB), COLORS.transpose(2, 0, 1) / 255)
    near(saved(Image.fromarray(COLORS), GRAY), COLORS @ np.array([0.299, 0.587, 0.114]) / 255, 1 / 255)  # luma


def test_cmyk_and_one_bit(saved):
    near(saved(Image.new("CMYK", (64, 64), (255, 0, 0, 0)), RGB, "image.tif"), np.array([0, 1, 1]).reshape(3, 1, 1))
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


def test_premultiplied_alpha(tmp_path):
    path = tmp_path / "image.tif"
    Image.merge("LA", [Image.new("L", (64, 64), 100), Image.new("L", (64, 64), 128)]).save(path)
    unassociated, associated = (struct.pack("<HHII", 338, 3, 1, kind) for kind in (2, 1))  # tag ExtraSamples
    assert path.read_bytes().count(unassociated) == 1
    path.write_bytes(path.read_bytes().replace(unassociated, associated))
    assert Image.open(path).mode == "La"
    near(load(path, GRAY), 100 / 255, 1.01 / 255)


@pytest.mark.parametrize("config", [GRAY, RGB])
@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_sixteen_bits_are_min_max_scaled(saved, name, config):
    values = (1000 + np.arange(64 * 64).reshape(64, 64)).astype(np.uint16)  # a 12-bit X-ray
    near(saved(Image.fromarray(values), config, name), (values - 1000) / 4095)


def test_integers_of_32_bits_and_floats_are_min_max_scaled(saved):
    values = np.linspace(-2_000_000_000, 2_000_000_000, 64 * 64).reshape(64, 64).astype(np.int32)
    near(saved(Image.fromarray(values), GRAY, "image.tif"), (values / 4e9) + 0.5)
    near(saved(Image.new("F", (64, 64), 7.5), GRAY, "image.tif"), 0)
    values = np.linspace(-3, 5, 64 * 64, dtype=np.float32).reshape(64, 64)
    near(saved(Image.fromarray(values), GRAY, "image.tif"), (values + 3) / 8)
    values[9, :3] = np.nan, -np.inf, np.inf  # become the ends of the range
    loaded = saved(Image.fromarray(values), GRAY, "image.tif")[0]
    assert loaded[9, :3].tolist() == [0, 0, 1] and loaded[0, 0] == 0 and loaded[63, 63] == 1


def tall(mode):
    values = np.arange(96 * 32).reshape(96, 32)
    return Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else gray(values % 251).convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_exif_orientation_of_a_tiff_is_undone(saved, orientation, mode, compression):
    upright = saved(tall(mode), small(image_size=(96, 32), in_channels=1), "upright.tif")[0]
    turned = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
              6: np.rot90(upright, 3), 7: upright[::-1, ::-1].T, 8: np.rot90(upright)}[orientation]  # fmt: skip
    config, options = small(image_size=turned.shape, in_channels=1), dict(tiffinfo={0x0112: orientation})
    near(saved(tall(mode), config, "image.tif", compression=compression, **options), turned)


def test_exif_orientation_of_a_png_is_undone(saved):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    near(saved(gray(), GRAY, exif=exif), np.rot90(RAMP, 3) / 255)


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the EXIF block
@pytest.mark.parametrize("name", ["image.png", "image.webp", "image.jpg"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12", b"\xff" * 40])
def test_an_image_with_a_damaged_exif_block_is_read_as_stored(saved, name, exif):
    options = {} if name == "image.png" else dict(quality=100)
    near(saved(Image.new("L", (64, 64), 100), GRAY, name, exif=exif, **options), 100 / 255, 2.01 / 255)


@pytest.mark.parametrize("name", ["image.gif", "image.tif"])
def test_first_frame_of_several(saved, name):
    frames = [Image.new("L", (64, 64), value) for value in (51, 102, 153)]
    near(saved(frames[0], GRAY, name, save_all=True, append_images=frames[1:]), 0.2)


@pytest.mark.parametrize("mode", ["L", "F"])
def test_resizing_preserves_positions_and_mean(saved, mode):
    values = np.zeros((128, 200))
    values[64:, :100] = 255  # lower left
    (loaded,) = saved(gray(values).convert(mode), small(image_size=(32, 96), in_channels=1), "image.tif")
    assert loaded.mean() == pytest.approx(0.25, abs=0.01)
    assert loaded[20:, :40].min() == 1 and not loaded[:12].any() and not loaded[:, 56:].any()


def refused(path, config, sentence):
    with pytest.raises(ValueError) as error:
        unetr.load_image(path, config)
    assert str(error.value) == sentence


def test_what_cannot_be_read_is_refused(tmp_path):
    path = tmp_path / "nan.tif"
    Image.new("F", (64, 64), float("nan")).save(path)
    refused(path, GRAY, f"cannot read {path} as an image: no pixel is finite")
    refused(tmp_path, GRAY, f"cannot read {tmp_path} as an image: Is a directory")
    channels = "in_channels must be 1 (grayscale) or 3 (RGB) for an image file, got 4"
    refused(ROOT / "sample.png", small(in_channels=4), channels)
    for side in (9_472, 1_000_000):
        sentence = f"image_size must be within Pillow's limit of 89478485 pixels, got {side} x {side}"
        refused(ROOT / "sample.png", small(image_size=side), sentence)


def test_pillows_limit_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    load(ROOT / "sample.png", GRAY)


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width", [9_500, 100_000])  # Pillow warns of the first and refuses the second
def test_an_image_over_pillows_limit_is_refused_on_purpose(tmp_path, recwarn, width):
    path = tmp_path / "large.png"
    path.write_bytes(png_header(width, 10_000))
    refused(path, GRAY, f"{path} is refused: it has more pixels than Pillow's limit of 89478485")
    assert not recwarn.list
