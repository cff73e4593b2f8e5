"""The colored blocks compute what Figure 2 says."""

import pytest
import torch
import torch.nn.functional as F
from conftest import unetr


@pytest.mark.parametrize("factor, color", [(1, "Orange"), (2, "Green"), (2, "Blue"), (1, "Grey")])
def test_shape(color, factor):
    block = getattr(unetr, f"{color}Block")(5, 7)
    assert block(torch.rand(2, 5, 6, 10)).shape == (2, 7, 6 * factor, 10 * factor)


def test_orange_is_conv_3x3_batch_norm_relu():
    block = unetr.OrangeBlock(5, 7)
    (weight,) = (p for p in block.parameters() if p.ndim == 4)
    x = torch.randn(3, 5, 8, 8)
    y = F.conv2d(x, weight, padding=1)
    y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    assert weight.shape == (7, 5, 3, 3)
    torch.testing.assert_close(block(x), y.clamp(min=0))


def test_green_is_transposed_conv_2x2_with_stride_2():
    block = unetr.GreenBlock(5, 7)
    x = torch.randn(2, 5, 3, 4)
    y = torch.einsum("bchw,cdij->bdhiwj", x, block.weight).reshape(2, 7, 6, 8) + block.bias.view(7, 1, 1)
    torch.testing.assert_close(block(x), y)


def test_blue_is_green_then_orange():
    green, orange = unetr.BlueBlock(5, 7).children()
    assert isinstance(green, unetr.GreenBlock) and isinstance(orange, unetr.OrangeBlock)
    assert green(torch.rand(1, 5, 2, 2)).shape == (1, 7, 4, 4)


def test_grey_is_conv_1x1():
    block = unetr.GreyBlock(5, 7)
    x = torch.randn(2, 5, 3, 4)
    y = torch.einsum("bchw,dc->bdhw", x, block.weight[:, :, 0, 0]) + block.bias.view(7, 1, 1)
    torch.testing.assert_close(block(x), y)
