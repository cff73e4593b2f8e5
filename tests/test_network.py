"""The network: patches, configurations, invalid values, initialization, dropout, hooks."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from conftest import ROOT, small, unetr
from torch import nn

CONFIGURATIONS = {
    "rectangle": small(image_size=(32, 80)),
    "patch 2": small(patch_size=2, image_size=(8, 12)),
    "patch 8": small(patch_size=8, image_size=(32, 48), in_channels=1),
    "patch 32": small(patch_size=32, image_size=(64, 96)),
    "many channels": small(in_channels=7, out_channels=5),
    "as many layers as stages": small(patch_size=4, num_layers=2, image_size=16),
    "dropout": small(dropout_rate=0.1),
}


@pytest.fixture(params=CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def config(request):
    return request.param


def images(config, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, config.in_channels, *config.size, generator=generator)


# Patches


@pytest.mark.parametrize(
    "batch, channels, height, width, patch",
    [(2, 3, 32, 48, 16), (1, 1, 16, 16, 8), (1, 5, 64, 32, 32), (2, 2, 6, 4, 2)],
)
def test_patches_are_row_major_and_flattened_as_channel_row_column(
    batch, channels, height, width, patch
):
    image = torch.randn(batch, channels, height, width)
    patches = unetr.patchify(image, patch)
    assert patches.shape == (batch, height // patch * (width // patch), channels * patch * patch)
    corners = itertools.product(range(0, height, patch), range(0, width, patch))
    for token, (row, column) in enumerate(corners):
        square = image[:, :, row : row + patch, column : column + patch]
        assert torch.equal(patches[:, token], square.reshape(batch, -1))
    for strided in (image.mT.contiguous().mT, image.to(memory_format=torch.channels_last)):
        assert torch.equal(unetr.patchify(strided, patch), patches)


# Every valid configuration


def test_logits_have_the_size_of_the_image_and_every_parameter_gets_a_gradient(config, device):
    model = unetr.UNETR(config).to(device)
    logits = model(images(config).to(device))
    assert logits.shape == (2, config.out_channels, *config.size)
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (6, 3)])
def test_any_multiple_of_the_patch_size_runs_with_contiguous_feature_maps(config, grid):
    height, width = (side * config.patch_size for side in grid)
    model = unetr.UNETR(config).eval()
    image = torch.rand(1, config.in_channels, height, width)
    assert model(image).shape == (1, config.out_channels, height, width)
    maps = model.encoder(image)
    assert [z.shape for z in maps] == [(1, config.hidden_dim, *grid)] * len(config.tapped_layers)
    assert all(z.is_contiguous() for z in maps)  # otherwise the decoder takes a third longer


def test_forward_prints_nothing_and_leaves_the_image_unchanged(capsys):
    image = images(small()) - 0.5
    before = image.clone()
    unetr.UNETR(small())(image)
    assert torch.equal(image, before) and not image.requires_grad
    assert capsys.readouterr() == ("", "")


def test_a_hook_on_a_stage_of_the_decoder_shows_its_output():
    model, shapes = unetr.UNETR(small()), []
    for stage in model.decoder:
        stage.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    model(images(small()))
    assert shapes == [(2, 32, 8, 8), (2, 16, 16, 16), (2, 8, 32, 32), (2, 4, 64, 64)]


@pytest.mark.parametrize(
    "block, factor", [("OrangeBlock", 1), ("GreenBlock", 2), ("BlueBlock", 2), ("GreyBlock", 1)]
)
def test_a_block_can_be_used_alone(block, factor):
    x = torch.randn(2, 3, 5, 7)
    assert getattr(unetr, block)(3, 4)(x).shape == (2, 4, 5 * factor, 7 * factor)


# Dropout


def assert_dropped(actual, expected, rate):
    """Single elements are dropped at this rate, and the others are scaled by 1 / (1 - rate)."""
    kept = actual != 0
    torch.testing.assert_close(actual[kept], expected[kept] / (1 - rate))
    assert (~kept).float().mean().item() == pytest.approx(rate, abs=0.02)
    assert kept.any(dim=2).all()  # in every token
    assert kept.any(dim=1).all()  # in every dimension


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_dropout_acts_after_position_embedding_attention_gelu_and_mlp(rate):
    config = small(dropout_rate=rate, image_size=(64, 96), hidden_dim=48, num_layers=4)
    encoder = unetr.ViT(config)
    nn.init.normal_(encoder.pos_embed)
    for block in encoder.blocks:
        block.forward = nn.Identity().forward
    tokens = encoder(images(config))[0].flatten(2).mT
    assert_dropped(tokens, encoder.eval()(images(config))[0].flatten(2).mT, rate)

    z = torch.randn(2, 30, 48)
    block = unetr.TransformerBlock(config)
    attn, block.attn.forward = block.attn, torch.zeros_like
    block.mlp.forward = torch.ones_like
    assert_dropped(block(z) - z, torch.ones_like(z), rate)  # the residual stream z is kept
    block.attn.forward, block.mlp.forward = torch.ones_like, torch.zeros_like
    assert_dropped(block(z) - z, torch.ones_like(z), rate)
    del attn.forward
    assert torch.equal(attn(z), attn.eval()(z))  # nothing is dropped inside

    mlp = unetr.MLP(config)
    mlp.fc2 = nn.Identity()
    assert_dropped(mlp(z), mlp.eval()(z), rate)


def test_there_is_no_dropout_in_decoder_or_prediction():
    config = small(dropout_rate=0.9)
    stage, x = unetr.UNETR(config).decoder[0], torch.randn(2, config.hidden_dim, 4, 4)
    assert torch.equal(stage(x, x), stage(x, x))
    model, same = unetr.UNETR(config).eval(), unetr.UNETR(small()).eval()
    same.load_state_dict(model.state_dict())
    assert torch.equal(model(images(config)), same(images(config)))


# Initialization


@pytest.mark.parametrize("again", [False, True])
def test_initialization_also_of_norms_and_running_statistics(again):
    model = unetr.UNETR(small(hidden_dim=192, mlp_dim=384, image_size=128, feature_size=24))
    if again:
        for tensor in model.state_dict().values():
            tensor.fill_(7)
        unetr.initialize(model)
    stds = {"encoder.pos_embed": 0.02}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            stds[f"{name}.weight"] = 0.02
        elif isinstance(module, nn.Conv2d):
            stds[f"{name}.weight"] = math.sqrt(2 / module.weight[0].numel())
        elif isinstance(module, nn.ConvTranspose2d):
            stds[f"{name}.weight"] = 1 / math.sqrt(len(module.weight))
    # positions, linear layers, convolutions, transposed convolutions
    assert len(stds) == 1 + (1 + 4 * 5) + (6 + 8 + 2 + 1) + (6 + 4)
    for name, std in stds.items():
        weight = model.get_parameter(name)
        if weight.numel() > 500:
            assert weight.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel()), name
            assert weight.abs().max() > 2.5 * std, name  # normal, not uniform
    for name, tensor in model.state_dict().items():
        if name not in stds:
            zero = name.endswith(("bias", "running_mean", "num_batches_tracked"))
            assert (tensor == (0 if zero else 1)).all(), name


def test_logits_depend_on_the_encoder_from_the_start():
    """At the defaults, on the sample. Without the Transformer, they change by their own size."""
    torch.manual_seed(0)
    model = unetr.UNETR().eval()
    image = unetr.load_image(ROOT / "sample.png", model.config)
    with torch.inference_mode():
        logits = model(image)
        for block in model.encoder.blocks:
            block.forward = torch.zeros_like
        change = (model(image) - logits).std() / logits.std()
    assert 0.45 < logits.std() < 0.95
    assert change > 0.5


# Configuration


def test_defaults_and_parameters():
    assert unetr.UNETRConfig() == unetr.UNETRConfig(256, 16, 3, 1, 768, 12, 12, 3072, 0.0, 64)
    with torch.device("meta"):
        model, deeper = unetr.UNETR(), unetr.UNETR(unetr.UNETRConfig(patch_size=32))
    assert sum(p.numel() for p in model.parameters()) == 104_677_953
    assert model.encoder.pos_embed.shape == (1, 16, 16, 768)
    assert [stage.up.out_channels for stage in deeper.decoder] == [1024, 512, 256, 128, 64]
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


def test_configuration_is_frozen_and_accepts_what_json_gives():
    values = json.loads(json.dumps(dataclasses.asdict(small(image_size=(64, 96)))))
    config = unetr.UNETRConfig(**values)
    assert config.size == (64, 96)
    assert config.grid == (4, 6)
    assert config.num_stages == 4
    assert small().size == (64, 64)
    assert unetr.UNETR(config).eval()(images(config)).shape == (2, 1, 64, 96)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.patch_size = 8


@pytest.mark.parametrize(
    "patch, layers, tapped",
    [
        (16, 12, (3, 6, 9, 12)),
        (8, 12, (4, 8, 12)),
        (32, 12, (2, 5, 7, 10, 12)),
        (2, 12, (12,)),
        (16, 6, (2, 3, 4, 6)),
        (16, 24, (6, 12, 18, 24)),
        (32, 5, (1, 2, 3, 4, 5)),
    ],
)
def test_tapped_layers_are_evenly_spaced(patch, layers, tapped):
    assert unetr.UNETRConfig(patch_size=patch, num_layers=layers).tapped_layers == tapped


COUNTS = ["in_channels", "out_channels", "hidden_dim", "num_layers", "num_heads", "mlp_dim"]
RULES = [  # the values, and the rule that the message states
    *[({name: value}, "at least 1") for name in [*COUNTS, "feature_size"] for value in (0, -4)],
    *[({"patch_size": value}, "a power of two of at least 2") for value in (12, 1, 0, -16)],
    *[({"image_size": side}, "multiples of patch_size 16") for side in (250, 8, 0, -16)],
    *[
        ({"image_size": sides}, "H or (H, W), positive multiples of patch_size 16")
        for sides in [(256, 7), (250, 256), (0, 64), (64, -64), (64, 64, 64), [64]]
    ],
    ({"hidden_dim": 768, "num_heads": 7}, "a multiple of num_heads 7"),
    ({"num_layers": 4, "patch_size": 32}, "at least 5 for patch_size 32"),
]


@pytest.mark.parametrize("values, rule", RULES)
def test_an_invalid_value_is_refused_with_its_name_the_rule_and_the_value(values, rule):
    with pytest.raises(ValueError) as error:
        unetr.UNETRConfig(**values)
    name, value = next(iter(values.items()))
    message = str(error.value)
    assert message.startswith(f"{name} must be ")
    assert rule in message
    assert message.endswith(f", got {value}")


def test_a_dropout_rate_above_one_is_refused():
    with pytest.raises(ValueError, match=r"1\.5"):
        unetr.UNETR(small(dropout_rate=1.5))


@pytest.mark.parametrize(
    "sizes",
    [
        dict(image_size=16),
        dict(patch_size=2),
        dict(patch_size=32, num_layers=5),
        dict(in_channels=1, num_heads=1, feature_size=1, mlp_dim=1, hidden_dim=1),
    ],
)
def test_the_bounds_themselves_are_valid(sizes):
    assert dataclasses.asdict(unetr.UNETRConfig(**sizes)).items() >= sizes.items()


@pytest.mark.parametrize(
    "shape",
    [(3, 64, 64), (1, 1, 64, 64), (1, 3, 65, 64), (1, 3, 64, 0), (1, 3, 64, 64, 64)],
)
def test_a_wrong_image_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(ValueError) as error:
        unetr.UNETR(small())(torch.zeros(shape))
    for part in (shape, "(B, 3, H, W)", 16):
        assert str(part) in str(error.value)
