"""Shared by all tests: the script as a module, a small configuration, and the README's programs."""

import importlib
import os
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ["MPLBACKEND"] = "agg"  # in this process and in every command that a test starts
os.environ["OMP_NUM_THREADS"] = "1"  # as well; more would make small networks slower
torch.set_num_threads(1)
plt.switch_backend("agg")
sys.path.insert(0, str(ROOT))
unetr = importlib.import_module("UNETR-2D")

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = dict(image_size=64, hidden_dim=24, num_layers=5, num_heads=3, mlp_dim=40, feature_size=4)


def small(**sizes):
    return unetr.UNETRConfig(**{**SMALL, **sizes})


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def readme_program(marker):
    """The only program in the README that contains the marker."""
    (program,) = [program for program in readme_blocks("python") if marker in program]
    return program


def largest_difference(ours, theirs):
    """Relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def resized(positions, grid):
    """Positions (1, h, w, K) resized to another grid, independently of the script."""
    channels_first = positions.movedim(-1, 1)
    return torch.nn.functional.interpolate(channels_first, grid, mode="bicubic").movedim(1, -1)


def vit_checkpoint(positions, prefix=(), dim=24, mlp=40, layers=4):
    """Random tensors with the names and shapes of a timm ViT with patch size 16.

    positions: their number; prefix: pairs of name and number, such as ("reg_token", 4).
    """
    shapes = {
        "pos_embed": (1, positions, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (10, dim),
        "head.bias": (10,),
    }
    for name, number in prefix:
        shapes[name] = (1, number, dim)
    for i in range(layers):
        for name, outputs, inputs in [
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", mlp, dim),
            ("mlp.fc2", dim, mlp),
        ]:
            shapes[f"blocks.{i}.{name}.weight"] = (outputs, inputs)
            shapes[f"blocks.{i}.{name}.bias"] = (outputs,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{i}.{name}"] = (dim,)
    return {name: torch.rand(shape) for name, shape in shapes.items()}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "accelerator"])
def device(request):
    if request.param == "cpu":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        pytest.skip("PyTorch finds no accelerator on this machine")
    return accelerator
