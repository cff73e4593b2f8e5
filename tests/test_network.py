"""The network: every configuration that is allowed runs, trains, is saved and restored; every other is refused."""

import dataclasses
import importlib
import io
import math

import pytest
import torch
from conftest import SMALL
from torch import nn

unetr = importlib.import_module("UNETR-2D")


def small(**sizes):
    return unetr.UNETRConfig(**{**SMALL, **sizes})


CONFIGURATIONS = {
    "square": small(),
    "rectangle": small(image_size=(32, 80)),
    "patch 2": small(patch_size=2, image_size=(8, 12)),
    "patch 4": small(patch_size=4, image_size=(16, 24)),
    "patch 8": small(patch_size=8, image_size=(32, 48)),
    "patch 32": small(patch_size=32, image_size=(64, 96)),
    "grey": small(in_channels=1),
    "many channels": small(in_channels=7, out_channels=5),
    "few layers": small(patch_size=4, num_layers=2, image_size=16),
    "dropout": small(dropout_rate=0.1),
}


@pytest.fixture(params=CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def config(request):
    return request.param


def images(config, batch=2, seed=0):
    return torch.rand(batch, config.in_channels, *config.size, generator=torch.Generator().manual_seed(seed))


def test_logits_have_the_size_of_the_image(config, device):
    image = images(config).to(device)
    assert unetr.UNETR(config).to(device)(image).shape == (2, config.out_channels, *config.size)


def test_every_parameter_gets_a_gradient(config, device):
    model = unetr.UNETR(config).to(device)
    model(images(config).to(device)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (3, 1), (6, 7)])
def test_any_multiple_of_the_patch_runs(config, grid):
    height, width = (side * config.patch_size for side in grid)
    image = torch.rand(1, config.in_channels, height, width)
    assert unetr.UNETR(config).eval()(image).shape == (1, config.out_channels, height, width)


def test_state_dict_round_trip(config):
    model, other = unetr.UNETR(config), unetr.UNETR(config)
    model(images(config))  # moves the running statistics, which have to be saved too
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(model.eval()(images(config)), other.eval()(images(config)))


def test_same_seed_same_output(config):
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(unetr.UNETR(config).eval()(images(config)))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_dropout_is_where_vit_has_it_and_only_in_training():
    model = unetr.UNETR(small(dropout_rate=0.5, image_size=32))
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.5
            module.register_forward_hook(lambda module, args, output, name=name: seen.append((name, output.shape[-1])))
    image = torch.rand(1, 3, 32, 32)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 0.0  # else training steps alone would change the output
    model.train()
    assert not torch.equal(model(image), model(image))
    one_layer = [("dropout", 24), ("mlp.dropout", 40), ("dropout", 24)]  # MSA's output, the MLP's units, its output
    layers = [(f"blocks.{i}.{name}", size) for i in range(5) for name, size in one_layer]
    assert seen == 2 * [("dropout", 24), *layers]
    model.eval()
    assert torch.equal(model(image), model(image))


def test_transformer_starts_as_a_vit_does():
    torch.manual_seed(0)
    model = unetr.UNETR(small(hidden_dim=96, mlp_dim=192, image_size=128))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 1 + 4 * 5
    for weight in [model.pos_embed, *(linear.weight for linear in linears)]:
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert weight.abs().max() > 0.05
    assert not any(linear.bias.any() for linear in linears)


def test_logits_start_at_unit_scale():
    scales = []
    for seed in range(10):
        torch.manual_seed(seed)
        scales.append(unetr.UNETR(small(feature_size=16))(images(small())).square().mean().sqrt().item())
    assert 0.75 < sum(scales) / 10 < 1.25  # PyTorch's own start: 0.4


def test_weights_are_drawn_once(monkeypatch):
    drawn = 0

    def count(draw):
        def counted(tensor, *args, **kwargs):
            nonlocal drawn
            drawn += tensor.numel()
            return draw(tensor, *args, **kwargs)

        return counted

    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, count(getattr(torch.Tensor, name)))
    model = unetr.UNETR(small())
    assert drawn == sum(p.numel() for p in model.parameters() if p.ndim > 1)


def test_defaults_are_the_papers():
    config = unetr.UNETRConfig()
    assert dataclasses.asdict(config) == {
        "image_size": 256, "patch_size": 16, "in_channels": 3, "out_channels": 1, "hidden_dim": 768, "num_layers": 12,
        "num_heads": 12, "mlp_dim": 3072, "dropout_rate": 0.0, "feature_size": 64,
    }  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.patch_size = 8


