"""Checkpoints: another image size, a ViT with timm's names; whatever does not fit is an error, never silently random."""

import pytest
import torch
from conftest import largest_difference, small, unetr, vit_checkpoint

CONFIG = small(image_size=(64, 96), num_layers=4)


def resized(positions, grid, new_grid):
    """(N, K) -> (new N, K), written independently of the script."""
    image = positions.T.reshape(1, -1, *grid)
    return torch.nn.functional.interpolate(image, size=new_grid, mode="bicubic").flatten(2)[0].T


@pytest.mark.parametrize("grid", [(3, 3), (4, 6), (9, 9)])
@pytest.mark.parametrize("cls_token", [True, False])
def test_a_vit_checkpoint_fills_the_encoder(grid, cls_token):
    vit, model = vit_checkpoint(grid, cls_token), unetr.UNETR(CONFIG)
    before = {name: tensor.clone() for name, tensor in vit.items()}
    result = model.encoder.load_state_dict(vit, strict=False)
    unused = {"norm.weight", "norm.bias", "head.weight", "head.bias"} | ({"cls_token"} if cls_token else set())
    assert result.missing_keys == [] and set(result.unexpected_keys) == unused
    loaded = model.encoder.state_dict()
    for name in set(vit) - unused - {"pos_embed"}:
        assert torch.equal(loaded[name].flatten(), vit[name].flatten()), name
    positions = vit["pos_embed"][0, cls_token:]
    torch.testing.assert_close(loaded["pos_embed"][0], resized(positions, grid, (4, 6)))
    assert all(torch.equal(vit[name], tensor) for name, tensor in before.items())  # the caller's tensors are unchanged
    tile = torch.rand(1, 3, 16, 16)
    expected = torch.nn.functional.conv2d(tile, vit["patch_embed.proj.weight"], vit["patch_embed.proj.bias"], stride=16)
    assert largest_difference(model.encoder.patch_embed(tile)[0, 0], expected.flatten()) <= 1e-5


def test_the_class_token_is_dropped_even_if_the_numbers_of_positions_are_equal():
    model = unetr.UNETR(small(image_size=(32, 80), num_layers=4))  # 10 positions, like 3 x 3 and a class token
    vit = vit_checkpoint((3, 3))
    model.encoder.load_state_dict(vit, strict=False)
    torch.testing.assert_close(model.encoder.pos_embed[0], resized(vit["pos_embed"][0, 1:], (3, 3), (2, 5)))


@pytest.mark.parametrize("new_size", [96, (48, 112)])
def test_a_checkpoint_of_another_image_size_is_the_same_network(new_size):
    model, other = unetr.UNETR(small()).eval(), unetr.UNETR(small(image_size=new_size)).eval()
    other.load_state_dict(model.state_dict())
    image = torch.rand(1, 3, *other.config.size)
    torch.testing.assert_close(other(image), model(image))  # which resizes its position embedding at run time


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(pos_embed=(1, 16, 24)), "pos_embed must have 24 or a square number of positions, got 15"),
        (dict(pos_embed=(1, 26, 48)), r"size mismatch for pos_embed"),
        ({"patch_embed.proj.weight": (24, 12, 8, 8)}, "size mismatch for patch_embed.proj.weight"),  # as many numbers
        ({"patch_embed.proj.weight": (24, 3, 8, 8)}, "size mismatch for patch_embed.proj.weight"),
        ({"blocks.0.mlp.fc1.weight": (41, 24)}, "size mismatch for blocks.0.mlp.fc1.weight"),
    ],
)
def test_a_shape_that_does_not_fit_is_an_error(changed, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        unetr.UNETR(CONFIG).encoder.load_state_dict(vit_checkpoint(**changed), strict=False)


def test_a_name_that_does_not_fit_is_reported():
    vit = vit_checkpoint()
    vit["blocks.0.attn.query.weight"] = vit.pop("blocks.0.attn.qkv.weight")
    result = unetr.UNETR(CONFIG).encoder.load_state_dict(vit, strict=False)
    assert result.missing_keys == ["blocks.0.attn.qkv.weight"]
    assert "blocks.0.attn.query.weight" in result.unexpected_keys
    del vit["pos_embed"]
    assert "pos_embed" in unetr.UNETR(CONFIG).encoder.load_state_dict(vit, strict=False).missing_keys
