"""The README stays true: its commands, its Python blocks, its tables and its picture."""

import importlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_known_faults import FAULTS
from torch.utils.flop_counter import FlopCounterMode

unetr = importlib.import_module("UNETR-2D")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def table(header):
    """The rows under the header, each a list of its cells."""
    rows = README.split(f"\n{header}\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a newcomer's first command prints and draws, at the defaults."""
    folder = tmp_path_factory.mktemp("newcomer")
    command = [sys.executable, ROOT / "UNETR-2D.py", "--no-show", "--device", "cpu"]
    printed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    return printed, folder / "unetr-2d.png"


def test_both_commands_are_what_ci_runs():
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert len(blocks("sh")) == 2
    for command in blocks("sh"):
        assert command in ci


def test_requirements_of_the_tests_begin_with_those_of_the_script():
    assert (ROOT / "tests/requirements.txt").read_text().startswith("-r ../requirements.txt\n")
    pins = (ROOT / "requirements.txt").read_text().split("\n")
    assert {re.split("==", pin)[0] for pin in pins if pin} == {"torch", "numpy", "matplotlib", "pillow"}


def test_picture_is_what_the_script_draws_today(run):
    shown = np.asarray(Image.open(ROOT / "tests/baseline/unetr-2d.png").convert("RGB"), dtype=float)
    drawn = np.asarray(Image.open(run[1]).convert("RGB"), dtype=float)
    assert shown.shape == drawn.shape
    # Other processors round the logits otherwise, which moves few colours by little; another seed gives 12.
    assert np.abs(shown - drawn).mean() < 1


def test_stages_are_those_of_a_run(run):
    printed = [re.split(r"  +", line) for line in run[0].split("\nstage ")[1].split("\n\n")[0].splitlines()[1:]]
    assert [[*line, ""][:3] for line in printed] == table("| stage | shape | blocks |")


def test_parameters_and_operations(run):
    text = " ".join(README.split())
    stated = re.search(r"it has ([\d,]+) parameters and takes ([\d.]+) GFLOP .* \(([\d.]+) without", text)
    assert f"{stated[1]} parameters on cpu" in run[0]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unetr.UNETR()(torch.empty(1, 3, 256, 256))
    assert f"{counter.get_total_flops() / 1e9:.1f}" == stated[2]
    products = 12 * 2 * 2 * 256 * 256 * 768  # layers, products, multiply and add, N x N x K
    assert f"{(counter.get_total_flops() - products) / 1e9:.1f}" == stated[3]


def test_options_are_those_of_the_help(capsys):
    with pytest.raises(SystemExit):
        unetr.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    rows = table("| option | default | what it is |")
    options = [option.strip("`").split()[0] for option, _, _ in rows]
    assert options[1:] == re.findall(r" (--[a-z-]+) ", shown.split("-h, --help")[1])
    for option, default, what in rows[6:]:
        assert f"{option.strip('`')} {what} (default: {default})" in shown
    for _, default, _ in rows[:5]:
        assert f"(default: {default.replace('`', '')}" in shown


def test_every_name_in_the_structure_table_exists():
    model = unetr.UNETR(unetr.UNETRConfig(hidden_dim=12, mlp_dim=4, feature_size=1))
    for row in table("| in the paper | in `UNETR-2D.py` | what it is |"):
        for name in re.findall(r"`([\w.]+)`", row[1]):
            owner, _, part = name.partition(".")
            assert hasattr(model if part else unetr, part or owner), name


def test_every_comparison_names_its_test():
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    rows = table("| comparison | largest difference | allowed | test |")
    assert len(rows) >= 8 and all(f"def {row[3].strip('`')}(" in written for row in rows)
    assert f"{len(FAULTS)} known faults of 2D ports" in [row[0] for row in rows]


def test_layers_of_other_patch_sizes():
    sentence = "4, 8, 12 for P = 8, and 2, 5, 7, 10, 12 for P = 32."
    assert sentence in " ".join(README.split())
    assert unetr.UNETRConfig(patch_size=8).tapped_layers == (4, 8, 12)
    assert unetr.UNETRConfig(patch_size=32).tapped_layers == (2, 5, 7, 10, 12)


def vit_checkpoint():
    """A state_dict with the names and shapes of timm's vit_base_patch16_224."""
    shapes = {
        "cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "norm.weight": (768,), "norm.bias": (768,),
        "patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,),
        "head.weight": (1000, 768), "head.bias": (1000,),
    }  # fmt: skip
    for i in range(12):
        for name, rows, columns in (
            ("attn.qkv", 2304, 768),
            ("attn.proj", 768, 768),
            ("mlp.fc1", 3072, 768),
            ("mlp.fc2", 768, 3072),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (768,), f"blocks.{i}.{name}.bias": (768,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("UNETR-2D.py", "sample.png"):
        shutil.copy(ROOT / name, tmp_path)
    vit = vit_checkpoint()
    torch.save(vit, "vit_base_patch16_224.pth")
    first, image, pretrained, training = blocks("python")

    names = {}
    exec(first, names)
    assert names["logits"].shape == (2, 4, 160, 320)

    exec(image, names)
    assert names["mask"].shape == (1, 1, 256, 256) and names["mask"].dtype == torch.bool

    before = {name: weight.clone() for name, weight in names["model"].state_dict().items()}
    exec(pretrained, names)
    after = names["model"].state_dict()
    loaded = [name for name in after if name.startswith("blocks.")]
    assert len(loaded) == 12 * 12 and all(torch.equal(after[name], vit[name]) for name in loaded)
    tile = torch.rand(1, 3, 16, 16)
    expected = torch.nn.functional.conv2d(tile, vit["patch_embed.proj.weight"], vit["patch_embed.proj.bias"])
    torch.testing.assert_close(
        names["model"].patch_embed(unetr.patchify(tile, 16))[0, 0], expected.flatten(), rtol=1e-5, atol=0
    )
    places = vit["pos_embed"][0, 1:].T.reshape(1, 768, 14, 14)
    places = torch.nn.functional.interpolate(places, size=(16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(after["pos_embed"][0], places[0].flatten(1).T)
    rest = [name for name in after if name not in loaded and not name.startswith(("patch_embed", "pos_embed"))]
    assert rest and all(torch.equal(after[name], before[name]) for name in rest)

    exec(training, names)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]
    sizes = re.search(r"`python UNETR-2D.py (--weights [^`]+)`", README)[1].split()
    assert unetr.main(sizes) == 0
