"""The command: what it prints and writes, from any folder, without a display; every error is one sentence."""

import os
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import OPTIONS, ROOT, small, unetr
from PIL import Image

HEADLESS = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
ROWS = """
encoder.patch_embed (1, 3, 64, 64)      (1, 16, 24)         linear
encoder.blocks.0    (1, 16, 24)         (1, 16, 24)         Transformer layer 1
encoder.blocks.1    (1, 16, 24)         (1, 16, 24)         Transformer layer 2
encoder.blocks.3    (1, 16, 24)         (1, 16, 24)         Transformer layer 4
encoder.blocks.4    (1, 16, 24)         (1, 16, 24)         Transformer layer 5
decoder.0.skip      (1, 24, 4, 4)       (1, 32, 8, 8)       blue
decoder.0           (1, 24, 4, 4)       (1, 32, 8, 8)       green orange orange
decoder.1.skip      (1, 24, 4, 4)       (1, 16, 16, 16)     blue blue
decoder.1           (1, 32, 8, 8)       (1, 16, 16, 16)     green orange orange
decoder.2.skip      (1, 24, 4, 4)       (1, 8, 32, 32)      blue blue blue
decoder.2           (1, 16, 16, 16)     (1, 8, 32, 32)      green orange orange
decoder.3.skip      (1, 3, 64, 64)      (1, 4, 64, 64)      orange orange
decoder.3           (1, 8, 32, 32)      (1, 4, 64, 64)      green orange orange
head                (1, 4, 64, 64)      (1, 1, 64, 64)      grey
"""


def start(*arguments, cwd, **environment):
    """The command as a user starts it."""
    command = [sys.executable, ROOT / "UNETR-2D.py", *OPTIONS, *arguments]
    done = subprocess.run(command, cwd=cwd, env={**HEADLESS, **environment}, capture_output=True, timeout=120)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plt.close("all")


def call(*arguments):
    return unetr.main([*OPTIONS, *map(str, arguments)])


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


@pytest.mark.parametrize("arguments, environment", [([], {"MPLBACKEND": ""}), (["--no-show"], {})])
def test_it_prints_each_stage_and_writes_the_figure_without_a_display(tmp_path, arguments, environment):
    code, out, err = start(*arguments, cwd=tmp_path, **environment)
    assert (code, err) == (0, "") and [path.name for path in tmp_path.iterdir()] == ["unetr-2d.png"]
    assert out.startswith(f"{small()}\n107,021 parameters on ") and "untrained, seed 0\n" in out
    assert ROWS in out and re.search(r"\nforward pass: \d+\.\d\d s\n", out)
    assert out.endswith(f"figure: {tmp_path / 'unetr-2d.png'}\n") and "\033" not in out


@pytest.mark.parametrize("no_color, colors", [("", 4), ("1", 0)])
def test_blocks_have_the_colors_of_figure_2_on_a_terminal(here, monkeypatch, capsys, no_color, colors):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert call() == 0
    assert len({*re.findall(r"\033\[([\d;]+)m", capsys.readouterr().out)} - {"0"}) == colors


def test_the_forward_pass_is_in_inference_mode(here, monkeypatch):
    seen, forward = [], unetr.UNETR.forward

    def watch(self, image):
        seen.append((self.training, torch.is_grad_enabled()))
        return forward(self, image)

    monkeypatch.setattr(unetr.UNETR, "forward", watch)
    assert call("--output", here / "a.png") == 0 and seen == [(False, False)]


def test_a_window_opens_unless_the_user_wants_none(here, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(Path("unetr-2d.png").exists()))
    assert call("--no-show") == 0 and shown == []
    assert call() == 0 and shown == [True]


def test_the_seed_decides_the_figure(here):
    for name, seed in (("a.png", 3), ("b.png", 3), ("c.png", 2**63 - 1), ("d.png", 0)):
        assert call("--output", name, "--seed", seed) == 0
    assert call() == 0  # seed 0 by default
    a, b, c, d, default = (pixels(name) for name in ("a.png", "b.png", "c.png", "d.png", "unetr-2d.png"))
    assert np.array_equal(a, b) and not np.array_equal(a, c) and np.array_equal(d, default)


@pytest.mark.parametrize("extension", unetr.EXTENSIONS)
def test_the_extension_decides_the_format(here, extension):
    assert call("--output", f"a{extension.upper()}") == 0
    (written,) = here.iterdir()
    first = {".pdf": b"%PDF", ".svg": b"<?xml", ".svgz": b"\x1f\x8b", ".ps": b"%!PS", ".eps": b"%!PS"}
    if extension in first:
        assert written.read_bytes().startswith(first[extension])
    else:
        assert Image.open(written).size[0] == 1000


