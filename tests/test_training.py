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
from conftest import README, ROOT, readme_blocks, readme_program, unetr
from PIL import Image

TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: stored turned by 90 degrees


def replaced(program, pattern, new):
    program, count = re.subn(pattern, new, program, flags=re.MULTILINE)
    assert count == 1, pattern
    return program


PREPARE, PREDICT = readme_program("sheet.crop("), readme_program("load_checkpoint(")
TRAIN = readme_program('save_checkpoint(model, "weights.pt")')
MULTICLASS = readme_program("import cross_entropy\n")
SHORT = replaced(TRAIN, "^num_epochs = 10", "num_epochs = 1")
SHORT = replaced(SHORT, "^num_held_out = 8", "num_held_out = 2")
SHORT = replaced(SHORT, "hidden_dim=96, num_heads=4, mlp_dim=192", "hidden_dim=4, num_heads=2")


def multiclass(program):
    """Apply MULTICLASS: its function and its lines replace those that begin in the same way."""
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
    (lambda classes: bands("P", RED, BLUE, BLACK)(2 - classes), "{}.png", {}),
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
    share = np.mean([rectangles(i) > 0 for i in range(3)])
    assert lines.startswith(
        f"3 training images, 2 held out, {share:.2%} foreground\nepoch 1: loss "
    )
    assert re.search(r"epoch 1: loss \d\.\d\d, Dice on held-out images \d\.\d\d\n$", lines)


def test_dice_is_that_of_all_held_out_images_together(run, tmp_path):
    write(tmp_path)
    Image.new("L", (96, 112)).save(tmp_path / "masks/4.png")  # all that is predicted is wrong
    right, wrong = ((rectangles(i) > 0).sum() for i in (3, 4))
    expected = 2 * right / (2 * right + wrong)
    assert run(SHORT, Perfect)[1].endswith(f"Dice on held-out images {expected:.2f}\n")


def test_the_weights_of_the_last_epoch_are_saved(run, tmp_path):
    write(tmp_path)
    names, _ = run(
        replaced(SHORT, "num_epochs = 1", "num_epochs = 3"), Perfect
    )  # the first is as good
    saved = unetr.load_checkpoint("weights.pt").state_dict()
    for name, tensor in names["model"].state_dict().items():
        assert torch.equal(saved[name], tensor), name


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
    (tmp_path / "images/0.png").rename(tmp_path / "images/0-first.PNG")
    (tmp_path / "masks/0.png").rename(tmp_path / "masks/0-first.png")
    (tmp_path / "masks/1.png").rename(tmp_path / "masks/1.TIF")
    for kind in ("images", "masks"):
        for old, new in (("2", "a.2"), ("3", "a.3")):
            (tmp_path / kind / f"{old}.png").rename(tmp_path / kind / f"{new}.png")
    for name in ("images/.DS_Store", "images/._0.png", "masks/._0.png", "images/Thumbs.db"):
        (tmp_path / name).write_bytes(b"no image")
    names, printed = run(SHORT)
    assert printed.startswith("3 training images, ")
    for mask, i in zip(names["masks"], (0, 1, 4, 2, 3), strict=True):  # in alphabetical order
        assert np.array_equal(mask[0], rectangles(i) > 0)


