"""The command: what it prints and writes; every likely error is one sentence."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, small, unetr
from PIL import Image

OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
SCRIPT = ROOT / "UNETR-2D.py"
ROWS = """
encoder.patch_embed (1, 3, 64, 64) (1, 16, 24) linear
encoder.blocks.0 (1, 16, 24) (1, 16, 24) Transformer layer 1
encoder.blocks.1 (1, 16, 24) (1, 16, 24) Transformer layer 2
encoder.blocks.3 (1, 16, 24) (1, 16, 24) Transformer layer 4
encoder.blocks.4 (1, 16, 24) (1, 16, 24) Transformer layer 5
decoder.0.skip (1, 24, 4, 4) (1, 32, 8, 8) blue
decoder.0 (1, 24, 4, 4) (1, 32, 8, 8) green orange orange
decoder.1.skip (1, 24, 4, 4) (1, 16, 16, 16) blue blue
decoder.1 (1, 32, 8, 8) (1, 16, 16, 16) green orange orange
decoder.2.skip (1, 24, 4, 4) (1, 8, 32, 32) blue blue blue
decoder.2 (1, 16, 16, 16) (1, 8, 32, 32) green orange orange
decoder.3.skip (1, 3, 64, 64) (1, 4, 64, 64) orange orange
decoder.3 (1, 8, 32, 32) (1, 4, 64, 64) green orange orange
head (1, 4, 64, 64) (1, 1, 64, 64) grey
"""


def start(*command, cwd, **environment):
    """Start Python as a user does. Returns the exit status, the output, and the errors.

    Several spaces in the output become one.
    """
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "PYTHONUNBUFFERED")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    variables |= environment
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    return done.returncode, re.sub(" +", " ", done.stdout), done.stderr


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plt.close("all")


def call(*arguments):
    unetr.main([*OPTIONS, *map(str, arguments)])


def refused(capsys, *arguments):
    """The sentence with which the command ends."""
    with pytest.raises(SystemExit) as exit:
        call(*arguments)
    assert exit.value.code == 2
    usage, sentence = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: UNETR-2D.py [image]")
    return sentence


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def expected_figure(model, path, trained):
    """The figure that shows the sample and this model's output for it."""
    with torch.inference_mode():
        image = unetr.load_image(ROOT / "sample.png", model.config)
        unetr.draw(image, model(image), model.config, trained).savefig(path)
    return pixels(path)


# Output


def test_it_prints_each_stage_and_writes_the_figure_without_a_display(tmp_path):
    code, out, err = start(SCRIPT, *OPTIONS, cwd=tmp_path, MPLBACKEND="")
    assert (code, err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["unetr-2d.png"]
    head, table = out.split("encoder.patch_embed", maxsplit=1)
    assert ROWS.strip() in "encoder.patch_embed" + table
    for text in (str(small()), "107,021 parameters", "sample.png", "64 x 64"):
        assert text in head
    assert head.endswith("module input output blocks\n")
    for legend in ("orange: conv 3x3", "green: transposed conv 2x2", "blue: green", "grey: conv"):
        assert legend in head
    assert "forward pass:" in table
    assert out.endswith(f"{tmp_path / 'unetr-2d.png'}\n")
    assert "\033" not in out


def test_a_pipe_sees_each_stage_as_it_finishes(tmp_path):
    code = f"""
import importlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
unetr = importlib.import_module("UNETR-2D")
unetr.GreyBlock.forward = lambda self, x: os._exit(3)  # nothing that is still buffered is printed
unetr.main({OPTIONS!r})
"""
    status, out, _ = start("-c", code, cwd=tmp_path)
    assert status == 3
    assert "decoder.3 (1, 8, 32, 32) (1, 4, 64, 64)" in out


def rgb(code):
    """The color of a code of the 256-color palette, without its first 16."""
    if code >= 232:
        return (code - 232,) * 3
    return ((code - 16) // 36, (code - 16) // 6 % 6, (code - 16) % 6)


def test_blocks_have_their_own_color_on_a_terminal(here, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    call()
    assert "\033" not in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "")
    call()
    out = capsys.readouterr().out
    painted = re.findall(r"\033\[[\d;]*48;5;(\d+)m ?(\w+) ?\033\[0m", out)
    colors = {name: rgb(int(code)) for code, name in painted}
    assert len(set(painted)) == 4
    assert colors["orange"][0] > colors["orange"][1] > colors["orange"][2]
    assert colors["green"][1] > max(colors["green"][0], colors["green"][2])
    assert colors["blue"][2] > max(colors["blue"][0], colors["blue"][1])
    assert len(set(colors["grey"])) == 1
    rows = [line for line in out.splitlines() if line.startswith(("decoder.", "head"))]
    assert str(rows).count("[0m") == 1 + 1 + 2 + 3 + 2 + 4 * 3  # head, skips, stages


def test_it_prints_what_was_asked_for_and_how_long_it_took(here, monkeypatch, capsys):
    def forward(self, image):
        time.sleep(0.2)
        return torch.zeros(1, 1, 32, 96)

    def load_image(path, config):
        time.sleep(1)
        return torch.zeros(1, 3, 32, 96)

    monkeypatch.setattr(unetr.UNETR, "forward", forward)
    monkeypatch.setattr(unetr, "load_image", load_image)
    Image.new("L", (9, 9)).save("scan.png")
    call("scan.png", "--image-size", "32x96", "--seed", "4321", "--device", "cpu")
    out = capsys.readouterr().out
    for text in ("scan.png", "32 x 96", "4321", "cpu"):
        assert text in out
    seconds = float(re.search(r"(-?[\d.]+) s\n", out)[1])
    assert 0.2 <= seconds < 1  # of the forward pass alone


# The network that is run


def test_the_forward_pass_is_a_prediction(here, monkeypatch):
    seen, forward = [], unetr.UNETR.forward

    def watch(self, image):
        seen.append((self.training, torch.is_grad_enabled()))
        return forward(self, image).detach()

    monkeypatch.setattr(unetr.UNETR, "forward", watch)
    call()
    assert seen == [(False, False)]
    assert torch.is_grad_enabled()  # afterwards, for whoever calls main()


def test_the_figure_is_that_of_a_network_built_with_the_seed(here):
    for name, options, seed in (("a.png", [], 0), ("b.png", ["--seed", "3"], 3)):
        call("--output", name, *options)
        torch.manual_seed(seed)
        model = unetr.UNETR(small()).eval()
        assert np.array_equal(pixels(name), expected_figure(model, "expected.png", trained=False))
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))


