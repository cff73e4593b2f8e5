"""The command: what it prints and writes; mistakes end in one sentence, bugs in a traceback."""

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
UNTRAINED = "Output of an untrained network: meaningless"
TABLE = """
module input output class
encoder.patch_embed (1, 3, 16, 32) (1, 32, 24) PatchEmbed
encoder.blocks.1 (1, 32, 24) (1, 32, 24) TransformerBlock
encoder.blocks.4 (1, 32, 24) (1, 32, 24) TransformerBlock
decoder.0.up (1, 24, 4, 8) (1, 8, 8, 16) GreenBlock
decoder.0.skip (1, 24, 4, 8) (1, 8, 8, 16) BlueBlock
decoder.0.merge1 (1, 16, 8, 16) (1, 8, 8, 16) OrangeBlock
decoder.0.merge2 (1, 8, 8, 16) (1, 8, 8, 16) OrangeBlock
decoder.1.up (1, 8, 8, 16) (1, 4, 16, 32) GreenBlock
decoder.1.skip (1, 3, 16, 32) (1, 4, 16, 32) OrangeBlock OrangeBlock
decoder.1.merge1 (1, 8, 16, 32) (1, 4, 16, 32) OrangeBlock
decoder.1.merge2 (1, 4, 16, 32) (1, 4, 16, 32) OrangeBlock
head (1, 4, 16, 32) (1, 1, 16, 32) GreyBlock
"""


def start(script, *arguments, cwd, **environment):
    """The output of the script, started as a user does, without a display."""
    environment = {**os.environ, **environment}
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        environment.pop(name, None)
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


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
    out, err = capsys.readouterr()
    assert out == ""
    usage, sentence = err.splitlines()
    assert re.fullmatch(r"usage: \S+ \[image\] \[options\]", usage)
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
    options = [*OPTIONS, "--patch-size", "4", "--image-size", "16", "32"]
    out = start(ROOT / "UNETR-2D.py", *options, cwd=tmp_path, MPLBACKEND="")
    assert [path.name for path in tmp_path.iterdir()] == ["unetr-2d.png"]
    head, table = re.sub(" +", " ", out).split("\nmodule")
    assert ("\nmodule" + table).startswith(TABLE)
    for text in ("image_size=[16, 32]", "29,101 parameters", "sample.png", "(16, 32)"):
        assert text in head
    assert out.endswith(f"{tmp_path / 'unetr-2d.png'}\n")


def test_running_the_network_leaves_no_hook_and_no_gradient_behind(capsys):
    model, image = unetr.UNETR(small()).eval(), torch.rand(1, 3, 96, 32)
    own = model.head.register_forward_hook(lambda *args: None)  # is left alone
    logits = unetr.run_and_print(model, image)
    assert torch.equal(logits, model(image))
    assert not logits.requires_grad
    assert [hook for m in model.modules() for hook in m._forward_hooks] == [own.id]
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + 1 + 4 + 4 * 4 + 1
    model.head.forward = lambda x: pytest.fail("the head failed")
    with pytest.raises(pytest.fail.Exception):
        unetr.run_and_print(model, image)
    assert capsys.readouterr().out.splitlines() == rows[:-1]  # printed as the blocks finish


def test_every_option_has_its_effect(here, capsys):
    Image.new("L", (9, 9)).save("scan.png")
    options = """scan.png --seed 4321 --device cpu --image-size 64 96 --patch-size 32
                 --in-channels 1 --out-channels 4 --hidden-dim 36 --num-layers 6 --num-heads 4
                 --mlp-dim 72 --feature-size 8"""
    unetr.main(options.split())
    config = unetr.UNETRConfig([64, 96], 32, 1, 4, 36, 6, 4, 72, 0.0, 8)
    out = capsys.readouterr().out
    for text in (str(config), "scan.png", "4321", "parameters on cpu", "(64, 96)"):
        assert text in out