FLAT = [Image.new("L", (96, 112), value) for value in (0, 1)]
MISTAKES = {  # files that are removed, files that are written, words of the sentence
    "missing mask": ("masks/4.png", {}, "images/4.png"),
    "no masks": ("masks/*", {}, "images/0.png"),
    "no images": ("images/*", {}, "2 of the 0 files in images"),
    "too few images": ("images/[2-4].png", {}, "2 of the 2 files in images"),
    "two masks": ("", {"masks/4.tif": (FLAT[0], {})}, "masks/4.png and masks/4.tif"),
    "two images": ("", {"images/4.jpg": (FLAT[0], {})}, "images/4.jpg and images/4.png"),
    "JPEG": ("masks/4.png", {"masks/4.jpg": (FLAT[0], {})}, "masks/4.jpg .* JPEG"),
    "renamed JPEG": ("", {"masks/4.png": (FLAT[0], {"format": "JPEG"})}, "masks/4.png .* JPEG"),
    "JPEG in TIFF": (
        "masks/4.png",
        {"masks/4.tif": (FLAT[0], {"compression": "jpeg"})},
        "got jpeg",
    ),
    "mask of another size": (
        "",
        {"masks/4.png": (Image.new("L", (96, 111)), {})},
        r"masks/4.png .*\(96, 112\), got \(96, 111\)",
    ),
    "image turned by EXIF": (
        "",
        {"images/4.png": (FLAT[0], {"exif": TURNED})},
        r"masks/4.png .*\(112, 96\), got \(96, 112\)",
    ),
    "all black": ("", {f"masks/{i}.png": (FLAT[0], {}) for i in (0, 1, 2)}, "training masks"),
    "all foreground": ("", {f"masks/{i}.png": (FLAT[1], {}) for i in (0, 1, 2)}, "training masks"),
}


@pytest.mark.parametrize("removed, written, words", MISTAKES.values(), ids=MISTAKES)
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

    predict = replaced(PREDICT, "images/44", "images/3")
    names, _ = run(replaced(predict, r"(mask = ).*several classes: ", r"\1"))
    predicted = np.asarray(Image.open("prediction.png"))
    with torch.inference_mode():
        logits = names["model"](unetr.load_image("images/3.png", names["model"].config))
    assert np.array_equal(predicted, logits[0].argmax(dim=0))

    for mode, color, words in (("L", 3, "below 3, got 3"), ("RGB", 0, "mode RGB")):
        Image.new(mode, (96, 112), color).save(tmp_path / "masks/4.png")
        with pytest.raises(SystemExit, match=f"masks/4.png must .*{words}"):
            run(program)


def test_the_programs_run_one_after_the_other_as_printed_and_learn_as_stated(tmp_path):
    def python(*arguments, status=0):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    def assert_predicted(width, height):
        python("-c", PREDICT)
        model = unetr.load_checkpoint(tmp_path / "weights.pt")
        with torch.inference_mode():
            logits = model(unetr.load_image(image, model.config))[0, 0].numpy()
        resized = Image.fromarray(logits).resize((width, height), Image.Resampling.BILINEAR)
        predicted = np.asarray(Image.open(tmp_path / "prediction.png"))
        assert predicted.shape == (height, width)
        assert (predicted == np.where(np.asarray(resized) > 0, 255, 0)).mean() > 0.999

    shutil.copy(ROOT / "UNETR-2D.py", tmp_path / "unetr_2d.py")
    shutil.copytree(ROOT / "tests/data", tmp_path / "tests/data")
    python("-c", PREPARE)
    image, mask = tmp_path / "images/44.png", tmp_path / "masks/44.png"
    png = mask.read_bytes()
    mask.write_bytes(png[:60])
    sentence = python("-c", TRAIN, status=1)
    assert re.fullmatch("masks/44.png is not a readable image: .*\n", sentence)
    mask.write_bytes(png)

    *_, last = python("-c", TRAIN).splitlines()
    loss, score = map(float, re.search(r"^epoch 10: loss (.*), Dice .* (.*)$", last).groups())
    stated = re.search(
        r"last batch falls to about ([\d.]+), and the Dice .* rises to ([\d.]+)\.", README
    )
    assert loss == pytest.approx(float(stated[1]), abs=0.06)  # processors round differently
    assert score == pytest.approx(float(stated[2]), abs=0.04)

    assert_predicted(96, 112)
    (command,) = [command for command in readme_blocks("sh") if "--weights" in command]
    assert "weights: weights.pt" in python(*command.split()[1:], "--no-show")

    large = Image.open(image).resize((192, 224))
    large.transpose(Image.Transpose.ROTATE_90).save(image, exif=TURNED)
    assert_predicted(192, 224)
