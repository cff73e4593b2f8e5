"""The commands, code, tables, output and pictures in both READMEs are those of today's script."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import draw_architecture
import numpy as np
import pytest
import torch
from conftest import README, ROOT, readme_blocks, readme_program, unetr, vit_checkpoint
from PIL import Image
from test_fault_injection import FAULTS

PROOF = (ROOT / "tests/README.md").read_text(encoding="utf-8")


def table(text, header):
    """The rows below the header, each a list of cells."""
    rows = text.split(f"\n{header}\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def python(*arguments, folder):
    """Run Python in a folder and a process of its own; return what it prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a newcomer's first command prints and draws."""
    folder = tmp_path_factory.mktemp("newcomer")
    printed = python(ROOT / "UNETR-2D.py", "--no-show", "--device", "cpu", folder=folder)
    return printed, folder / "unetr-2d.png"


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def test_both_commands_are_what_ci_runs():
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    commands = [command for command in readme_blocks("sh") if command.startswith("pip install -r")]
    assert len(commands) == 2
    for command in commands:
        assert command in ci


def test_requirements():
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    packages = {pin.split("==")[0] for pin in pins}
    assert packages == {"torch", "numpy", "matplotlib", "pillow"}
    assert (ROOT / "tests/requirements.txt").read_text().startswith("-r ../requirements.txt\n")


def test_figure_is_what_the_script_draws_today_from_a_network_built_with_seed_0(run):
    torch.manual_seed(0)
    model = unetr.UNETR().eval()
    image = unetr.load_image(ROOT / "sample.png", model.config)
    with torch.inference_mode():
        title = "Output of an untrained network: meaningless"
        figure = unetr.draw(image, model(image), 16, title)
    figure.savefig(run[1].with_name("built.png"))
    shown = pixels(ROOT / "tests/baseline/unetr-2d.png")
    # Other processors round the logits differently, which changes few colors a little; another
    # seed changes the mean by more than 10.
    printed, built = pixels(run[1]), pixels(run[1].with_name("built.png"))
    assert np.array_equal(printed[:20], built[:20])  # the titles
    for figure in (printed, built):
        assert figure.shape == shown.shape
        assert np.abs(figure - shown).mean() < 1


def test_picture_of_the_architecture_is_that_of_todays_network():
    picture = ElementTree.parse(ROOT / "tests/baseline/architecture.svg")
    kept = picture.find(".//{http://purl.org/dc/elements/1.1/}description").text
    today = draw_architecture.describe(unetr.UNETRConfig())
    assert json.loads(kept) == today
    assert [stage["skip_source"] for stage in today["stages"]] == ["z9", "z6", "z3", "image"]
    assert [len(stage["skip"]) for stage in today["stages"]] == [1, 2, 3, 2]
    other = draw_architecture.describe(unetr.UNETRConfig(patch_size=8, feature_size=16))
    assert [stage["up"]["channels"] for stage in other["stages"]] == [64, 32, 16]
    draw_architecture.draw(other)


def test_terminal_output_is_that_of_a_run(run):
    (shown,) = re.findall(r"```\n\.\.\.\n(104,677,953 .*?)```", README, flags=re.DOTALL)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    pattern = "\n".join(".*" if line == "..." else re.escape(line) for line in lines)
    printed = re.sub(" +", " ", run[0])
    assert re.search(pattern, printed, flags=re.DOTALL)


def test_every_name_in_the_table_of_the_paper_exists():
    model = unetr.UNETR(unetr.UNETRConfig(hidden_dim=12, mlp_dim=4, feature_size=1))
    owners = {type(module).__name__: module for module in model.modules()}
    owners["UNETRConfig"] = model.config
    header = "| paper (arXiv version 3, WACV 2022) | [`UNETR-2D.py`](UNETR-2D.py) | description |"
    for row in table(README, header):
        for name in re.findall(r"`([\w.]+)`", row[1]):
            owner, _, part = name.partition(".")
            assert hasattr(owners[owner], part) if part else hasattr(unetr, owner), name


def test_injected_faults_and_the_tests_that_detect_them_are_those_listed():
    assert f"{len(FAULTS)} mistakes" in README
    listed = table(PROOF, "| fault | detected by |")
    assert listed == [[name, f"`{test}`"] for name, _, _, test in FAULTS]


def test_every_test_and_file_named_exists():
    files = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    listed = [row[0].strip("`") for row in table(PROOF, "| file | checks that |")]
    assert sorted(listed) == sorted(files)
    named = set(re.findall(r"`(test_\w+)`", PROOF))
    assert named
    for name in named:
        assert any(f"def {name}(" in text for text in files.values()), name


@pytest.fixture
def folder(tmp_path):
    """A user's folder: a copy of the script and the sample."""
    shutil.copy(ROOT / "UNETR-2D.py", tmp_path / "unetr_2d.py")
    shutil.copy(ROOT / "sample.png", tmp_path)
    return tmp_path


def test_the_code_that_calls_the_network_runs(folder):
    call = readme_program("UNETRConfig(out_channels=4)")
    printed = python("-c", f"{call}\nprint(tuple(logits.shape), tuple(mask.shape))", folder=folder)
    assert printed == "(1, 4, 256, 256) (1, 256, 256)\n"


def test_a_scan_of_ones_own(folder):
    words = shlex.split(next(command for command in readme_blocks("sh") if "scan.png" in command))
    Image.new("L", (100, 80)).save(folder / words[2])
    python(ROOT / words[1], *words[2:], "--no-show", folder=folder)
    assert (folder / words[-1]).exists()


def test_the_code_that_loads_a_pretrained_vit_runs(folder):
    base = vit_checkpoint(197, [("cls_token", 1)], dim=768, mlp=3072, layers=12)
    torch.save(base, folder / "vit.pth")  # the names and shapes of vit_base_patch16_224
    code = readme_program("load_vit(")
    printed = python("-c", f"{code}\nprint(tuple(model(image).shape))", folder=folder)
    assert printed == "(1, 1, 256, 256)\n"


def test_sample_image():
    image = Image.open(ROOT / "sample.png")
    assert image.mode == "L"
    assert image.width == image.height
    notice = (ROOT / "tests/data/LICENSE").read_text(encoding="utf-8")
    assert image.text["Copyright"] == " ".join(notice.split())
