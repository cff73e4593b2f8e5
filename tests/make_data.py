"""Make sample.png and tests/data from the skull-stripped ICBM 152 template in nilearn.

pip install nilearn==0.14.1 && python tests/make_data.py
"""

import gzip
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

TESTS = Path(__file__).resolve().parent
NOTICE = " ".join((TESTS / "data/LICENSE").read_text(encoding="utf-8").split())
TITLE = "ICBM 152 2009a nonlinear symmetric {}, axial {}; from nilearn 0.14.1"


def load_volume(kind: str) -> np.ndarray:
    """(x, y, z) in voxels of 1 mm, from left, back and below; the origin is voxel (98, 134, 72)."""
    file = files("nilearn") / f"datasets/data/mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
    values = np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=352)
    return values.reshape((197, 233, 189), order="F")


def axial_slice(kind: str, z: int) -> Image.Image:
    """The slice at z mm, seen from above, anterior at the top: 197 x 233 pixels."""
    return Image.fromarray(np.ascontiguousarray(load_volume(kind)[:, ::-1, z + 72].T))


def save(image: Image.Image, path: Path, title: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", title)
    info.add_text("Copyright", NOTICE)
    image.save(path, optimize=True, pnginfo=info)


if __name__ == "__main__":
    sample = axial_slice("t1", 20).resize((296, 350), Image.Resampling.BICUBIC)
    sample = ImageOps.pad(sample, (350, 350))  # black margins left and right
    title = TITLE.format("T1 template, skull-stripped", "slice at z = +20 mm")
    save(sample, TESTS.parent / "sample.png", title)

    # 48 slices, 8 in a row, each 192 x 224 mm in pixels of 2 mm
    for kind, name in (("t1", "T1 template"), ("gm", "gray matter map > 0.5")):
        sheet = Image.new("L", (8 * 96, 6 * 112))
        for i, z in enumerate(range(-30, 66, 2)):
            cropped = axial_slice(kind, z).crop((2, 4, 194, 228)).reduce(2)
            sheet.paste(cropped, (i % 8 * 96, i // 8 * 112))
        if kind == "gm":
            sheet = sheet.point(lambda value: 255 * (value > 127.5)).convert("1")
        title = TITLE.format(name, "slices from z = -30 mm up to 64 mm, every 2 mm")
        save(sheet, TESTS / f"data/{kind}.png", title)
