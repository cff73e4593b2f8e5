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


def start(*arguments, cwd, **environment):
    """The command as a user starts it."""
    command = [sys.executable, ROOT / "UNETR-2D.py", *OPTIONS, *map(str, arguments)]
    options = dict(cwd=cwd, env={**HEADLESS, **environment}, capture_output=True, timeout=120)
    done = subprocess.run(command, **options)
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


ROWS = """
patch embed (1, 16, 768)        (1, 16, 24)         linear
z1          (1, 16, 24)         (1, 16, 24)         Transformer layer 1
z2          (1, 16, 24)         (1, 16, 24)         Transformer layer 2
z4          (1, 16, 24)         (1, 16, 24)         Transformer layer 4
z5          (1, 16, 24)         (1, 16, 24)         Transformer layer 5
skip 1/8    (1, 24, 4, 4)       (1, 32, 8, 8)       blue
merge 1/8   (1, 24, 4, 4)       (1, 32, 8, 8)       green orange orange
skip 1/4    (1, 24, 4, 4)       (1, 16, 16, 16)     blue blue
merge 1/4   (1, 32, 8, 8)       (1, 16, 16, 16)     green orange orange
skip 1/2    (1, 24, 4, 4)       (1, 8, 32, 32)      blue blue blue
merge 1/2   (1, 16, 16, 16)     (1, 8, 32, 32)      green orange orange
skip 1/1    (1, 3, 64, 64)      (1, 4, 64, 64)      orange orange
merge 1/1   (1, 8, 32, 32)      (1, 4, 64, 64)      green orange orange
head        (1, 4, 64, 64)      (1, 1, 64, 64)      grey
"""


@pytest.mark.parametrize("arguments, environment", [([], {"MPLBACKEND": ""}), (["--no-show"], {})])
def test_it_prints_each_stage_and_writes_the_figure_without_a_display(tmp_path, arguments, environment):
    code, out, err = start(*arguments, cwd=tmp_path, **environment)
    assert (code, err) == (0, "") and [path.name for path in tmp_path.iterdir()] == ["unetr-2d.png"]
    assert out.startswith(f"{small()}\n107,021 parameters on ") and "untrained, seed 0\n" in out
    assert ROWS in out and re.search(r"\nforward pass: \d+\.\d\d s\n", out)
    assert out.endswith(f"figure: {tmp_path / 'unetr-2d.png'}\n") and "\033" not in out


def test_each_stage_is_printed_as_it_finishes(here, capsys):
    printed, block = [], unetr.GreenBlock
    block.forward_of_torch = block.forward
    block.forward = lambda self, x: printed.append(capsys.readouterr().out) or self.forward_of_torch(x)
    try:
        assert call() == 0
    finally:
        block.forward = block.forward_of_torch
    assert printed[0].splitlines()[-1].startswith("z5") and "merge" not in printed[0]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("no_color, colored", [("", True), ("1", False)])
def test_blocks_have_the_colors_of_figure_2_on_a_terminal(tmp_path, no_color, colored):
    import pty

    ours, theirs = pty.openpty()
    environment = {**HEADLESS, "NO_COLOR": no_color, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, ROOT / "UNETR-2D.py", *OPTIONS], stdout=theirs, cwd=tmp_path, env=environment
    )
    os.close(theirs)
    printed = b""
    try:
        while chunk := os.read(ours, 4096):
            printed += chunk
    except OSError:  # on Linux, the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    row = next(line for line in printed.decode().splitlines() if line.startswith("merge 1/8"))
    assert [word in row for word in ("green", "orange")] == [True, True] and ("\033[" in row) == colored
    assert len(set(re.findall(r"48;5;(\d+)m", printed.decode()))) == (4 if colored else 0)


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
    for name, seed in (("a.png", 3), ("b.png", 3), ("c.png", 4), ("d.png", 0)):
        assert call("--output", name, "--seed", seed) == 0
    assert call() == 0  # seed 0 by default
    a, b, c, d, default = (pixels(name) for name in ("a.png", "b.png", "c.png", "d.png", "unetr-2d.png"))
    assert np.array_equal(a, b) and not np.array_equal(a, c) and np.array_equal(d, default)