def test_parameters_are_as_many_as_the_architecture_says():
    with torch.device("meta"):
        model = unetr.UNETR()
    assert sum(p.numel() for p in model.parameters()) == 104_677_953
    names = {name for name, _ in model.blocks[11].named_parameters()}
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert names == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert model.pos_embed.shape == (1, 256, 768) and model.patch_embed.weight.shape == (768, 3 * 16 * 16)


@pytest.mark.parametrize(
    "patch, layers, tapped",
    [(16, 12, (3, 6, 9, 12)), (8, 12, (4, 8, 12)), (32, 12, (2, 5, 7, 10, 12)), (2, 12, (12,)), (16, 4, (1, 2, 3, 4)),
     (16, 6, (2, 3, 4, 6)), (16, 24, (6, 12, 18, 24)), (32, 5, (1, 2, 3, 4, 5))],
)  # fmt: skip
def test_tapped_layers_are_spread_evenly(patch, layers, tapped):
    assert unetr.UNETRConfig(patch_size=patch, num_layers=layers).tapped_layers == tapped


WHOLE = "must be a whole number from 1 to 1000000"
REFUSED = [
    (dict(image_size=250), "image_size must be a multiple of patch_size 16 on both sides, got 250; "
     "height 240 or 256 and width 240 or 256 would do"),
    (dict(image_size=(256, 7)), "image_size must be a multiple of patch_size 16 on both sides, got (256, 7); "
     "height 256 or 272 and width 16 would do"),
    (dict(image_size=(250, 256), patch_size=8), "image_size must be a multiple of patch_size 8 on both sides, "
     "got (250, 256); height 248 or 256 and width 256 or 264 would do"),
    (dict(image_size=(64, 64, 64)), f"image_size {WHOLE}, got (64, 64, 64); 256 would do"),
    (dict(image_size="large"), f"image_size {WHOLE}, got 'large'; 256 would do"),
    (dict(image_size=(0, 64)), f"image_size {WHOLE}, got (0, 64); 256 would do"),
    (dict(patch_size=12), "patch_size must be a power of two from 2 up, got 12; 16 would do"),
    (dict(patch_size=1), "patch_size must be a power of two from 2 up, got 1; 2 would do"),
    (dict(patch_size=-16), f"patch_size {WHOLE}, got -16; 16 would do"),
    (dict(in_channels=0), f"in_channels {WHOLE}, got 0; 3 would do"),
    (dict(in_channels=(3, 3)), f"in_channels {WHOLE}, got (3, 3); 3 would do"),
    (dict(out_channels=1_000_001), f"out_channels {WHOLE}, got 1000001; 1 would do"),
    (dict(hidden_dim=768.0), f"hidden_dim {WHOLE}, got 768.0; 768 would do"),
    (dict(feature_size=0), f"feature_size {WHOLE}, got 0; 64 would do"),
    (dict(mlp_dim=None), f"mlp_dim {WHOLE}, got None; 3072 would do"),
    (dict(num_heads=7), "hidden_dim must be a multiple of num_heads 7, got 768; 763 or 770 would do"),
    (dict(patch_size=32, num_layers=4), "num_layers must be 5 or more for the 5 decoder stages of patch_size 32, "
     "got 4; 5 would do"),
    (dict(dropout_rate=1), "dropout_rate must be a number from 0 up to, not including, 1, got 1; 0.1 would do"),
    (dict(dropout_rate=-0.1), "dropout_rate must be a number from 0 up to, not including, 1, got -0.1; 0.1 would do"),
    (dict(dropout_rate=math.nan), "dropout_rate must be a number from 0 up to, not including, 1, got nan; "
     "0.1 would do"),
    (dict(dropout_rate="x"), "dropout_rate must be a number from 0 up to, not including, 1, got 'x'; 0.1 would do"),
]  # fmt: skip


@pytest.mark.parametrize("sizes, sentence", REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(sizes, sentence):
    with pytest.raises(ValueError) as error:
        unetr.UNETRConfig(**sizes)
    assert str(error.value) == sentence


def test_what_just_works_is_not_refused():
    for sizes in (dict(dropout_rate=0), dict(dropout_rate=0.99), dict(out_channels=1_000_000), dict(image_size=16)):
        unetr.UNETRConfig(**sizes)
    unetr.UNETRConfig(patch_size=32, num_layers=5)


@pytest.mark.parametrize(
    "shape", [(1, 3, 64), (3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 65), (1, 3, 65, 64), (1, 3, 0, 64)]
)
def test_wrong_image_shapes_are_refused_by_name(shape):
    with pytest.raises(ValueError) as error:
        unetr.UNETR(small())(torch.zeros(shape))
    channels = "C" if shape[1:2] == (3,) and len(shape) == 4 else 3  # patchify knows of no number
    wanted = f"the image must have shape (B, {channels}, H, W) with H and W multiples of 16"
    assert str(error.value) == f"{wanted}, got {shape}"
