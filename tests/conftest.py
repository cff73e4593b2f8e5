"""Shared by all tests: the script as a module, and a configuration that is small enough to run many times."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ["MPLBACKEND"] = "agg"  # in this process and in every command that a test starts
sys.path.insert(0, str(ROOT))
unetr = importlib.import_module("UNETR-2D")

SMALL = dict(image_size=64, hidden_dim=24, num_layers=5, num_heads=3, mlp_dim=40, feature_size=4)
OPTIONS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def small(**sizes):
    return unetr.UNETRConfig(**{**SMALL, **sizes})


def largest_difference(ours, theirs):
    """Relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def vit_checkpoint(grid=(3, 3), cls_token=True, dim=24, mlp=40, layers=4, **changed):
    """Random tensors with the names and shapes of a timm ViT with patch size 16."""
    shapes = {"pos_embed": (1, grid[0] * grid[1] + cls_token, dim), "patch_embed.proj.weight": (dim, 3, 16, 16),
              "patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,),
              "head.weight": (10, dim), "head.bias": (10,)} | ({"cls_token": (1, 1, dim)} if cls_token else {})  # fmt: skip
    linear = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (mlp, dim), "mlp.fc2": (dim, mlp)}
    for i in range(layers):
        for name, shape in {**linear, "norm1": (dim,), "norm2": (dim,)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    return {name: torch.rand(shape) for name, shape in {**shapes, **changed}.items()}


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
