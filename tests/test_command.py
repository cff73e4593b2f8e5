"""The command: what it prints and writes; every likely mistake ends in one sentence."""

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, small, unetr
from PIL import Image

SIZES = {**SMALL, "image_size": "64 64"}
OPTIONS = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SIZES.items()).split()
SCRIPT = ROOT / "UNETR-2D.py"
TABLE = """
module input output class
encoder.patch_embed (1, 3, 64, 64) (1, 16, 24) PatchEmbed
encoder.blocks.0 (1, 16, 24) (1, 16, 24) TransformerBlock
encoder.blocks.1 (1, 16, 24) (1, 16, 24) TransformerBlock
encoder.blocks.3 (1, 16, 24) (1, 16, 24) TransformerBlock
encoder.blocks.4 (1, 16, 24) (1, 16, 24) TransformerBlock
decoder.0.up (1, 24, 4, 4) (1, 32, 8, 8) GreenBlock
decoder.0.skip (1, 24, 4, 4) (1, 32, 8, 8) BlueBlock
decoder.0.merge1 (1, 64, 8, 8) (1, 32, 8, 8) OrangeBlock
decoder.0.merge2 (1, 32, 8, 8) (1, 32, 8, 8) OrangeBlock
decoder.1.up (1, 32, 8, 8) (1, 16, 16, 16) GreenBlock
decoder.1.skip (1, 24, 4, 4) (1, 16, 16, 16) BlueBlock BlueBlock
decoder.1.merge1 (1, 32, 16, 16) (1, 16, 16, 16) OrangeBlock
decoder.1.merge2 (1, 16, 16, 16) (1, 16, 16, 16) OrangeBlock
decoder.2.up (1, 16, 16, 16) (1, 8, 32, 32) GreenBlock
decoder.2.skip (1, 24, 4, 4) (1, 8, 32, 32) BlueBlock BlueBlock BlueBlock
decoder.2.merge1 (1, 16, 32, 32) (1, 8, 32, 32) OrangeBlock
decoder.2.merge2 (1, 8, 32, 32) (1, 8, 32, 32) OrangeBlock
decoder.3.up (1, 8, 32, 32) (1, 4, 64, 64) GreenBlock
decoder.3.skip (1, 3, 64, 64) (1, 4, 64, 64) OrangeBlock OrangeBlock
decoder.3.merge1 (1, 8, 64, 64) (1, 4, 64, 64) OrangeBlock
decoder.3.merge2 (1, 4, 64, 64) (1, 4, 64, 64) OrangeBlock
head (1, 4, 64, 64) (1, 1, 64, 64) GreyBlock
"""


def start(script, *arguments, cwd, **environment):
    """Start the script as a user does. Returns the exit status, the output, and the errors.

    Several spaces in the output become one.
    """
    hidden = ("DISPLAY", "WAYLAND_DISPLAY")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    variables |= environment
    command = [sys.executable, script, *arguments]
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
        unetr.main(list(map(str, arguments)))
    assert exit.value.code == 2
    usage, sentence = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: UNETR-2D.py [image]")
    return sentence


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def expected_figure(model, title):
    """The pixels of the figure that shows the sample and this model's output for it."""
    with torch.inference_mode():
        image = unetr.load_image(ROOT / "sample.png", model.config)
        unetr.draw(image, model(image), model.config.patch_size, title).savefig("expected.png")
    return pixels("expected.png")


# Output


def test_it_prints_each_block_and_writes_the_figure_without_a_display(tmp_path):
    code, out, err = start(SCRIPT, *OPTIONS, cwd=tmp_path, MPLBACKEND="")
    assert (code, err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["unetr-2d.png"]
    head, table = out.split("\nmodule")
    assert ("\nmodule" + table).startswith(TABLE)
    for text in (str(small(image_size=[64, 64])), "107,021 parameters", "sample.png", "(64, 64)"):
        assert text in head
    assert out.endswith(f"{tmp_path / 'unetr-2d.png'}\n")


def test_running_the_network_leaves_no_hook_and_no_gradient_behind(capsys):
    model, image = unetr.UNETR(small()).eval(), torch.rand(1, 3, 96, 32)
    logits = unetr.run_and_print(model, image)
    assert torch.equal(logits, model(image))
    assert not logits.requires_grad
    assert not any(module._forward_hooks for module in model.modules())
    assert capsys.readouterr().out.count("\n") == TABLE.strip().count("\n") + 1


def test_it_prints_what_was_asked_for(here, capsys):
    Image.new("L", (9, 9)).save("scan.png")
    call("scan.png", "--image-size", 32, 96, "--seed", 4321, "--device", "cpu")
    out = capsys.readouterr().out
    for text in ("scan.png", "(32, 96)", "4321", "parameters on cpu"):
        assert text in out


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
    for name, options, seed in (("a.png", [], 0), ("b.png", ["--seed", 3], 3)):
        call("--output", name, *options)
        torch.manual_seed(seed)
        expected = expected_figure(
            unetr.UNETR(small()).eval(), "Output of an untrained network: meaningless"
        )
        assert np.array_equal(pixels(name), expected)
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))


@pytest.mark.parametrize(
    "sizes", [{}, dict(image_size=(32, 96), patch_size=8, num_heads=4), dict(out_channels=3)]
)
def test_weights_bring_their_own_sizes(here, capsys, sizes):
    torch.manual_seed(11)
    model = unetr.UNETR(small(**sizes)).eval()
    torch.nn.init.normal_(model.encoder.pos_embed)
    unetr.save_checkpoint(model, "weights.pt")
    unetr.main(["--weights", "weights.pt"])
    out = capsys.readouterr().out
    assert str(model.config) in out
    assert "weights: weights.pt\n" in out
    assert np.array_equal(pixels("unetr-2d.png"), expected_figure(model, "Output"))


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


