"""Patches: every pixel is where the definition puts it, and the projection is that of a ViT."""

import pytest
import torch
from conftest import small, unetr
from torch import nn

SHAPES = [(2, 3, 32, 48, 16), (1, 1, 16, 16, 8), (1, 5, 64, 32, 32), (2, 2, 6, 4, 2)]


@pytest.mark.parametrize("batch, channels, height, width, patch", SHAPES)
def test_patches_are_row_major_and_flattened_as_channel_row_column(batch, channels, height, width, patch):
    image = torch.arange(batch * channels * height * width).reshape(batch, channels, height, width)
    patches = unetr.patchify(image, patch)
    assert patches.shape == (batch, height // patch * (width // patch), channels * patch * patch)
    places = [(row, column) for row in range(0, height, patch) for column in range(0, width, patch)]
    for token, (row, column) in enumerate(places):
        square = image[:, :, row : row + patch, column : column + patch]
        assert torch.equal(patches[:, token], square.reshape(batch, -1))


def test_projection_equals_the_patch_convolution_of_a_vit():
    embed, conv = unetr.PatchEmbed(small()), nn.Conv2d(3, 24, kernel_size=16, stride=16)
    embed.proj.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    image = torch.rand(2, 3, 32, 48)
    torch.testing.assert_close(embed(image), conv(image).flatten(2).transpose(1, 2))
