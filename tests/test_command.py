"""The command: what it prints and writes, from any folder, without a screen; bad input ends in one sentence."""

import gc
import importlib
import io
import os
import pickle
import re
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from PIL import Image

unetr = importlib.import_module("UNETR-2D")

SIZES = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
HEADLESS = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}


def start(*arguments, cwd, **environment):
    command = [sys.executable, ROOT / "UNETR-2D.py", *SIZES, *map(str, arguments)]
    options = dict(cwd=cwd, env={**HEADLESS, **environment}, capture_output=True, text=True, timeout=120)
    return subprocess.run(command, **options)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unetr.plt.switch_backend("agg")  # loaded, as after any earlier test
    yield tmp_path
    unetr.plt.close("all")  # what a failure may have left


def call(*arguments):
    return unetr.main([*SIZES, *map(str, arguments)])


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def check_printed(lines, picture):
    assert lines[0] == str(unetr.UNETRConfig(**SMALL))
    assert lines[1] == f"107,021 parameters on {unetr.find_device(None)}" and lines[2] == "weights: untrained, seed 0"
    assert lines[3] == f"image: {ROOT / 'sample.png'}, 296 x 350 pixels, read as (1, 3, 64, 64)" and lines[4] == ""
    assert lines[5:22] == [
        "orange: conv 3x3, batch norm, ReLU; green: transposed conv 2x2; blue: green, then orange; grey: conv 1x1",
        "stage       shape                 blocks",
        "patches     (1, 16, 768)",
        "tokens z0   (1, 16, 24)",
        "z1          (1, 16, 24)",
        "z2          (1, 16, 24)",
        "z4          (1, 16, 24)",
        "z5          (1, 16, 24)",
        "skip 1/8    (1, 32, 8, 8)         blue",
        "merge 1/8   (1, 32, 8, 8)         green orange orange",
        "skip 1/4    (1, 16, 16, 16)       blue blue",
        "merge 1/4   (1, 16, 16, 16)       green orange orange",
        "skip 1/2    (1, 8, 32, 32)        blue blue blue",
        "merge 1/2   (1, 8, 32, 32)        green orange orange",
        "skip 1/1    (1, 4, 64, 64)        orange orange",
        "merge 1/1   (1, 4, 64, 64)        green orange orange",
        "output      (1, 1, 64, 64)        grey",
    ]
    assert lines[22] == "" and re.fullmatch(r"forward pass: \d\.\d\d s", lines[23])
    assert lines[24:] == [f"picture: {picture}"]


def test_what_is_printed(here, capsys):
    assert call() == 0
    check_printed(capsys.readouterr().out.splitlines(), here / "unetr-2d.png")


def test_another_folder_no_screen_plain_words(tmp_path):
    done = start(cwd=tmp_path, MPLBACKEND="")
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["unetr-2d.png"]
    check_printed(done.stdout.splitlines(), tmp_path / "unetr-2d.png")