def test_every_field_of_the_configuration_but_dropout_is_an_option(here, capsys):
    options = """--image-size 64 96 --patch-size 32 --in-channels 1 --out-channels 4 --hidden-dim 36
                 --num-layers 6 --num-heads 4 --mlp-dim 72 --feature-size 8"""
    unetr.main(options.split())
    config = unetr.UNETRConfig([64, 96], 32, 1, 4, 36, 6, 4, 72, 0.0, 8)
    assert str(config) in capsys.readouterr().out


def test_help_states_every_default(capsys):
    with pytest.raises(SystemExit) as exit:
        unetr.main(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    defaults = {**vars(unetr.UNETRConfig()), "seed": 0, "output": "unetr-2d.png"}
    defaults["image_size"] = "256 256"
    del defaults["dropout_rate"]
    for name, value in defaults.items():
        option = f"--{name.replace('_', '-')}"
        assert re.search(rf"{option} [A-Z][^-]*\(default: {value}\)", text), option
    assert "dropout" not in text


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


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("option", ["", "--weights"])
def test_an_input_is_never_overwritten_also_through_a_link(here, capsys, link, option):
    if option:
        unetr.save_checkpoint(unetr.UNETR(small()), "in.png")
    else:
        Path("in.png").write_bytes((ROOT / "sample.png").read_bytes())
    content = Path("in.png").read_bytes()
    link("in.png", "out.png")
    for output in ("in.png", "out.png", here / "out.png"):
        sentence = refused(capsys, *option.split(), "in.png", "--output", output)
        assert "--output" in sentence
        assert str(output) in sentence
        assert Path("in.png").read_bytes() == content


# Errors


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder of files that the command refuses, and weights that it accepts."""
    folder = tmp_path_factory.mktemp("bad")
    sample = (ROOT / "sample.png").read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"text" * 99)
    (folder / "truncated.png").write_bytes(sample[:9000])
    Image.fromarray(np.full((9, 9), np.nan, dtype=np.float32)).save(folder / "nan.tif")
    model = unetr.UNETR(small())
    unetr.save_checkpoint(model, folder / "good.pt")
    torch.save(model.state_dict(), folder / "state.pt")
    checkpoint = torch.load(folder / "good.pt", weights_only=True)
    checkpoint["config"]["out_channels"] = 2
    torch.save(checkpoint, folder / "head.pt")
    unetr.save_checkpoint(unetr.UNETR(small(in_channels=5)), folder / "five.pt")
    return folder


BAD = {  # the arguments, and the option, file or value that the sentence names
    "none.png": ["none.png"],
    "empty.png": ["empty.png"],
    "text.png": ["text.png"],
    "truncated.png": ["truncated.png"],
    "nan.tif": ["nan.tif"],
    "--in-channels 5": ["in_channels", "5"],
    "--image-size 250 256": ["image_size", "16", "[250, 256]"],
    "--image-size 64": ["--image-size", "2"],
    "--image-size 64 x": ["--image-size", "'x'"],
    "--patch-size 12": ["patch_size", "12"],
    "--mlp-dim -4": ["mlp_dim", "-4"],
    "--hidden-dim big": ["--hidden-dim", "'big'"],
    "--seed x": ["--seed", "'x'"],
    "--device tpu": ["--device", "'tpu'", "cpu"],
    "--color": ["--color"],
    "--dropout-rate 0.5": ["--dropout-rate"],
    "--weights none.pt": ["none.pt"],
    "--weights .": ["'.'"],
    "--weights empty.png": ["empty.png"],
    "--weights text.png": ["text.png"],
    "--weights state.pt": ["state.pt", "config and state_dict"],
    "--weights head.pt": ["head.pt", "head.weight"],
    "--weights five.pt": ["in_channels", "5"],
    "--weights good.pt --seed 0": ["--seed", "--weights"],
    "--weights good.pt --image-size 64 64": ["--image-size", "--weights"],
    "--weights good.pt --num-heads 12": ["--num-heads", "--weights"],  # the default, but given
    "--weights good.pt none.png": ["none.png"],
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
    small_sizes = [] if "--weights" in words else OPTIONS
    sentence = refused(capsys, *small_sizes, *words.split())
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
    unused = f"{begin}--seed has no effect with --weights"
    assert refused(capsys, "--weights", "good.pt", "--seed", 1) == unused
    folder = "--output must be in an existing folder, got none/a.png"
    assert refused(capsys, "--output", "none/a.png") == begin + folder


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, TypeError])
@pytest.mark.parametrize("part", ["initialize", "GreyBlock.forward", "draw"])
@pytest.mark.parametrize("options", ["--seed 1", "--weights weights.pt"])
def test_a_bug_ends_in_its_traceback(here, monkeypatch, kind, part, options):
    unetr.save_checkpoint(unetr.UNETR(small()), "weights.pt")

    def bug(*args, **kwargs):
        raise kind("a bug")

    owner, _, name = part.rpartition(".")
    monkeypatch.setattr(getattr(unetr, owner) if owner else unetr, name, bug)
    with pytest.raises(kind, match=r"^a bug$"):
        unetr.main(options.split())
    assert not Path("unetr-2d.png").exists()