def test_an_existing_figure_keeps_its_permissions(here):
    Path("unetr-2d.png").write_bytes(b"old")
    Path("unetr-2d.png").chmod(0o600)
    assert call() == 0 and Image.open("unetr-2d.png").size[0] == 1000
    assert stat.S_IMODE(Path("unetr-2d.png").stat().st_mode) == 0o600


def test_a_figure_that_cannot_be_written_leaves_the_old_one(here, monkeypatch, capsys):
    Path("unetr-2d.png").write_bytes(b"old")

    def disk_is_full(figure, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", disk_is_full)
    assert call() == 2
    assert capsys.readouterr().err.endswith(f"cannot write {here / 'unetr-2d.png'}: No space left on device\n")
    assert Path("unetr-2d.png").read_bytes() == b"old" and len([*here.iterdir()]) == 1


@pytest.mark.parametrize("output", ["a.png", 300 * "a" + ".png"])
def test_an_output_that_no_file_can_be_is_refused(here, capsys, output):
    Path("a.png").mkdir()
    assert call("--output", output) == 2 and [path.name for path in here.iterdir()] == ["a.png"]
    reason = "(Is a directory|File name too long)"
    assert re.search(rf"error: cannot write {here / output}: {reason}\n$", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["Schädel-脳.png", "a\udcff.png"] if sys.platform == "linux" else ["Schädel-脳.png"])
def test_a_name_that_the_output_cannot_encode(tmp_path, name):
    Image.new("L", (9, 9)).save(tmp_path / name)
    code, out, err = start(name, "--output", f"out-{name}", cwd=tmp_path, PYTHONIOENCODING="cp1252")
    assert (code, err) == (0, "") and "\nfigure: " in out and len([*tmp_path.iterdir()]) == 2


def test_every_field_of_the_configuration_is_an_option(here, capsys):
    options = """--image-size 64x96 --patch-size 32 --in-channels 1 --out-channels 4 --hidden-dim 36 --num-layers 6
                 --num-heads 4 --mlp-dim 72 --dropout-rate 0.25 --feature-size 8"""
    assert unetr.main(options.split()) == 0
    expected = unetr.UNETRConfig((64, 96), 32, 1, 4, 36, 6, 4, 72, 0.25, 8)
    assert capsys.readouterr().out.splitlines()[0] == str(expected)


def test_help_states_every_default(capsys):
    assert unetr.main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, value in vars(unetr.UNETRConfig()).items():
        option = f"--{name.replace('_', '-')}"
        assert re.search(rf"{option} {name.upper()} [^-]*\(default: {value}\)", text), option
    assert text.count("(default: ") == 6 + 10


def test_weights_are_used_and_none_are_drawn(here, capsys):
    torch.manual_seed(11)
    model = unetr.UNETR(small()).eval()
    torch.save(model.state_dict(), "weights.pt")
    torch.save({name: tensor.double() for name, tensor in model.state_dict().items()}, "double.pt")
    before = torch.get_rng_state()
    assert call("--weights", "weights.pt", "--output", "a.png") == 0
    assert torch.equal(torch.get_rng_state(), before) and "weights: weights.pt" in capsys.readouterr().out
    assert call("--weights", "double.pt", "--output", "b.png") == 0
    with torch.inference_mode():
        image = unetr.load_image(ROOT / "sample.png", model.config)
        unetr.draw(image, model(image), model.config, trained=True).savefig("expected.png")
    for name in ("a.png", "b.png"):
        assert abs(pixels(name) - pixels("expected.png")).mean() < 0.1
    assert call("--weights", "weights.pt", "--image-size", "96") == 0  # positions are resized


def test_the_device_is_the_available_accelerator_by_default(monkeypatch, capsys):
    for available, count, default in ((None, 0, "cpu"), (torch.device("cuda"), 2, "cuda")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, found=available: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda count=count: count)
        assert unetr.main(["--help"]) == 0
        assert f"where to run (default: {default})" in " ".join(capsys.readouterr().out.split())
    assert unetr.main(["--device", "cuda:2"]) == 2
    assert re.search(r"choose from '?cuda'?, '?cuda:0'?, '?cuda:1'?, '?cpu'?\)", capsys.readouterr().err)


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder of files that the command must refuse, or must not replace."""
    folder, state, sample = tmp_path_factory.mktemp("bad"), unetr.UNETR(small()).state_dict(), ROOT / "sample.png"
    files = {"empty": b"", "text": b"text" * 99, "truncated": sample.read_bytes()[:9000], "good": sample.read_bytes(),
             "pickle": pickle.dumps({"x": Path("y")}, protocol=2)}  # fmt: skip
    weights = {"list": [1], "object": {"x": Path("y")}, "head": {**state, "head.weight": torch.zeros(2, 4, 1, 1)},
               "no square": {**state, "encoder.pos_embed": torch.zeros(1, 15, 24)},
               "wrapped": {f"module.{name}": weight for name, weight in state.items()}}  # fmt: skip
    for name, data in files.items():
        (folder / f"{name}.png").write_bytes(data)
    for name, content in weights.items():
        torch.save(content, folder / f"{name}.png")
    return folder


NO_IMAGE = r"{}\.png must be an image file in a format that Pillow reads"
NO_WEIGHTS = r"cannot load the weights {}\.png: it is not a state_dict saved with torch\.save"
NO_MATCH = r"{}\.png does not match this configuration: "
BAD = {
    "none.png": r"cannot read none\.png as an image: No such file or directory",
    "empty.png": NO_IMAGE.format("empty"),
    "text.png": NO_IMAGE.format("text"),
    "truncated.png": r"cannot read truncated\.png as an image: .*truncated.*",
    "--in-channels 5": r"in_channels must be 1 \(grayscale\) or 3 \(RGB\) for an image file, got 5",
    "--image-size 250x256": r"image_size must be H or \(H, W\), multiples of patch_size 16, got \(250, 256\)",
    "--image-size 1000000": r"image_size must be within Pillow's limit of 89478485 pixels, got 1000000 x 1000000",
    **{f"--image-size {text}": rf"argument --image-size: must be SIDE or HEIGHTxWIDTH in pixels, got '{text}'"
       for text in ("64x", "32X64", "1x2x3", "8.5")},
    "--patch-size 12": r"patch_size must be a power of two, at least 2, got 12",
    "--mlp-dim -4": r"mlp_dim must be from 1 to 1000000, got -4",
    "--hidden-dim 999999": r"the network and its image need more memory than is available",  # terabytes
    "--hidden-dim big": r"argument --hidden-dim: invalid int value: 'big'",
    "--seed -1": r"seed must be from 0 to 2\*\*63 - 1, got -1",
    f"--seed {2**63}": r"seed must be from 0 to 2\*\*63 - 1, got 9223372036854775808",
    "--device meta": r"argument --device: invalid choice: 'meta' \(choose from .*cpu'?\)",
    "--color": r"unrecognized arguments: --color",
    "--weights none.pt": r"cannot load the weights none\.pt: No such file or directory",
    "--weights .": r"cannot load the weights \.: Is a directory",
    **{f"--weights {name}.png": NO_WEIGHTS.format(name) for name in ("empty", "text", "object", "pickle")},
    "--weights list.png": NO_MATCH.format("list") + r"Expected state_dict .*",
    "--weights head.png": NO_MATCH.format("head") + r".*size mismatch for head\.weight.*",
    "--weights no square.png": NO_MATCH.format("no square") + r".*16 or a square number of positions, got 15",
    "--weights wrapped.png": NO_MATCH.format("wrapped") + r'.*Missing .*"encoder\.pos_embed", .*Unexpected .*"module\..*',
    **{f"--output {name}": rf"the output extension must be one of .*png.*pdf.*, got '{name}'"
       for name in ("o.xyz", "png", "o.pgf")},
    "--output none/a.png": r"cannot write .*none/a\.png: its folder does not exist or is not writable",
    "good.png --output good.png": r"the output must not replace an input, got .*good\.png for both",
    "--weights head.png --output head.png": r"the output must not replace an input, got .*head\.png for both",
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_an_error_is_one_sentence_before_the_forward_pass(words, bad_files, capsys, monkeypatch):
    monkeypatch.chdir(bad_files)
    monkeypatch.setattr(unetr.UNETR, "forward", lambda *_: pytest.fail("the forward pass was run"))
    before = {path: path.read_bytes() for path in bad_files.iterdir()}
    assert call(*re.split(" (?!square)", words)) == 2
    usage, printed = capsys.readouterr().err.splitlines()
    assert usage == "usage: UNETR-2D.py [image] [options]" and len(printed) < 700
    assert re.fullmatch(f"UNETR-2D\\.py: error: {BAD[words]}", printed), printed
    assert {path: path.read_bytes() for path in bad_files.iterdir()} == before


def test_an_error_ends_the_command_with_exit_status_2(tmp_path):
    code, out, err = start("none.png", cwd=tmp_path)
    assert (code, out) == (2, "") and len(err.splitlines()) == 2 and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_bug_ends_in_its_traceback_after_the_stages_that_have_finished(here, monkeypatch, capsys, kind):
    def bug(*_):
        raise kind("a bug")

    monkeypatch.setattr(unetr.GreyBlock, "forward", bug)
    with pytest.raises(kind, match="a bug"):
        call()
    assert capsys.readouterr().out.endswith("green orange orange\n") and not [*here.iterdir()]