@pytest.mark.parametrize("extension", unetr.EXTENSIONS)
def test_the_extension_decides_the_format(here, extension):
    assert call("--output", f"a{extension.upper()}") == 0
    first = {".pdf": b"%PDF", ".svg": b"<?xml", ".svgz": b"\x1f\x8b", ".ps": b"%!PS", ".eps": b"%!PS"}
    if extension in first:
        assert Path(f"a{extension.upper()}").read_bytes().startswith(first[extension])
    else:
        assert Image.open(f"a{extension.upper()}").size[0] == 1000
    assert len([*here.iterdir()]) == 1


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


@pytest.mark.parametrize("name", ["Schädel-脳.png", "a\udcff.png"] if sys.platform == "linux" else ["Schädel-脳.png"])
def test_a_name_that_the_output_cannot_encode(tmp_path, name):
    Image.new("L", (9, 9)).save(tmp_path / name)
    code, out, err = start(name, "--output", f"out-{name}", cwd=tmp_path, PYTHONIOENCODING="cp1252")
    assert (code, err) == (0, "") and "\nfigure: " in out and len([*tmp_path.iterdir()]) == 2


def test_every_field_of_the_configuration_is_an_option(here, capsys):
    words = ["--image-size", "64x96", "--patch-size", "32", "--in-channels", "1", "--out-channels", "4",
             "--hidden-dim", "36", "--num-layers", "6", "--num-heads", "4", "--mlp-dim", "72",
             "--dropout-rate", "0.25", "--feature-size", "8"]  # fmt: skip
    assert unetr.main(words) == 0
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


def test_memory_beyond_the_machine_is_one_sentence(here, capsys):
    assert call("--hidden-dim", 999_999) == 2  # terabytes
    assert "memory" in capsys.readouterr().err.splitlines()[-1]