@pytest.mark.parametrize("size", ["64", "32x96", "128x32"])
def test_weights_are_used_also_at_another_image_size(here, capsys, size):
    torch.manual_seed(11)
    saved = unetr.UNETR(small()).eval()
    torch.nn.init.normal_(saved.encoder.pos_embed)
    torch.save({name: tensor.double() for name, tensor in saved.state_dict().items()}, "weights.pt")
    call("--weights", "weights.pt", "--image-size", size)
    assert "weights.pt" in capsys.readouterr().out
    sides = [int(side) for side in size.split("x")]
    model = unetr.UNETR(small(image_size=sides if len(sides) == 2 else sides[0])).eval()
    model.load_state_dict(saved.state_dict())
    difference = abs(pixels("unetr-2d.png") - expected_figure(model, "expected.png", trained=True))
    assert difference.mean() < 0.1


def test_image_and_network_are_on_the_accelerator_by_default(here, monkeypatch, capsys):
    seen = []

    def record(self, image):
        seen.append((image.device.type, self.head.weight.device.type))
        return torch.zeros(1, 1, 64, 64)

    monkeypatch.setattr(unetr.UNETR, "forward", record)

    def pretend(device):
        """Is there an accelerator? PyTorch can know of one that no driver makes available."""

        def current_accelerator(check_available=False):
            return device if check_available else torch.device("meta")

        monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: device is not None)

    pretend(None)
    call()
    pretend(torch.device("meta"))  # every machine has the meta device
    call()
    assert "meta" in capsys.readouterr().out
    call("--device", "cpu")
    assert "meta" not in capsys.readouterr().out
    assert seen == [("cpu", "cpu"), ("meta", "meta"), ("cpu", "cpu")]


def test_logits_are_brought_back_from_the_accelerator(here, monkeypatch):
    device = torch.device("meta")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: device)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(unetr, "draw", lambda *args, **options: pytest.fail("not brought back"))
    with pytest.raises(NotImplementedError, match="meta"):  # which nothing can be copied from
        call()