def test_help_states_every_default(capsys):
    with pytest.raises(SystemExit) as exit:
        unetr.main(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    defaults = {**vars(unetr.UNETRConfig()), "seed": 0, "output": "unetr-2d.png"}
    defaults["image_size"] = r"\(256, 256\)"
    del defaults["dropout_rate"]
    for name, value in defaults.items():
        option = f"--{name.replace('_', '-')}"
        assert re.search(rf"{option} [A-Z][^-]*\(default: {value}\)", text), option
    assert "dropout" not in text


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
    plt.figure("of the caller")
    for name, options, seed in (("a.png", [], 0), ("b.png", ["--seed", 3], 3)):
        call("--output", name, *options)
        assert plt.fignum_exists("of the caller")
        torch.manual_seed(seed)
        expected = expected_figure(unetr.UNETR(small()).eval(), UNTRAINED)
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


def test_the_network_runs_on_an_available_accelerator_by_default(here, monkeypatch, capsys):
    seen, accelerator, meta = [], None, torch.device("meta")  # every machine has the meta device

    def record(self, image):
        seen.append((image.device.type, self.head.weight.device.type))
        return torch.zeros(1, 1, 64, 64, device=image.device)

    def current_accelerator(check_available=False):  # PyTorch can know of one without a driver
        return accelerator if check_available else meta

    monkeypatch.setattr(unetr.UNETR, "forward", record)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    call()
    accelerator = meta
    call("--device", "cpu")
    assert "meta" not in capsys.readouterr().out
    with pytest.raises(NotImplementedError, match="meta"):  # the logits cannot be copied to the CPU
        call()
    assert "parameters on meta" in capsys.readouterr().out
    assert seen == [("cpu", "cpu"), ("cpu", "cpu"), ("meta", "meta")]


# The figure that is written


def test_a_link_to_the_script_opens_a_window_of_the_users_backend(tmp_path):
    (tmp_path / "recorder.py").write_text(
        "import os\n"
        "from matplotlib.backends.backend_agg import FigureCanvasAgg as FigureCanvas\n"
        "def show(*args, **options): print('a window', os.listdir('.'))\n"
    )
    (tmp_path / "link.py").symlink_to(ROOT / "UNETR-2D.py")
    (tmp_path / "here").mkdir()
    settings = dict(cwd=tmp_path / "here", MPLBACKEND="module://recorder", PYTHONPATH=str(tmp_path))
    out = start(tmp_path / "link.py", *OPTIONS, **settings)
    assert out.endswith("unetr-2d.png\na window ['unetr-2d.png']\n")
    assert "window" not in start(tmp_path / "link.py", "--no-show", *OPTIONS, **settings)


@pytest.mark.parametrize(
    "extension, first", [("PNG", b"\x89PNG"), ("jpg", b"\xff\xd8\xff"), ("pdf", b"%PDF")]
)
def test_the_extension_decides_the_format(here, extension, first):
    call("--output", f"a.b.{extension}")
    (written,) = here.iterdir()
    assert written.name == f"a.b.{extension}"
    assert written.read_bytes().startswith(first)


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("words", ["in.png", "", "--weights in.png"])
def test_an_input_is_never_overwritten_also_through_a_link(here, capsys, monkeypatch, link, words):
    if not words:
        monkeypatch.setattr(unetr, "SAMPLE", Path("in.png"))
    if "--weights" in words:
        unetr.save_checkpoint(unetr.UNETR(small()), "in.png")
    else:
        Path("in.png").write_bytes((ROOT / "sample.png").read_bytes())
    content = Path("in.png").read_bytes()
    link("in.png", "out.png")
    for output in ("in.png", "out.png", here / "out.png"):
        sentence = refused(capsys, *words.split(), "--output", output)
        assert "--output" in sentence
        assert str(output) in sentence
        assert Path("in.png").read_bytes() == content


# Errors


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder of files that the command refuses, weights that it accepts, and an older figure."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "unetr-2d.png").write_bytes(b"an older figure")
    (folder / "text.png").write_bytes(b"text" * 99)
    (folder / "truncated.png").write_bytes((ROOT / "sample.png").read_bytes()[:9000])
    Image.fromarray(np.full((9, 9), np.nan, dtype=np.float32)).save(folder / "nan.tif")
    model = unetr.UNETR(small())
    unetr.save_checkpoint(model, folder / "good.pt")
    unetr.save_checkpoint(unetr.UNETR(small(in_channels=5)), folder / "five.pt")
    torch.save(model.state_dict(), folder / "state.pt")
    checkpoint = torch.load(folder / "good.pt", weights_only=True)
    checkpoint["config"]["out_channels"] = 2
    torch.save(checkpoint, folder / "head.pt")
    return folder


BAD = {  # the arguments, and the option, file or value that the sentence names
    "none.png": ["none.png"],
    ".": ["'.'"],
    "text.png": ["text.png"],
    "truncated.png": ["truncated.png"],
    "nan.tif": ["nan.tif"],
    "--in-channels 5": ["in_channels", "5"],
    "--image-size 250 256": ["image_size", "16", "[250, 256]"],
    "--image-size 64": ["--image-size", "2"],
    "--patch-size 12": ["patch_size", "12"],
    "--mlp-dim -4": ["mlp_dim must be at least 1, got -4"],
    "--hidden-dim big": ["--hidden-dim", "'big'"],
    "--device tpu": ["--device", "'tpu'", "cpu"],
    "--dropout-rate 0.5": ["--dropout-rate"],
    "--weights none.pt": ["none.pt"],
    "--weights .": ["'.'"],
    "--weights text.png": ["text.png"],
    "--weights state.pt": ["state.pt", "config and state_dict"],
    "--weights head.pt": ["head.pt", "head.weight"],
    "--weights five.pt": ["in_channels", "5"],
    "--weights good.pt --seed 0": ["not allowed with --weights: seed"],
    "--weights good.pt --num-heads 12 --image-size 64 64": ["--weights: image_size, num_heads"],
    "--weights good.pt none.png": ["none.png"],
    "--output o": ["--output", ".png", ".pdf", " o"],
    "--output .png": ["--output", " .png"],
    "--output o.xyz": ["--output", "o.xyz"],
    "--output none/a.png": ["--output must be in an existing folder, got none/a.png"],
}


@pytest.mark.parametrize("words", BAD)
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about pickles
def test_an_error_is_one_sentence_before_the_forward_pass(words, bad_files, capsys, monkeypatch):
    monkeypatch.chdir(bad_files)
    monkeypatch.setattr(unetr.UNETR, "forward", lambda *args: pytest.fail("the network was run"))
    before = {path: path.read_bytes() for path in bad_files.iterdir()}
    small_sizes = [] if "--weights" in words else OPTIONS
    sentence = refused(capsys, *small_sizes, *words.split())
    assert len(sentence) < 500
    for part in (": error: ", *BAD[words]):
        assert part in sentence
    assert {path: path.read_bytes() for path in bad_files.iterdir()} == before


def test_an_empty_list_of_arguments_is_not_that_of_the_process(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "--unknown"])
    monkeypatch.setattr(unetr, "SAMPLE", Path("none.png"))
    assert "none.png" in refused(capsys)


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
