"""The README's training programs do what they say on the folders that people have."""

import ast
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, unetr
from PIL import Image

README = (ROOT / "README.md").read_text(encoding="utf-8")
TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: stored turned by 90 degrees


def block(marker):
    programs = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (program,) = [program for program in programs if marker in program]
    return program


def replaced(program, pattern, new):
    program, count = re.subn(pattern, new, program, flags=re.MULTILINE)
    assert count == 1, pattern
    return program


PREPARE, PREDICT = block("sheet.crop("), block('load_checkpoint("weights.pt")')
TRAIN, MULTICLASS = block('save_checkpoint(model, "weights.pt")'), block("import cross_entropy\n")
SHORT = replaced(TRAIN, r"range\(1, 11\)", "range(1, 2)")
SHORT = replaced(SHORT, "^num_held_out = 8", "num_held_out = 2")
SHORT = replaced(SHORT, "hidden_dim=96, num_heads=4, mlp_dim=192", "hidden_dim=4, num_heads=2")


def multiclass(program):
    """Apply MULTICLASS as its comment says: its lines and its function replace the old ones."""
    for statement in ast.parse(MULTICLASS).body:
        new = ast.get_source_segment(MULTICLASS, statement).splitlines()
        start = re.match(r'def \w+|from [\w.]+|\w+ =|print\(f"epoch', new[0]).group()
        lines = program.splitlines()
        statements = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.stmt)]
        (old,) = [s for s in statements if lines[s.lineno - 1].lstrip().startswith(start)]
        lines[old.lineno - 1 : old.end_lineno] = [" " * old.col_offset + line for line in new]
        program = "\n".join(lines) + "\n"
    return program


class Perfect(unetr.UNETR):
    """Predicts class c where the gray value is 100 * c, whatever its weights are."""

    def forward(self, image):
        classes = torch.arange(max(self.config.out_channels, 2)).reshape(1, -1, 1, 1)
        logits = -((2.55 * image - classes) ** 2) + 0 * self.head.weight.sum()
        return logits if self.config.out_channels > 1 else logits[:, 1:] - logits[:, :1]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Several would make so small a network slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a program in tmp_path, but in this process. Returns its names and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(program, network=unetr.UNETR):
        module = types.SimpleNamespace(**{**vars(unetr), "UNETR": network})
        monkeypatch.setitem(sys.modules, "unetr_2d", module)
        names = {"__name__": "__main__"}
        exec(compile(program, "program.py", "exec"), names)
        return names, capsys.readouterr().out

    return run


def rectangles(i, height=112, width=96):
    """The classes in image i: 0, 1 in one rectangle, 2 in another."""
    classes = np.zeros((height, width), dtype=np.uint8)
    classes[10 + 5 * i : 50, 10 : 70 - 5 * i], classes[60:100, 20 : 30 + 5 * i] = 1, 2
    return classes


def write(folder, encode=Image.fromarray, name="{}.png", **options):
    """Write five images, gray value 100 * class, and their masks. encode: classes -> an image."""
    for kind in ("images", "masks"):
        shutil.rmtree(folder / kind, ignore_errors=True)
        (folder / kind).mkdir()
    for i in range(5):
        Image.fromarray(100 * rectangles(i)).save(folder / f"images/{i}.png")
        encode(rectangles(i)).save(folder / "masks" / name.format(i), **options)


def bands(mode, *colors):
    """Encode classes as these colors. With mode P, as the indices of a palette of these colors."""

    def encode(classes):
        if mode != "P":
            return Image.fromarray(np.array(colors, dtype=np.uint8)[classes], mode)
        image = Image.fromarray(classes, mode)
        image.putpalette([value for color in colors for value in color])
        return image

    return encode


