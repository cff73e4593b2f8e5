"""The network: every valid configuration runs and trains, every other is refused; initialization, dropout, hooks."""

import dataclasses
import json

import pytest
import torch
from conftest import ROOT, small, unetr
from torch import nn

CONFIGURATIONS = {
    "square": small(),
    "rectangle": small(image_size=(32, 80)),
    "patch 2": small(patch_size=2, image_size=(8, 12)),
    "patch 4": small(patch_size=4, image_size=(16, 24)),
    "patch 8": small(patch_size=8, image_size=(32, 48)),
    "patch 32": small(patch_size=32, image_size=(64, 96)),
    "grayscale": small(in_channels=1),
    "many channels": small(in_channels=7, out_channels=5),
    "as many layers as stages": small(patch_size=4, num_layers=2, image_size=16),
    "dropout": small(dropout_rate=0.1),
}


@pytest.fixture(params=CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def config(request):
    return request.param


def images(config, batch=2):
    return torch.rand(batch, config.in_channels, *config.size, generator=torch.Generator().manual_seed(0))


def test_logits_have_the_size_of_the_image_and_every_parameter_gets_a_gradient(config, device):
    model = unetr.UNETR(config).to(device)
    logits = model(images(config).to(device))
    assert logits.shape == (2, config.out_channels, *config.size)
    logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (3, 1), (6, 7)])
def test_any_multiple_of_the_patch_size_runs(config, grid):
    height, width = (side * config.patch_size for side in grid)
    image = torch.rand(1, config.in_channels, height, width)
    assert unetr.UNETR(config).eval()(image).shape == (1, config.out_channels, height, width)


def test_encoder_returns_one_feature_map_per_stage(config):
    maps = unetr.UNETR(config).encoder(images(config))
    assert [z.shape for z in maps] == [(2, config.hidden_dim, *config.grid)] * len(config.tapped_layers)


def test_forward_prints_nothing(capsys):
    unetr.UNETR(small())(images(small()))
    assert capsys.readouterr() == ("", "")


def test_dropout_acts_where_vit_has_it_and_only_in_training():
    model, seen = unetr.UNETR(small(dropout_rate=0.5)), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.5
            module.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # otherwise training mode alone would change the output
    image = images(small())
    assert not torch.equal(model(image), model(image))
    assert seen == 2 * [24, *(5 * [24, 40, 24])]  # embeddings; in each layer after MSA, after GELU, after the MLP
    model.eval()
    assert torch.equal(model(image), model(image))


def test_every_stage_skip_and_head_can_be_hooked_and_shows_its_output():
    model, shapes, expected = unetr.UNETR(small()), {}, {"head": (2, 1, 64, 64)}
    for i, shape in enumerate([(2, 32, 8, 8), (2, 16, 16, 16), (2, 8, 32, 32), (2, 4, 64, 64)]):
        expected |= {f"decoder.{i}{part}": shape for part in ("", ".up", ".skip", ".merge1", ".merge2")}
    for name in expected:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, args, output, name=name: shapes.update({name: output.shape}))
    model(images(small()))
    assert shapes == expected


def test_initialization():
    model = unetr.UNETR(small(hidden_dim=192, mlp_dim=384, image_size=128, feature_size=24))
    stds = {"encoder.pos_embed": 0.02}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            stds[f"{name}.weight"] = 0.02
        elif isinstance(module, nn.Conv2d):
            stds[f"{name}.weight"] = (2 / module.weight[0].numel()) ** 0.5
        elif isinstance(module, nn.ConvTranspose2d):
            stds[f"{name}.weight"] = len(module.weight) ** -0.5
    assert len(stds) == 1 + (1 + 4 * 5) + (6 + 8 + 2 + 1) + (6 + 4)  # positions, linear, convolutions, transposed ones
    for name, std in stds.items():
        weight = model.get_parameter(name)
        if weight.numel() > 500:
            assert weight.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(weight.mean().item()) < 0.1 * std and weight.abs().max() > 2.5 * std  # normal, not uniform
    for name, tensor in model.state_dict().items():
        if name not in stds:
            zero = name.endswith(("bias", "running_mean", "num_batches_tracked"))
            assert (tensor == (0 if zero else 1)).all(), name