def test_the_device_is_the_available_accelerator_by_default(monkeypatch, capsys):
    for available, default in ((None, "cpu"), (torch.device("cuda"), "cuda")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, found=available: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        assert unetr.main(["--help"]) == 0
        assert f"(default: {default})" in " ".join(capsys.readouterr().out.split("--seed")[0].split()[-3:])
    assert unetr.main(["--device", "cuda:2"]) == 2
    assert re.search(r"choose from '?cuda'?, '?cuda:0'?, '?cuda:1'?, '?cpu'?\)", capsys.readouterr().err)


def saved(state):
    torch.save(state, "w.pt")
    return "w.pt"


def written(name, data=b"text" * 99):
    Path(name).write_bytes(data)
    return name


def state(**changes):
    return {**unetr.UNETR(small()).state_dict(), **changes}


def wrapped():
    return {f"module.{name}": weight for name, weight in state().items()}


INVALID_WEIGHTS = r"cannot load the weights w\.pt: it is not a state_dict saved with torch\.save"
BAD = {
    "image missing": (["none.png"], r"cannot read none\.png as an image: No such file or directory"),
    "image empty": (lambda: [written("e.png", b"")], r"e\.png must be an image file in a format that Pillow reads"),
    "image truncated": (lambda: [written("half.png", (ROOT / "sample.png").read_bytes()[:9000])],
                        r"cannot read half\.png as an image: .*truncated.*"),
    "not an image": (lambda: [written("t.png")], r"t\.png must be an image file in a format that Pillow reads"),
    "channels": (["--in-channels", 5], r"in_channels must be 1 \(grayscale\) or 3 \(RGB\) for an image file, got 5"),
    "size": (["--image-size", "250x256"], r"image_size must be one or two positive multiples of patch_size 16, got \(250, 256\)"),
    **{f"size {text}": (["--image-size", text], rf"argument --image-size: must be SIDE or HEIGHTxWIDTH in pixels, got '{text}'")
       for text in ("64x", "32X64", "x", "1x2x3", "large", "8.5")},
    "size beyond memory": (["--image-size", 1_000_000], r"image_size must be within Pillow's limit of 89478485 pixels, got 1000000 x 1000000"),
    "patch size": (["--patch-size", 12], r"patch_size must be a power of two, at least 2, got 12"),
    "negative": (["--mlp-dim", -4], r"mlp_dim must be from 1 to 1000000, got -4"),
    "not a number": (["--hidden-dim", "big"], r"argument --hidden-dim: invalid int value: 'big'"),
    "seed": (["--seed", -1], r"seed must be from 0 to 2\*\*63 - 1, got -1"),
    "seed too large": (["--seed", 2**63], r"seed must be from 0 to .*, got 9223372036854775808"),
    "device": (["--device", "abacus"], r"argument --device: invalid choice: 'abacus' \(choose from .*cpu'?\)"),
    "device meta": (["--device", "meta"], r"argument --device: invalid choice: 'meta' .*"),
    "unknown option": (["--color"], r"unrecognized arguments: --color"),
    "option without value": (["--seed"], r"argument --seed: expected one argument"),
    "weights missing": (["--weights", "w.pt"], r"cannot load the weights w\.pt: No such file or directory"),
    "weights a folder": (["--weights", "."], r"cannot load the weights \.: Is a directory"),
    "weights empty": (lambda: ["--weights", written("w.pt", b"")], INVALID_WEIGHTS),
    "weights damaged": (lambda: ["--weights", written("w.pt")], INVALID_WEIGHTS),
    "weights an object": (lambda: ["--weights", saved({"x": Path("y")})], INVALID_WEIGHTS),
    "weights a pickle": (lambda: ["--weights", written("w.pt", pickle.dumps({"x": Path("y")}, protocol=2))], INVALID_WEIGHTS),
    "weights a list": (lambda: ["--weights", saved([1])], r"w\.pt does not match this configuration: Expected state_dict .*"),
    "weights numbers": (lambda: ["--weights", saved(state(**{"encoder.pos_embed": 3.0}))], r"w\.pt does not match .*"),
    "weights of another configuration": (lambda: ["--weights", saved(state(**{"head.weight": torch.zeros(2, 4, 1, 1)}))],
                                         r"w\.pt does not match this configuration: .*size mismatch for head\.weight.*"),
    "weights with positions of no square": (lambda: ["--weights", saved(state(**{"encoder.pos_embed": torch.zeros(1, 15, 24)}))],
                                            r"w\.pt does not match .* must have 16 or a square number of positions, got 15"),
    "weights of a wrapped model": (lambda: ["--weights", saved(wrapped())],
                                   r'w\.pt does not match .* Missing key.*"encoder\.pos_embed", .*Unexpected key.*"module\..*'),
    "output folder missing": (["--output", "none/o.png"], r"cannot write .*o\.png: No such file or directory"),
    "output a folder": (lambda: (Path("d.png").mkdir(), ["--output", "d.png"])[1], r"cannot write .*d\.png: Is a directory"),
    "output name too long": (["--output", 300 * "a" + ".png"], r"cannot write .*: File name too long"),
    **{f"output {name}": (["--output", name], rf"the output extension must be one of .*png.*pdf.*, got '{name}'")
       for name in ("o.xyz", "png", "o.pgf")},
    "output replaces the image": (lambda: [written("i.png", (ROOT / "sample.png").read_bytes()), "--output", "i.png"],
                                  r"the output must not replace an input, got .*i\.png for both"),
    "output replaces the weights": (lambda: ["--weights", written("w.png"), "--output", "w.png"],
                                    r"the output must not replace an input, got .*w\.png for both"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_an_error_is_one_sentence_before_the_forward_pass(case, here, capsys, monkeypatch):
    arguments, sentence = BAD[case]
    arguments = arguments() if callable(arguments) else arguments
    Path("unetr-2d.png").write_bytes(b"old")
    before = {path: path.is_file() and path.read_bytes() for path in here.iterdir()}
    monkeypatch.setattr(unetr.UNETR, "forward", lambda *_: pytest.fail("the forward pass was run"))
    assert call(*arguments) == 2
    usage, printed = capsys.readouterr().err.splitlines()
    assert usage == "usage: UNETR-2D.py [image] [options]" and len(printed) < 700
    assert re.fullmatch(f"UNETR-2D\\.py: error: {sentence}", printed), printed
    assert {path: path.is_file() and path.read_bytes() for path in here.iterdir()} == before


def test_an_error_ends_the_command_with_exit_status_2(tmp_path):
    code, out, err = start("none.png", cwd=tmp_path)
    assert (code, out) == (2, "") and len(err.splitlines()) == 2 and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("output", ["folder/o.png", "o.png"])
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can write everywhere")
def test_an_output_without_write_permission_is_refused(here, capsys, output):
    Path("folder").mkdir(mode=0o500)
    written("o.png")
    Path("o.png").chmod(0o400)
    assert call("--output", output) == 2 and "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_bug_is_not_reported_as_an_error_of_the_user(here, monkeypatch, kind):
    def bug(*_):
        raise kind("a bug")

    monkeypatch.setattr(unetr.UNETR, "forward", bug)
    with pytest.raises(kind, match="a bug"):
        call()
