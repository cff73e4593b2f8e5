"""What the tests share: the script as a module, and a configuration small enough to run many times."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ["MPLBACKEND"] = "agg"  # here and in every command that a test starts
sys.path.insert(0, str(ROOT))

# hidden_dim, num_layers and the rest as small as patch_size 32 (five stages) allows
SMALL = dict(image_size=64, hidden_dim=24, num_layers=5, num_heads=3, mlp_dim=40, feature_size=4)


def largest_difference(ours, theirs):
    """Relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(params=["cpu", "accelerator"])
def device(request):
    if request.param == "cpu":
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        pytest.skip("PyTorch finds no accelerator on this machine")
    return found