BLACK, WHITE, RED, BLUE = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 1)
ENCODINGS = [
    (Image.fromarray, "{}.png", {}),  # 0, 1 and 2
    (lambda classes: Image.fromarray(np.where(classes, 255, 0).astype(np.uint8)), "{}.PNG", {}),
    (lambda classes: Image.fromarray(classes > 0), "{}.png", {}),  # 1 bit
    (bands("P", BLACK, RED, BLUE), "{}.png", {}),
    (bands("P", BLACK, RED, BLUE), "{}.gif", {}),
    (bands("P", WHITE, RED, BLUE), "{}.png", {"transparency": 0}),
    (bands("RGB", BLACK, RED, BLUE), "{}.bmp", {}),
    (bands("RGBA", (0, 0, 0, 0), (*RED, 1), (*BLUE, 255)), "{}.png", {}),
    (bands("RGBA", (*WHITE, 0), (*RED, 255), (*BLUE, 1)), "{}.tif", {}),
    (bands("LA", (255, 0), (1, 255), (255, 1)), "{}.png", {}),
    (lambda classes: Image.fromarray(classes.astype(np.uint16)), "{}.png", {}),
    (lambda classes: Image.fromarray(classes * np.uint16(256)), "{}.Tiff", {}),
    (lambda classes: Image.fromarray(classes * np.int32(-70_000)), "{}.tif", {}),
    (lambda classes: Image.fromarray(classes * np.float32(0.001)), "{}.tif", {}),
]


def test_every_encoding_of_a_mask_trains_the_same_network(run, tmp_path):
    outputs = set()
    for encode, name, options in ENCODINGS:
        write(tmp_path, encode, name, **options)
        names, printed = run(SHORT)
        for i, mask in enumerate(names["masks"]):
            assert np.array_equal(mask[0], rectangles(i) > 0), (name, encode(rectangles(i)).mode)
        outputs.add(printed)
    (lines,) = outputs
    assert re.search(
        r"^3 training images, 2 held out, \d.*% foreground\nepoch 1: loss .*, Dice .* \d\.\d\d$",
        lines,
    )


@pytest.mark.parametrize("name", ["{}.png", "{}.tif"])
def test_masks_are_turned_upright_and_resized_after_their_foreground_is_found(run, tmp_path, name):
    write(tmp_path, lambda classes: Image.fromarray(100 * classes))
    for path in tmp_path.glob("*/*"):
        image = Image.open(path).resize((384, 448), Image.Resampling.NEAREST)
        path.unlink()
        image = image.transpose(Image.Transpose.ROTATE_90)
        image.save(path.with_name(name.format(path.stem)), exif=TURNED)
    names, printed = run(SHORT, Perfect)
    assert np.array_equal(names["masks"][3, 0], rectangles(3) > 0)
    assert printed.endswith("Dice on held-out images 1.00\n")
    program = replaced(multiclass(SHORT), "out_channels=3", "out_channels=201")
    assert np.array_equal(run(program)[0]["masks"][3], 100 * rectangles(3))


def test_hidden_and_other_files_are_ignored_and_extensions_may_differ(run, tmp_path):
    write(tmp_path)
    (tmp_path / "images/0.png").rename(tmp_path / "images/0.PNG")
    (tmp_path / "masks/1.png").rename(tmp_path / "masks/1.TIF")
    for name in ("images/.DS_Store", "images/._0.png", "masks/._0.png", "images/Thumbs.db"):
        (tmp_path / name).write_bytes(b"no image")
    assert run(SHORT)[1].startswith("3 training images, ")


FLAT = [Image.new("L", (96, 112), value) for value in (0, 1)]
MISTAKES = [  # files that are removed, files that are written, words of the sentence
    ("masks/4.png", {}, "images/4.png"),
    ("masks/*", {}, "images/0.png"),
    ("images/*", {}, "2 of the 0 files in images"),
    ("images/[2-4].png", {}, "2 of the 2 files in images"),
    ("", {"masks/4.tif": (FLAT[0], {})}, "masks/4.png and masks/4.tif"),
    ("", {"images/4.jpg": (FLAT[0], {})}, "images/4.jpg and images/4.png"),
    ("masks/4.png", {"masks/4.jpg": (FLAT[0], {})}, "masks/4.jpg .* JPEG"),
    ("", {"masks/4.png": (FLAT[0], {"format": "JPEG"})}, "masks/4.png .* JPEG"),
    ("", {"masks/4.png": (Image.new("L", (96, 111)), {})}, "masks/4.png .*96, 112.*96, 111"),
    ("", {"images/4.png": (FLAT[0], {"exif": TURNED})}, "masks/4.png .*112, 96.*96, 112"),
    ("images/4.png", {"images/4.png": (Image.new("L", (1, 1)), {})}, "masks/4.png .*1, 1"),
    ("", {f"masks/{i}.png": (FLAT[0], {}) for i in (0, 1, 2)}, "training masks"),
    ("", {f"masks/{i}.png": (FLAT[1], {}) for i in (0, 1, 2)}, "training masks"),
]


