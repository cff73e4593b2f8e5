"""Patches: places and channels where they belong, nothing lost, other shapes refused."""

import importlib

import pytest
import torch
from torch import nn

unetr = importlib.import_module("UNETR-2D")

SHAPES = [(2, 3, 32, 48, 16), (1, 1, 16, 16, 8), (1, 5, 64, 32, 32), (2, 2, 6, 4, 2), (1, 2, 1, 3, 1)]


@pytest.mark.parametrize("batch, channels, height, width, patch", SHAPES)
def test_each_value_stands_where_the_definition_puts_it(batch, channels, height, width, patch):
    image = torch.arange(batch * channels * height * width).reshape(batch, channels, height, width)
    patches = unetr.patchify(image, patch)
    assert patches.shape == (batch, height // patch * (width // patch), channels * patch * patch)
    token = 0
    for row in range(0, height, patch):
        for column in range(0, width, patch):
            square = image[:, :, row : row + patch, column : column + patch]
            assert torch.equal(patches[:, token], square.reshape(batch, -1))  # channel, row, column
            token += 1


@pytest.mark.parametrize("batch, channels, height, width, patch", SHAPES)
def test_folding_gives_the_image_back(batch, channels, height, width, patch):
    image = torch.rand(batch, channels, height, width)
    fold = nn.Fold((height, width), kernel_size=patch, stride=patch)
    assert torch.equal(fold(unetr.patchify(image, patch).transpose(1, 2)), image)


def test_projection_is_a_vits_patch_convolution_reshaped():
    image, conv = torch.rand(2, 3, 32, 48), nn.Conv2d(3, 10, kernel_size=16, stride=16)
    tokens = unetr.patchify(image, 16) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(tokens, conv(image).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 32, 40), (1, 3, 40, 32), (1, 3, 0, 32), (1, 3, 32, 32, 32)])
def test_other_shapes_are_refused_by_name(shape):
    with pytest.raises(ValueError) as error:
        unetr.patchify(torch.zeros(shape), 16)
    assert str(error.value) == f"the image must have shape (B, C, H, W) with H and W multiples of 16, got {shape}"


def test_positions_are_resized_bicubically_in_their_places():
    table = torch.linspace(0, 1, 4).view(1, 4, 1) + torch.zeros(1, 4, 6)  # a ramp along the columns
    table = torch.stack([table[0]] * 3).reshape(1, 12, 6)  # rows x columns = 3 x 4, K = 6
    resized = unetr.resize_positions(table, (3, 4), (6, 8)).reshape(6, 8, 6)
    image = table.reshape(3, 4, 6).permute(2, 0, 1)[None]
    expected = nn.functional.interpolate(image, size=(6, 8), mode="bicubic")[0].permute(1, 2, 0)
    torch.testing.assert_close(resized, expected)
    assert torch.all(resized.diff(dim=1) > -0.05) and not resized.diff(dim=0).abs().gt(1e-5).any()
    assert unetr.resize_positions(table, (3, 4), (3, 4)) is table