def test_logits_depend_on_the_encoder_from_the_start():
    """At the defaults, on the sample, as ARCHITECTURE says: std 0.5 to 0.9, changed by their own size without it."""
    torch.manual_seed(0)
    model = unetr.UNETR().eval()
    image = unetr.load_image(ROOT / "sample.png", model.config)
    with torch.inference_mode():
        logits = model(image)
        for block in model.encoder.blocks:
            block.forward = lambda z: torch.zeros_like(z)
        change = (model(image) - logits).std() / logits.std()
    assert 0.45 < logits.std() < 0.95 and change > 0.5


def test_defaults_and_parameters():
    assert dataclasses.asdict(unetr.UNETRConfig()) == {
        "image_size": 256, "patch_size": 16, "in_channels": 3, "out_channels": 1, "hidden_dim": 768, "num_layers": 12,
        "num_heads": 12, "mlp_dim": 3072, "dropout_rate": 0.0, "feature_size": 64,
    }  # fmt: skip
    with torch.device("meta"):
        model = unetr.UNETR()
    assert sum(p.numel() for p in model.parameters()) == 104_677_953
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


def test_configuration_is_frozen_and_accepts_what_json_gives():
    config = unetr.UNETRConfig(**json.loads(json.dumps(dataclasses.asdict(small(image_size=(64, 96))))))
    assert (config.size, config.grid, small().size) == ((64, 96), (4, 6), (64, 64))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.patch_size = 8


@pytest.mark.parametrize(
    "patch, layers, tapped",
    [(16, 12, (3, 6, 9, 12)), (8, 12, (4, 8, 12)), (32, 12, (2, 5, 7, 10, 12)), (2, 12, (12,)), (16, 4, (1, 2, 3, 4)),
     (16, 6, (2, 3, 4, 6)), (16, 24, (6, 12, 18, 24)), (32, 5, (1, 2, 3, 4, 5))],
)  # fmt: skip
def test_tapped_layers_are_evenly_spaced(patch, layers, tapped):
    assert unetr.UNETRConfig(patch_size=patch, num_layers=layers).tapped_layers == tapped


COUNTS = ("in_channels", "out_channels", "hidden_dim", "num_layers", "num_heads", "mlp_dim", "feature_size")
INVALID = [
    *((dict([(name, value)]), f"{name} must be from 1 to 1000000, got {value}") for name in COUNTS for value in (0, -4)),
    (dict(mlp_dim=1_000_001), "mlp_dim must be from 1 to 1000000, got 1000001"),
    *((dict(patch_size=value), f"patch_size must be a power of two, at least 2, got {value}") for value in (12, 1, 0, -16)),
    *((dict(image_size=value), f"image_size must be H or (H, W), multiples of patch_size 16, got {value}")
      for value in (250, 0, -16, (256, 7), (250, 256), (0, 64), (64, 64, 64), [64])),
    (dict(num_heads=7), "hidden_dim must be a multiple of num_heads 7, got 768"),
    (dict(patch_size=32, num_layers=4), "num_layers must be at least 5 for patch_size 32, got 4"),
    *((dict(dropout_rate=value), f"dropout_rate must be at least 0 and less than 1, got {value}")
      for value in (1, -0.1, float("nan"))),
]  # fmt: skip


@pytest.mark.parametrize("sizes, sentence", INVALID)
def test_an_invalid_value_is_refused_with_the_rule_and_the_value(sizes, sentence):
    with pytest.raises(ValueError) as error:
        unetr.UNETRConfig(**sizes)
    assert str(error.value) == sentence


def test_the_bounds_themselves_are_valid():
    for sizes in (dict(dropout_rate=0.99), dict(mlp_dim=1_000_000), dict(image_size=16), dict(patch_size=2),
                  dict(patch_size=32, num_layers=5), dict(in_channels=1, num_heads=1, feature_size=1, mlp_dim=1)):  # fmt: skip
        unetr.UNETRConfig(**sizes)


@pytest.mark.parametrize(
    "shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 65), (1, 3, 65, 64), (1, 3, 0, 64), (1, 3, 64, 64, 64)]
)
def test_a_wrong_image_shape_is_refused_with_the_shape_wanted(shape):
    with pytest.raises(ValueError) as error:
        unetr.UNETR(small())(torch.zeros(shape))
    assert str(error.value) == f"image must be (B, 3, H, W) with H and W multiples of 16, got {shape}"