@pytest.mark.parametrize("removed, written, words", MISTAKES)
def test_a_mistake_ends_in_a_sentence_before_training(
    run, tmp_path, capsys, removed, written, words
):
    write(tmp_path)
    for path in list(tmp_path.glob(removed)) if removed else []:
        path.unlink()
    for name, (image, options) in written.items():
        image.save(tmp_path / name, **options)
    with pytest.raises(SystemExit, match=words) as caught:
        run(SHORT)
    assert "\n" not in caught.value.code  # Python prints it, and the exit status is 1
    assert "epoch" not in capsys.readouterr().out


def test_num_held_out_must_be_positive(run, tmp_path):
    write(tmp_path)
    with pytest.raises(SystemExit, match="hold out 0 of the 5"):
        run(replaced(SHORT, "^num_held_out = 2", "num_held_out = 0"))


@pytest.mark.parametrize("encode", [Image.fromarray, bands("P", RED, WHITE, BLUE)])
def test_several_classes(run, tmp_path, encode):
    write(tmp_path, encode)
    program = multiclass(SHORT)
    names, printed = run(program, Perfect)
    assert np.array_equal(names["masks"][3], rectangles(3))
    assert printed.endswith("Dice of each class 1.00 1.00 1.00\n")
    one_more = replaced(program, "out_channels=3", "out_channels=4")  # absent everywhere
    assert run(one_more, Perfect)[1].endswith("Dice of each class 1.00 1.00 1.00 1.00\n")
    assert re.search(r"class( \d\.\d\d){3}\n$", run(program)[1])
    for mode, color, words in (("L", 3, "below 3, got 3"), ("RGB", 0, "mode RGB")):
        Image.new(mode, (96, 112), color).save(tmp_path / "masks/4.png")
        with pytest.raises(SystemExit, match=f"masks/4.png must .*{words}"):
            run(program)


def test_the_programs_run_one_after_the_other_as_printed(tmp_path):
    def python(program, status=0):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done

    shutil.copy(ROOT / "UNETR-2D.py", tmp_path / "unetr_2d.py")
    shutil.copytree(ROOT / "tests/data", tmp_path / "tests/data")
    python(PREPARE)
    image, mask = tmp_path / "images/44.png", tmp_path / "masks/44.png"
    png = mask.read_bytes()
    mask.write_bytes(png[:60])
    stopped = python(TRAIN, status=1)
    assert "epoch" not in stopped.stdout
    assert re.fullmatch("masks/44.png is not a readable image: .*\n", stopped.stderr)

    mask.write_bytes(png)
    python(replaced(TRAIN, r"range\(1, 11\)", "range(1, 3)"))
    python(PREDICT)
    predicted = np.asarray(Image.open(tmp_path / "prediction.png"))
    model = unetr.load_checkpoint(tmp_path / "weights.pt")
    with torch.inference_mode():
        logits = model(unetr.load_image(image, model.config))
    assert np.array_equal(predicted, np.where(logits[0, 0] > 0, 255, 0))
    assert predicted.any()

    large = Image.open(image).resize((192, 224))
    large.transpose(Image.Transpose.ROTATE_90).save(image, exif=TURNED)
    python(PREDICT)
    upright = np.asarray(Image.open(tmp_path / "prediction.png"))
    assert upright.shape == (224, 192)
    assert np.unique(upright).tolist() == [0, 255]
    assert (upright[::2, ::2] == predicted).mean() > 0.9
