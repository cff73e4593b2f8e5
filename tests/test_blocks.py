"""The coloured blocks are those of Figure 2: what they hold, in which order, what they compute, how they start."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

unetr = importlib.import_module("UNETR-2D")


@pytest.mark.parametrize("factor, colour", [(1, "Orange"), (2, "Green"), (2, "Blue"), (1, "Grey")])
def test_shape(colour, factor):
    block = getattr(unetr, f"{colour}Block")(5, 7)
    assert block(torch.rand(2, 5, 6, 10)).shape == (2, 7, 6 * factor, 10 * factor)


def test_orange_is_conv_norm_relu():
    block = unetr.OrangeBlock(5, 7)
    conv, norm, relu = block
    assert conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.bias is None
    x = torch.randn(3, 5, 8, 8)
    y = F.conv2d(x, conv.weight, padding=1)
    y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), keepdim=True, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(block(x), y.clamp(min=0))
    assert isinstance(relu, nn.ReLU) and relu.inplace  # one full-resolution tensor less


def test_green_spreads_each_pixel_over_two_by_two():
    block = unetr.GreenBlock(5, 7)
    x = torch.randn(2, 5, 3, 4)
    y = torch.einsum("bchw,cdij->bdhiwj", x, block.weight).reshape(2, 7, 6, 8) + block.bias.view(7, 1, 1)
    torch.testing.assert_close(block(x), y)


def test_blue_is_green_then_orange():
    green, orange = unetr.BlueBlock(5, 7)
    assert isinstance(green, unetr.GreenBlock) and isinstance(orange, unetr.OrangeBlock)
    assert (green.in_channels, green.out_channels) == (5, 7)
    assert (orange[0].in_channels, orange[0].out_channels) == (7, 7)


def test_grey_mixes_the_channels_of_one_pixel():
    block = unetr.GreyBlock(5, 7)
    x = torch.randn(2, 5, 3, 4)
    y = torch.einsum("bchw,dc->bdhw", x, block.weight[:, :, 0, 0]) + block.bias.view(7, 1, 1)
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("block, fan_in", [("Orange", 64 * 9), ("Green", 80 * 4), ("Grey", 64)])
def test_convolutions_start_he_normal_with_zero_bias(block, fan_in):
    torch.manual_seed(0)
    module = getattr(unetr, f"{block}Block")(64, 80)
    conv = module[0] if block == "Orange" else module
    std = math.sqrt(2 / fan_in)
    assert conv.weight.std().item() == pytest.approx(std, rel=0.05)
    assert conv.weight.abs().max() > 2.5 * std  # a uniform one of that std ends at 1.73
    assert abs(conv.weight.mean().item()) < 0.1 * std
    assert conv.bias is None or not conv.bias.any()