class Stream(io.StringIO):
    """Standard output that is a terminal, and that remembers when each line was handed on."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def isatty(self):
        return True

    def flush(self):
        self.lines.append(self.getvalue().splitlines()[-1])


def test_each_stage_is_printed_when_it_is_done(here, monkeypatch):
    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    seen = []
    green = unetr.GreenBlock.forward
    monkeypatch.setattr(unetr.GreenBlock, "forward", lambda self, x: seen.append(stream.lines[-1]) or green(self, x))
    assert call() == 0
    assert [line.split()[0] for line in stream.lines] == [
        "patches",
        "tokens",
        "z1",
        "z2",
        "z4",
        "z5",
        *["skip", "merge"] * 4,
        "output",
    ]
    assert seen[0].startswith("z5")  # the first green block of all follows z5


@pytest.mark.parametrize("variable, value, coloured", [("NO_COLOR", "", True), ("NO_COLOR", "1", False)])
def test_colours_on_a_terminal_alone(here, monkeypatch, variable, value, coloured):
    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv(variable, value)
    assert call() == 0
    orange, green, blue, grey = (f"\033[48;5;{number}m  \033[0m" for number in (208, 71, 68, 246))
    words = ["orange", "green", "blue", "grey"]
    o, g, b, w = (orange, green, blue, grey) if coloured else words
    lines = stream.getvalue().splitlines()
    assert (
        lines[5] == f"{o}: conv 3x3, batch norm, ReLU; {g}: transposed conv 2x2; {b}: green, then orange; {w}: conv 1x1"
    )
    assert [line[34:] for line in lines[13:17]] == [b, f"{g} {o} {o}", f"{b} {b}", f"{g} {o} {o}"]
    assert lines[21][34:] == w


def test_the_picture_is_made_beside_its_place(here, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(here / "none"))  # it may be on another disk, which no file is moved to
    assert call() == 0 and [path.name for path in here.iterdir()] == ["unetr-2d.png"]


def test_weights_are_read_as_weights_alone_and_to_the_cpu(here, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: seen.append((args, kwargs)) or {})
    assert call("--weights", "w.pt") == 2
    assert seen == [((Path("w.pt"),), dict(map_location="cpu", weights_only=True))]


def test_a_backend_that_needs_a_screen_is_no_error_without_one(tmp_path):
    done = start(cwd=tmp_path, MPLBACKEND="TkAgg")
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "unetr-2d.png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a thing of Unix")
@pytest.mark.parametrize("no_color, coloured", [("", True), ("1", False)])
def test_on_a_terminal_the_blocks_are_coloured_squares(tmp_path, no_color, coloured):
    import pty

    ours, theirs = pty.openpty()
    environment = {**HEADLESS, "NO_COLOR": no_color, "TERM": "xterm-256color"}
    command = [sys.executable, ROOT / "UNETR-2D.py", *SIZES]
    process = subprocess.Popen(command, stdout=theirs, cwd=tmp_path, env=environment)
    os.close(theirs)
    printed = b""
    try:
        while chunk := os.read(ours, 4096):
            printed += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    line = next(line for line in printed.decode().splitlines() if line.startswith("merge 1/8"))
    green, orange = "\033[48;5;71m  \033[0m", "\033[48;5;208m  \033[0m"
    assert line.endswith(f"{green} {orange} {orange}" if coloured else "green orange orange")
    assert ("\033" in printed.decode()) == coloured


@pytest.mark.parametrize("framework, shown", [("qt", 1), (None, 0)])
def test_a_window_opens_where_there_is_a_screen(here, monkeypatch, framework, shown):
    windows = []
    monkeypatch.setattr(unetr.plt, "switch_backend", lambda name: None)
    monkeypatch.setattr(unetr.plt, "show", lambda: windows.append((unetr.plt.get_fignums(), Path("a.png").exists())))
    monkeypatch.setattr(unetr.FigureCanvasBase, "required_interactive_framework", framework)
    assert call("--output", "a.png") == 0
    assert windows == [([1], True)] * shown and unetr.plt.get_fignums() == []


def test_no_show_takes_the_backend_without_windows(here, monkeypatch):
    chosen = []
    monkeypatch.setattr(unetr.plt, "switch_backend", chosen.append)
    monkeypatch.setattr(unetr.plt, "get_backend", lambda: "qtagg")
    assert call("--no-show") == 0 and call() == 0
    assert chosen == ["agg", "qtagg"]


def test_a_backend_that_does_not_load_gives_way_to_the_one_without_windows(here, monkeypatch):
    tried = []

    def switch(name):
        tried.append(name)
        if name == "tkagg":
            raise ImportError("no screen")

    monkeypatch.setattr(unetr.plt, "switch_backend", switch)
    monkeypatch.setattr(unetr.plt, "get_backend", lambda: "tkagg")
    assert call() == 0 and tried == ["tkagg", "agg"] and Path("unetr-2d.png").exists()


@pytest.mark.parametrize("name, layout", [("cuda", torch.channels_last), ("mps", torch.contiguous_format)])
def test_model_and_image_go_to_the_device_in_its_layout(here, monkeypatch, name, layout):
    device, moved = torch.device(name), []
    monkeypatch.setattr(unetr, "find_device", lambda name: device)
    monkeypatch.setattr(unetr.UNETR, "to", lambda model, *where: moved.append(where) or model)
    monkeypatch.setattr(torch.Tensor, "to", lambda image, *where, **how: moved.append((*where, how)) or image)
    convert = unetr.nn.utils.convert_conv2d_weight_memory_format
    monkeypatch.setattr(
        unetr.nn.utils, convert.__name__, lambda model, layout: moved.append(layout) or convert(model, layout)
    )
    assert call() == 0
    assert moved == [(device,), layout, (device, dict(memory_format=layout))]


def test_same_seed_same_picture(here):
    for name, seed in (("a.png", 3), ("b.png", 3), ("c.png", 4), ("d.png", 0)):
        assert call("--output", name, "--seed", seed) == 0
    assert call("--seed", 2**63 - 1) == 0 and call() == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png")) and not np.array_equal(pixels("a.png"), pixels("c.png"))
    assert np.array_equal(pixels("d.png"), pixels("unetr-2d.png"))  # the default is 0


@pytest.mark.parametrize("name", ["a.pdf", "b.SVG", "c.jpg", "d.tif"])
def test_the_ending_decides_the_format(here, name):
    assert call("--output", name) == 0
    first = {"a.pdf": b"%PDF", "b.SVG": b"<?xml", "c.jpg": b"\xff\xd8\xff", "d.tif": b"II*"}[name]
    assert Path(name).read_bytes().startswith(first)
    assert [path.name for path in here.iterdir()] == [name]


def test_a_picture_that_stood_there_is_replaced_as_a_whole(here):
    Path("unetr-2d.png").write_bytes(b"old")
    assert call() == 0 and Image.open("unetr-2d.png").size[0] == 1000


def test_a_picture_that_cannot_be_drawn_costs_nothing(here, monkeypatch, capsys):
    Path("unetr-2d.png").write_bytes(b"old")

    def full(figure, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unetr.Figure, "savefig", full)
    assert call() == 2 and "No space left on device" in capsys.readouterr().err
    assert Path("unetr-2d.png").read_bytes() == b"old" and [path.name for path in here.iterdir()] == ["unetr-2d.png"]


def test_every_field_of_the_configuration_is_an_option(here, monkeypatch):
    built = []
    monkeypatch.setattr(unetr, "UNETR", lambda config: built.append(config) or exit(7))
    words = ["--image-size", "64x96", "--patch-size", "32", "--in-channels", "1", "--out-channels", "4",
             "--hidden-dim", "36", "--num-layers", "6", "--num-heads", "4", "--mlp-dim", "72",
             "--dropout-rate", "0.25", "--feature-size", "8"]  # fmt: skip
    for arguments in (words, []):
        with pytest.raises(SystemExit, match="7"):
            unetr.main(arguments)
    assert built == [unetr.UNETRConfig((64, 96), 32, 1, 4, 36, 6, 4, 72, 0.25, 8), unetr.UNETRConfig()]


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        unetr.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in ("sample.png by the script", "unetr-2d.png", "none, untrained", "the accelerator that PyTorch finds",
                    "0", "open one where there is a screen", "256", "16", "3", "1", "768", "12", "3072", "0.0", "64"):  # fmt: skip
        assert f"(default: {default}" in text, default
    assert text.count("(default: ") == 6 + 10


def test_weights_are_loaded_and_the_title_says_so(here, monkeypatch):
    torch.manual_seed(11)
    model = unetr.UNETR(unetr.UNETRConfig(**SMALL))
    torch.save(model.state_dict(), "weights.pt")
    drawn = []
    draw = unetr.draw
    monkeypatch.setattr(
        unetr, "draw", lambda *args, **kwargs: drawn.append((args, draw(*args, **kwargs))) or drawn[-1][1]
    )
    assert call("--weights", "weights.pt") == 0
    (image, logits, *_), figure = drawn[0]
    with torch.no_grad():
        torch.testing.assert_close(logits, model.eval()(image), atol=1e-5, rtol=1e-4)
    assert figure.axes[1].get_title() == "Mask"
    assert call() == 0 and figure.axes[1].get_title() != drawn[1][1].axes[1].get_title()
    assert drawn[1][1].axes[1].get_title() == "Mask of the untrained network: it means nothing yet"


def test_the_forward_pass_is_an_inference(here, monkeypatch):
    seen = {}

    class Watched(unetr.UNETR):
        def forward(self, image):
            seen.update(training=self.training, inference=torch.is_inference_mode_enabled())
            seen["channels last"] = image.is_contiguous(memory_format=torch.channels_last) and all(
                p.is_contiguous(memory_format=torch.channels_last) for p in self.parameters() if p.ndim == 4
            )
            return super().forward(image)

    monkeypatch.setattr(unetr, "UNETR", Watched)
    assert call() == 0
    assert seen == {"training": False, "inference": True, "channels last": True}


def test_nothing_is_printed_by_the_model_itself(capsys):
    unetr.UNETR(unetr.UNETRConfig(**SMALL))(torch.rand(1, 3, 64, 64))
    assert capsys.readouterr() == ("", "")


def test_the_garbage_collector_rests_only_while_the_command_imports(monkeypatch, capsys):
    calls = []
    for name in ("disable", "freeze", "enable"):
        monkeypatch.setattr(gc, name, lambda name=name: calls.append(name))
    runpy.run_path(str(ROOT / "UNETR-2D.py"))
    assert calls == []  # the program that imports the script keeps its own ways
    monkeypatch.setattr(sys, "argv", ["UNETR-2D.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "UNETR-2D.py"), run_name="__main__")
    assert calls == ["disable", "freeze", "enable"]


class Accelerator:
    def __init__(self, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def test_the_device_is_the_accelerator_else_the_cpu(monkeypatch):
    def no_card(check_available):
        return None if check_available else torch.device("cuda")  # as a PyTorch built for CUDA says

    monkeypatch.setattr(torch.accelerator, "current_accelerator", no_card)
    assert unetr.find_device(None) == torch.device("cpu") == unetr.find_device("cpu")
    Accelerator(monkeypatch)
    assert unetr.find_device(None) == torch.device("cuda")
    for name in ("cuda", "cuda:1", "cpu"):
        assert unetr.find_device(name) == torch.device(name)
    with pytest.raises(ValueError) as error:
        unetr.find_device("mps")
    assert str(error.value) == "device must be one that is there, got 'mps'; cuda or cuda:0 or cuda:1 or cpu would do"


def damaged(name, data):
    Path(name).write_bytes(data)
    return name


def saved(name, state):
    torch.save(state, name)
    return name


def other_weights():
    state = unetr.UNETR(unetr.UNETRConfig(**SMALL, out_channels=2)).state_dict()
    del state["pos_embed"]
    return saved("w.pt", {**state, "extra": torch.zeros(1)})


def wrapped_weights():
    state = unetr.UNETR(unetr.UNETRConfig(**SMALL)).state_dict()
    return saved("w.pt", {f"module.{name}": weight for name, weight in state.items()})


def truncated():
    whole = (ROOT / "sample.png").read_bytes()
    return damaged("half.png", whole[: len(whole) // 2])


def unreadable_socket():
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("socket.png")
    return "socket.png"


DO_IMAGE = r"; a file that Pillow opens would do"
BAD = {
    "image missing": (lambda: ["none.png"], r"cannot read none\.png as an image \(No such file.*\)" + DO_IMAGE),
    "image a folder": (lambda: ["."], r"cannot read \. as an image \(Is a directory\)" + DO_IMAGE),
    "image empty": (lambda: [damaged("e.png", b"")], r"cannot read e\.png as an image \(cannot identify.*\)" + DO_IMAGE),
    "image truncated": (lambda: [truncated()], r"cannot read half\.png as an image \(.*truncated.*\)" + DO_IMAGE),
    "no image": (lambda: [damaged("t.png", b"text" * 99)], r"cannot read t\.png as an image \(cannot ident.*\)" + DO_IMAGE),
    "a device file": (lambda: ["/dev/null"], r"cannot read /dev/null as an image \(cannot identify.*\)" + DO_IMAGE),
    "a socket": (lambda: [unreadable_socket()], r"cannot read socket\.png as an image \(No such device.*\)" + DO_IMAGE),
    "size": (lambda: ["--image-size", "250"], r"image_size must be a multiple of patch_size 16 on both sides, got 250; "
             r"height 240 or 256 and width 240 or 256 would do"),
    "sizes": (lambda: ["--image-size", "64x100"], r"image_size must be .*, got \(64, 100\); "
              r"height 64 or 80 and width 96 or 112 would do"),
    "patch": (lambda: ["--patch-size", "12"], r"patch_size must be a power of two from 2 up, got 12; 16 would do"),
    "heads": (lambda: ["--num-heads", "7"], r"hidden_dim must be a multiple of num_heads 7, got 24; 21 or 28 would do"),
    "zero": (lambda: ["--num-layers", "0"], r"num_layers must be a whole number from 1 to 1000000, got 0; 12 would do"),
    "negative": (lambda: ["--mlp-dim", "-4"], r"mlp_dim must be a whole number from 1 to .*, got -4; 3072 would do"),
    "no number": (lambda: ["--hidden-dim", "big"], r"hidden_dim must be a whole number .*, got 'big'; 768 would do"),
    "broken": (lambda: ["--patch-size", "8.5"], r"patch_size must be a whole number .*, got 8\.5; 16 would do"),
    "sizes of nothing": (lambda: ["--image-size", "x"], r"image_size must be a whole number .*, got 'x'; 256 would do"),
    "out of range": (lambda: ["--dropout-rate", "1.5"], r"dropout_rate must be a number from 0 .*, got 1\.5; 0\.1 would do"),
    "beyond memory": (lambda: ["--hidden-dim", "999999"], r"this network and image size need more memory than there is; .*"),
    "channels": (lambda: ["--in-channels", "5"], r"an image file is read with in_channels 1 \(grey\) or 3 \(RGB\), got 5; "
                 r"the class UNETR itself takes any number"),
    "seed negative": (lambda: ["--seed", "-1"], r"seed must be a whole number from 0 to 2\*\*63 - 1, got -1; 0 would do"),
    "seed too large": (lambda: ["--seed", 2**63], r"seed must be .*, got 9223372036854775808; 0 would do"),
    "seed no number": (lambda: ["--seed", "x"], r"seed must be a whole number .*, got 'x'; 0 would do"),
    "device": (lambda: ["--device", "abacus"], r"device must be one that is there, got 'abacus'; .*cpu would do"),
    "device known but absent": (lambda: ["--device", "meta"], r"device must be one .*, got 'meta'; .*cpu would do"),
    "option": (lambda: ["--colour"], r"unrecognized arguments: --colour; --help lists what would do"),
    "option without value": (lambda: ["--seed"], r"argument --seed: expected one argument; --help lists what would do"),
    "weights missing": (lambda: ["--weights", "w.pt"], r"cannot read the weights w\.pt: No such file or directory"),
    "weights a folder": (lambda: ["--weights", "."], r"cannot read the weights \.: Is a directory"),
    "weights empty": (lambda: ["--weights", damaged("w.pt", b"")], r"w\.pt holds no weights, or is damaged; a file that torch\.save\(model\.state_dict\(\), FILE\) wrote would do"),
    "weights no weights": (lambda: ["--weights", damaged("w.pt", b"text" * 99)], r"w\.pt holds no weights, or is damaged; .*"),
    "weights a pickle": (lambda: ["--weights", saved("w.pt", {"x": Path("y")})], r"w\.pt holds no weights, or is damaged; .*"),
    "weights another pickle": (lambda: ["--weights", damaged("w.pt", pickle.dumps({"x": 1.5}, protocol=4))],
                               r"w\.pt holds no weights, or is damaged; .*"),
    "weights a list": (lambda: ["--weights", saved("w.pt", [1])], r"w\.pt does not fit; weights of this configuration would do: Expected state_dict .*"),
    "weights unfitting": (lambda: ["--weights", other_weights()], r"w\.pt does not fit; weights of this configuration would do: .*"
                          r'.*Missing .*"pos_embed".* Unexpected .*"extra".*head.weight.*\[2, 4, 1, 1\].*\[1, 4, 1, 1\]\)\.'),
    "weights of a wrapped model": (lambda: ["--weights", wrapped_weights()], r"w\.pt does not fit; .* Missing key.*"
                                   r'"pos_embed", .* \[\.\.\.\] Unexpected key.*"module\.pos_embed", .* \[\.\.\.\]'),
    "output's folder missing": (lambda: ["--output", "none/o.png"], r"the output's folder .*none does not exist; make it .*"),
    "output's ending unknown": (lambda: ["--output", "o.xyz"], r"the output's ending must be one of .*pdf, .*svg.*, got 'o\.xyz'"),
    "output without ending": (lambda: ["--output", "png"], r"the output's ending must be one of .*png.*, got 'png'"),
    "output a folder": (lambda: ["--output", "."], r"the output must be a file, got the folder .*; .*unetr-2d\.png would do"),
    "output is the input": (lambda: [damaged("i.png", (ROOT / "sample.png").read_bytes()), "--output", "i.png"],
                            r"the output must not replace an input, got .*i\.png for both; another name would do"),
    "output is the weights": (lambda: ["--weights", other_weights(), "--output", damaged("w.png", b"")],
                              r"w\.pt does not fit; weights of this configuration would do: .*"),
}  # fmt: skip


def check(case, code, printed, before):
    _, sentence = BAD[case]
    assert code == 2
    assert re.fullmatch(f"UNETR-2D\\.py: error: {sentence}\n", printed), printed
    assert len(printed) < 700
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def prepare(case):
    arguments = BAD[case][0]()
    Path("unetr-2d.png").write_bytes(b"old")
    return arguments, {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_before_the_forward_pass(case, here, capsys, monkeypatch):
    arguments, before = prepare(case)
    monkeypatch.setattr(unetr.UNETR, "forward", lambda *_: pytest.fail("the forward pass was run"))
    code = call(*arguments)
    check(case, code, capsys.readouterr().err, before)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_the_command(case, here):
    arguments, before = prepare(case)
    done = start(*arguments, cwd=here)
    check(case, done.returncode, done.stderr, before)


def test_pillows_safety_limit_ends_the_command(here, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    assert call() == 2 and "exceeds limit of 60000 pixels" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_an_output_that_may_not_be_written(here, capsys, monkeypatch):
    def refuse(refused):  # root may write anywhere, so that a mode would not do
        monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (refused, os.W_OK))

    output = here / "unetr-2d.png"
    sentence = f"UNETR-2D.py: error: the output {output} may not be written; another name would do\n"
    refuse(here)
    assert call() == 2 and capsys.readouterr().err == sentence and not output.exists()
    output.write_bytes(b"old")
    for refused in (here, output):
        refuse(refused)
        assert call() == 2 and capsys.readouterr().err == sentence and output.read_bytes() == b"old"


def test_a_fault_of_the_program_is_not_hidden(here, monkeypatch):
    def fail(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(unetr.UNETR, "forward", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        call()
