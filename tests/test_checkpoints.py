"""Checkpoints: positions are resized from the right grid; other mismatches are reported."""

import itertools
import math

import pytest
import torch
from conftest import largest_difference, resized, small, unetr, vit_checkpoint

TOKENS = ("cls_token", "dist_token", "reg_token")
GRIDS = [(1, 1), (1, 4), (2, 2), (2, 3), (3, 2), (3, 3), (4, 9), (9, 4), (6, 6), (5, 8)]


def encoder(grid):
    """A small encoder with patches of 2 x 2 pixels."""
    height, width = grid
    sizes = dict(hidden_dim=6, num_layers=1, num_heads=1, mlp_dim=4, feature_size=1)
    return unetr.ViT(unetr.UNETRConfig(image_size=(2 * height, 2 * width), patch_size=2, **sizes))


def coordinates(grid):
    """A position embedding (1, h, w, 6) of coordinates: no two are equal, none is symmetric."""
    rows, columns = torch.meshgrid(*(torch.arange(float(side)) for side in grid), indexing="ij")
    features = [rows, columns, rows * columns, rows**2, columns**2, rows - columns]
    return torch.stack(features, dim=2).unsqueeze(0)


def assert_positions(loaded, positions, grid):
    if positions.shape[1:3] == grid:
        assert torch.equal(loaded.pos_embed, positions)
    else:
        torch.testing.assert_close(loaded.pos_embed, resized(positions, grid))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("new_grid", GRIDS)
def test_own_positions_are_resized_from_their_own_grid(grid, new_grid):
    saved, loaded = encoder(grid), encoder(new_grid)
    saved.pos_embed.data = coordinates(grid)
    loaded.load_state_dict(saved.state_dict())
    assert_positions(loaded, coordinates(grid), new_grid)


@pytest.mark.parametrize("side", range(1, 9))
def test_vit_positions_are_those_of_their_square_grid_or_an_error(side):
    """With any prefix tokens, whether they have positions or not."""
    right = coordinates((side, side))
    refused = 0
    combinations = list(itertools.product((0, 1), (0, 1), (0, 1, 4)))
    for numbers, new_grid in itertools.product(combinations, GRIDS):
        prefix_tokens = sum(numbers)
        # positions of no prefix token, of the class token, of all
        for prefix in {0, numbers[0], prefix_tokens}:
            positions = torch.cat([torch.full((1, prefix, 6), -100.0), right.flatten(1, 2)], dim=1)
            checkpoint = {"pos_embed": positions}
            for name, number in zip(TOKENS, numbers, strict=True):
                if number:
                    checkpoint[name] = torch.zeros(1, number, 6)
            loaded = encoder(new_grid)
            try:
                loaded.load_state_dict(checkpoint, strict=False)
            except ValueError as error:
                assert str(side**2 + prefix) in str(error)
                refused += 1
            else:
                assert_positions(loaded, right, new_grid)
    if side > 3:  # below, two grids can have as many tokens: 2 x 2 and five prefix tokens, or 3 x 3
        assert not refused


@pytest.mark.parametrize("tokens", range(40))
@pytest.mark.parametrize("prefix", range(3))
def test_positions_that_belong_to_no_square_grid_are_refused(tokens, prefix):
    checkpoint = {"pos_embed": torch.zeros(1, tokens, 6)}
    for name in TOKENS[:prefix]:
        checkpoint[name] = torch.zeros(1, 1, 6)
    if tokens and tokens - math.isqrt(tokens) ** 2 <= prefix:
        encoder((2, 3)).load_state_dict(checkpoint, strict=False)
    else:
        with pytest.raises(ValueError, match=rf"pos_embed.*\b{tokens}\b"):
            encoder((2, 3)).load_state_dict(checkpoint, strict=False)


@pytest.mark.parametrize(
    "size, new_size",
    [((144, 256), (288, 512)), ((192, 256), (256, 192)), ((192, 256), (384, 512))],
)
def test_own_weights_of_another_image_size_are_the_same_network(size, new_size):
    model = unetr.UNETR(small(image_size=size)).eval()
    torch.nn.init.normal_(model.encoder.pos_embed)
    other = unetr.UNETR(small(image_size=new_size)).eval()
    other.load_state_dict(model.state_dict())
    image = torch.rand(1, 3, *new_size)
    with torch.inference_mode():
        logits = model(image)  # resizes its position embedding at run time
        torch.testing.assert_close(other(image), logits)
        other.encoder.pos_embed.zero_()
        assert (other(image) - logits).std() > 0.1 * logits.std()


def test_positions_at_another_image_size_follow_their_parameter():
    model, image = unetr.UNETR(small()).eval(), torch.rand(1, 3, 96, 80)
    model(image)
    torch.nn.init.normal_(model.encoder.pos_embed)
    same = unetr.UNETR(small()).eval()
    same.load_state_dict(model.state_dict())
    assert torch.equal(model(image), same(image))