def test_weights_saved_on_an_accelerator_are_loaded_without_it(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        torch.save(unetr.UNETR(small()).state_dict(), "weights.pt")
    call("--weights", "weights.pt")


def test_every_field_of_the_configuration_is_an_option(here, capsys):
    options = """--image-size 64x96 --patch-size 32 --in-channels 1 --out-channels 4
                 --hidden-dim 36 --num-layers 6 --num-heads 4 --mlp-dim 72
                 --dropout-rate 0.25 --feature-size 8"""
    unetr.main(options.split())
    assert (
        str(unetr.UNETRConfig((64, 96), 32, 1, 4, 36, 6, 4, 72, 0.25, 8)) in capsys.readouterr().out
    )


def test_help_states_every_default(capsys):
    with pytest.raises(SystemExit) as exit:
        unetr.main(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, value in vars(unetr.UNETRConfig()).items():
        option = f"--{name.replace('_', '-')}"
        assert re.search(rf"{option} {name.upper()} [^-]*\(default: {value}\)", text), option


# The figure that is written


def test_a_window_shows_the_saved_figure_unless_the_user_wants_none(here, monkeypatch):
    shown = []

    def show(**options):
        open_figures = [plt.figure(number) for number in plt.get_fignums()]
        shown.append(
            (Image.open("unetr-2d.png").format, [len(figure.axes) for figure in open_figures])
        )

    monkeypatch.setattr(plt, "show", show)
    call("--no-show")
    assert shown == []
    plt.close("all")
    Path("unetr-2d.png").unlink()
    call()
    assert shown == [("PNG", [3])]  # two panels and a color bar


def test_a_link_to_the_script_opens_a_window_of_the_users_backend(tmp_path):
    (tmp_path / "recorder.py").write_text(
        "from matplotlib.backends.backend_agg import FigureCanvasAgg as FigureCanvas\n"
        "def show(*args, **options): print('a window')\n"
    )
    (tmp_path / "link.py").symlink_to(SCRIPT)
    environment = dict(MPLBACKEND="module://recorder", PYTHONPATH=str(tmp_path))
    code, out, err = start(tmp_path / "link.py", *OPTIONS, cwd=tmp_path, **environment)
    assert (code, err) == (0, "")
    assert out.endswith("unetr-2d.png\na window\n")


@pytest.mark.parametrize(
    "extension, first",
    [
        ("png", b"\x89PNG"),
        ("PNG", b"\x89PNG"),
        ("jpg", b"\xff\xd8\xff"),
        ("tif", b"II*\0"),
        ("webp", b"RIFF"),
        ("pdf", b"%PDF"),
        ("svg", b"<?xml"),
        ("svgz", b"\x1f\x8b"),
        ("eps", b"%!PS"),
    ],
)
def test_the_extension_decides_the_format(here, extension, first):
    call("--output", f"a.b.{extension}")
    (written,) = here.iterdir()
    assert written.name == f"a.b.{extension}"
    assert written.read_bytes().startswith(first)


def test_a_figure_that_cannot_be_written_is_one_sentence(here, capsys, monkeypatch):
    Path("a.png").mkdir()
    assert "'a.png'" in refused(capsys, "--output", "a.png")

    def savefig(*args, **options):
        raise ValueError("too large")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    assert "too large" in refused(capsys)


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("option", ["", "--weights"])
def test_an_input_is_never_overwritten_also_through_a_link(here, capsys, link, option):
    content = (ROOT / "sample.png").read_bytes()
    Path("in.png").write_bytes(content)
    link("in.png", "out.png")
    for output in ("in.png", "out.png", here / "out.png"):
        sentence = refused(capsys, *option.split(), "in.png", "--output", output)
        assert "--output" in sentence
        assert str(output) in sentence
        assert Path("in.png").read_bytes() == content


# Errors


class Executed:
    """Creates a file if it is unpickled without care."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder of files that the command refuses."""
    folder = tmp_path_factory.mktemp("bad")
    state = unetr.UNETR(small()).state_dict()
    sample = (ROOT / "sample.png").read_bytes()
    for name, content in {
        "empty.png": b"",
        "text.png": b"text" * 99,
        "truncated.png": sample[:9000],
        "damaged.pt": b"\x80\x02h\x00.",  # neither UnpicklingError nor RuntimeError in PyTorch
    }.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.full((9, 9), np.nan, dtype=np.float32)).save(folder / "nan.tif")
    weights = {
        "list": [1],
        "nested": {"state_dict": state, "epoch": 3},
        "numbers": {"encoder.pos_embed": 1},
        "object": Executed(),
        "head": {**state, "head.weight": torch.zeros(2, 4, 1, 1)},
        "flat": {**state, "encoder.pos_embed": torch.zeros(16, 24)},
        "oblong": {**state, "encoder.pos_embed": torch.zeros(1, 15, 24)},
        "wrapped": {f"module.{name}": tensor for name, tensor in state.items()},
    }
    for name, content in weights.items():
        torch.save(content, folder / f"{name}.pt")
    return folder


BAD = {  # the arguments, and the option, file or value that the sentence names
    "none.png": ["none.png"],
    "empty.png": ["empty.png"],
    "text.png": ["text.png"],
    "truncated.png": ["truncated.png"],
    "nan.tif": ["nan.tif"],
    "--in-channels 5": ["in_channels", "5"],
    "--image-size 250x256": ["image_size", "16", "(250, 256)"],
    "--image-size 64x": ["--image-size", "'64x'"],
    "--image-size 32X64": ["--image-size", "'32X64'"],
    "--image-size 1x2x3": ["--image-size", "'1x2x3'"],
    "--image-size 64px": ["--image-size", "'64px'"],
    "--image-size 8.5": ["--image-size", "'8.5'"],
    "--patch-size 12": ["patch_size", "12"],
    "--mlp-dim -4": ["mlp_dim", "-4"],
    "--dropout-rate 1.5": ["dropout", "1.5"],
    "--hidden-dim big": ["--hidden-dim", "'big'"],
    "--seed x": ["--seed", "'x'"],
    "--device tpu": ["--device", "'tpu'", "cpu"],
    "--color": ["--color"],
    "--weights none.pt": ["none.pt"],
    "--weights .": ["'.'"],
    "--weights empty.png": ["empty.png"],
    "--weights text.png": ["text.png"],
    "--weights damaged.pt": ["damaged.pt"],
    "--weights object.pt": ["object.pt"],
    "--weights list.pt": ["list.pt"],
    "--weights nested.pt": ["nested.pt"],
    "--weights numbers.pt": ["numbers.pt"],
    "--weights head.pt": ["head.pt", "head.weight"],
    "--weights flat.pt": ["flat.pt", "encoder.pos_embed"],
    "--weights oblong.pt": ["pos_embed", "15"],
    "--weights wrapped.pt": ["wrapped.pt", '"encoder.pos_embed"'],
    "--output o": ["--output", ".png", ".pdf", " o"],
    "--output o.": ["--output", " o."],
    "--output .png": ["--output", " .png"],
    "--output o.xyz": ["--output", "o.xyz"],
    "--output none/a.png": ["--output", "none/a.png"],
}


@pytest.mark.parametrize("words", BAD)
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about pickles
def test_an_error_is_one_sentence_before_the_forward_pass(words, bad_files, capsys, monkeypatch):
    monkeypatch.chdir(bad_files)
    monkeypatch.setattr(
        unetr.UNETR, "forward", lambda *args: pytest.fail("the forward pass was run")
    )
    before = {path: path.read_bytes() for path in bad_files.iterdir()}
    sentence = refused(capsys, *words.split())
    assert sentence.startswith("UNETR-2D.py: error: ")
    assert len(sentence) < 500
    for part in BAD[words]:
        assert part in sentence
    assert {path: path.read_bytes() for path in bad_files.iterdir()} == before


def test_an_error_ends_the_command_with_exit_status_2(tmp_path):
    (tmp_path / "unetr-2d.png").write_bytes(b"an older figure")
    code, out, err = start(SCRIPT, *OPTIONS, "none.png", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 2
    assert (tmp_path / "unetr-2d.png").read_bytes() == b"an older figure"


def test_one_sentence_of_each_kind(bad_files, capsys, monkeypatch):
    monkeypatch.chdir(bad_files)
    begin = "UNETR-2D.py: error: "
    assert refused(capsys, "--mlp-dim", -4) == f"{begin}mlp_dim must be at least 1, got -4"
    finite = "nan.tif must have finite pixels, got NaN or infinity"
    assert refused(capsys, "nan.tif") == begin + finite
    assert refused(capsys, "text.png").startswith(f"{begin}text.png is not a readable image: ")
    weights = "list.pt must contain a state_dict, which maps names to tensors"
    assert refused(capsys, "--weights", "list.pt") == begin + weights
    folder = "--output must be in an existing folder, got none/a.png"
    assert refused(capsys, "--output", "none/a.png") == begin + folder


def test_a_size_beyond_memory_fails_in_pytorch_before_the_image_is_read(here, monkeypatch):
    monkeypatch.setattr(unetr, "load_image", lambda *args: pytest.fail("the image was read"))
    with pytest.raises(RuntimeError, match=r"memory|alloc|size"):
        call("--image-size", 16_000_000)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, OSError])
@pytest.mark.parametrize("part", ["GreyBlock.forward", "draw"])
def test_a_bug_ends_in_its_traceback(here, monkeypatch, capsys, kind, part):
    def bug(*args, **kwargs):
        raise kind("a bug")

    owner, _, name = part.rpartition(".")
    monkeypatch.setattr(getattr(unetr, owner) if owner else unetr, name, bug)
    with pytest.raises(kind, match="a bug"):
        call()
    assert "decoder.3" in capsys.readouterr().out
    assert list(here.iterdir()) == []