CLASS, DISTILLED = [("cls_token", 1)], [("cls_token", 1), ("dist_token", 1)]
VITS = {
    "384 pixels, into as many tokens": (24, 1, CLASS, (288, 512)),
    "DeiT III: no position for the class token": (14, 0, CLASS, 224),
    "distilled DeiT": (14, 2, DISTILLED, 224),
    "registers": (14, 5, [*CLASS, ("reg_token", 4)], 224),
    "registers without positions": (14, 0, [*CLASS, ("reg_token", 4)], (224, 256)),
    "no class token": (4, 0, [], (64, 96)),
    "as many positions as tokens, one of the class token": (3, 1, CLASS, (32, 80)),
}


@pytest.mark.parametrize("side, prefix, tokens, size", VITS.values(), ids=VITS.keys())
def test_a_timm_vit_fills_the_encoder(side, prefix, tokens, size):
    vit = vit_checkpoint(side**2 + prefix, tokens)
    model = unetr.UNETR(small(image_size=size, num_layers=4))
    before = {name: tensor.clone() for name, tensor in vit.items()}
    result = model.encoder.load_state_dict(vit, strict=False)
    unused = {"norm.weight", "norm.bias", "head.weight", "head.bias"} | {name for name, _ in tokens}
    assert result.missing_keys == []
    assert set(result.unexpected_keys) == unused
    positions = vit["pos_embed"][:, prefix:].unflatten(1, (side, side))
    assert_positions(model.encoder, positions, model.config.grid)
    loaded = model.encoder.state_dict()
    for name in set(vit) - unused - {"pos_embed", "patch_embed.proj.weight"}:
        assert torch.equal(loaded[name], vit[name]), name
    for name, tensor in before.items():  # the caller's tensors are unchanged
        assert torch.equal(vit[name], tensor), name
    image = torch.rand(2, 3, 32, 48)
    weight, bias = vit["patch_embed.proj.weight"], vit["patch_embed.proj.bias"]
    expected = torch.nn.functional.conv2d(image, weight, bias, stride=16).flatten(2).transpose(1, 2)
    assert largest_difference(model.encoder.patch_embed(image), expected) <= 1e-5


def test_a_vit_inside_of_a_larger_checkpoint_fills_the_encoder():
    """By its prefix, in which the class token is looked for too."""
    vit = vit_checkpoint(10, CLASS)
    models = [unetr.UNETR(small(image_size=(32, 80), num_layers=4)) for _ in range(2)]
    models[0].encoder.load_state_dict(vit, strict=False)
    models[1].load_state_dict({f"encoder.{name}": vit[name] for name in vit}, strict=False)
    for name, tensor in models[0].encoder.state_dict().items():
        assert torch.equal(models[1].encoder.get_parameter(name), tensor), name


def refused(checkpoint, message, **sizes):
    model = unetr.UNETR(small(image_size=(64, 96), num_layers=4, **sizes))
    with pytest.raises((ValueError, RuntimeError), match=message):
        model.encoder.load_state_dict(checkpoint, strict=False)


def test_positions_of_a_grid_that_is_not_square_are_refused():
    refused(vit_checkpoint(192, CLASS), "pos_embed .* got 192 positions")  # verbatim


def test_a_patch_kernel_of_another_patch_size_is_refused_even_if_the_flattened_sizes_are_equal():
    name = "patch_embed.proj.weight"  # 3 * 16 * 16 = 12 * 8 * 8
    refused(vit_checkpoint(16), f"size mismatch for {name}", in_channels=12, patch_size=8)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("pos_embed", (1, 16, 48)),
        ("pos_embed", (16, 24)),
        ("pos_embed", (1, 2, 3, 4, 24)),
        ("blocks.0.mlp.fc1.weight", (41, 24)),
    ],
)
def test_a_shape_that_does_not_match_is_refused(name, shape):
    refused({**vit_checkpoint(16), name: torch.zeros(shape)}, f"size mismatch for {name}")


def test_a_name_that_does_not_match_is_reported():
    vit = vit_checkpoint(16)
    vit["blocks.0.attn.query.weight"] = vit.pop("blocks.0.attn.qkv.weight")
    del vit["pos_embed"], vit["patch_embed.proj.weight"]
    result = unetr.UNETR(small(num_layers=4)).encoder.load_state_dict(vit, strict=False)
    missing = {"blocks.0.attn.qkv.weight", "pos_embed", "patch_embed.proj.weight"}
    assert set(result.missing_keys) == missing
    assert "blocks.0.attn.query.weight" in result.unexpected_keys
