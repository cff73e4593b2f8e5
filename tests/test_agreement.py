"""Other people's code agrees: MONAI's ViT with the encoder, and a second writing of the paper with the whole network."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, largest_difference
from monai.networks import nets as monai_nets
from torch import nn

unetr = importlib.import_module("UNETR-2D")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}


def shake(model, seed=0):
    """Weights and statistics away from their start, so that a norm or a bias left out would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.is_floating_point():
                noise = torch.empty(tensor.shape).normal_(
                    std=0.5 / math.sqrt(max(tensor[0].numel(), 4)), generator=generator
                )
                tensor.copy_(noise + (tensor.ndim == 1 and name.endswith("weight")))  # norms around 1
    return model


# Encoder against MONAI's ViT


def encoder_weights(vit, channels, patch):
    """MONAI's ViT by this encoder's names. Its perceptron reads a patch as row, column, channel."""
    theirs, ours = vit.state_dict(), {}
    table, bias = (name for name in theirs if name.startswith("patch_embedding.patch_embeddings"))
    weight = theirs[table]
    if weight.ndim == 2:
        weight = weight.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2)
    ours = {
        "patch_embed.weight": weight.flatten(1),
        "patch_embed.bias": theirs[bias],
        "pos_embed": theirs["patch_embedding.position_embeddings"],
    }
    names = {
        "norm1": "norm1", "attn.qkv": "attn.qkv", "attn.out_proj": "attn.proj", "norm2": "norm2",
        "mlp.linear1": "mlp.fc1", "mlp.linear2": "mlp.fc2",
    }  # fmt: skip
    for layer in range(len(vit.blocks)):
        for their_name, our_name in names.items():
            for kind in ("weight", "bias"):
                ours[f"blocks.{layer}.{our_name}.{kind}"] = theirs[f"blocks.{layer}.{their_name}.{kind}"]
    return ours


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("proj_type", ["perceptron", "conv"])
@pytest.mark.parametrize(
    "size, patch, channels, hidden, layers, heads, mlp",
    [((64, 64), 16, 3, 48, 12, 4, 96), ((32, 80), 16, 1, 36, 4, 3, 100), ((48, 24), 8, 5, 64, 3, 8, 64),
     ((96, 64), 32, 2, 24, 5, 1, 30), ((224, 224), 16, 3, 192, 4, 3, 768)],
)  # fmt: skip
def test_encoder_agrees_with_monai_at_every_layer(size, patch, channels, hidden, layers, heads, mlp, proj_type, dtype):
    sizes = dict(img_size=size, patch_size=patch, in_channels=channels, hidden_size=hidden, num_layers=layers)
    vit = monai_nets.ViT(**sizes, num_heads=heads, mlp_dim=mlp, proj_type=proj_type, qkv_bias=True, spatial_dims=2)
    vit = shake(vit).to(dtype).eval()
    config = unetr.UNETRConfig(size, patch, channels, 1, hidden, layers, heads, mlp, 0.0, 2)
    model = unetr.UNETR(config).to(dtype).eval()
    missing, unexpected = model.load_state_dict(encoder_weights(vit, channels, patch), strict=False)
    assert not unexpected and not any(name.startswith(("blocks", "pos_embed", "patch_embed")) for name in missing)

    ours = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: ours.append(output))
    image = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        model(image)
        _, theirs = vit(image)
    assert len(ours) == len(theirs) == layers
    largest = max(map(largest_difference, ours, theirs))
    print(f"\nencoder against MONAI's ViT, {dtype}: {largest:.1e}")
    assert largest <= TOLERANCE[dtype]


# The whole network against a second writing, from the equations and Figure 2


class SecondWriting:
    """UNETR as functions of a state_dict's tensors, with no module of the script's."""

    def __init__(self, state, heads, training=False):
        self.state, self.heads, self.training = state, heads, training

    def __getitem__(self, name):
        return self.state[name]

    def layer_norm(self, x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self[f"{name}.weight"] + self[f"{name}.bias"]

    def linear(self, x, name):
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def transformer_layer(self, z, number):
        """Equations 2 to 4; number counts from 1."""
        name = f"blocks.{number - 1}"
        qkv = self.linear(self.layer_norm(z, f"{name}.norm1"), f"{name}.attn.qkv")
        size = z.shape[-1] // self.heads
        mixed = []
        for head in range(self.heads):
            q, k, v = (part[..., head * size : (head + 1) * size] for part in qkv.chunk(3, dim=-1))
            mixed.append((q @ k.mT / math.sqrt(size)).softmax(-1) @ v)
        z = z + self.linear(torch.cat(mixed, dim=-1), f"{name}.attn.proj")
        hidden = self.linear(self.layer_norm(z, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return z + self.linear(hidden, f"{name}.mlp.fc2")

    def z(self, image, patch, depth):
        """z0 to z_depth, each as an image (B, K, H/P, W/P): token n stands in row n // columns, column n % columns."""
        rows, columns = image.shape[2] // patch, image.shape[3] // patch
        squares = [
            image[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].flatten(1)
            for r in range(rows)
            for c in range(columns)
        ]
        z = self.linear(torch.stack(squares, dim=1), "patch_embed") + self["pos_embed"]
        outputs = [z]
        for number in range(1, depth + 1):
            outputs.append(self.transformer_layer(outputs[-1], number))
        return [torch.stack([z[:, c::columns] for c in range(columns)], dim=-1).transpose(1, 2) for z in outputs]

    def orange(self, x, name):
        x = F.conv2d(x, self[f"{name}.0.weight"], padding=1)
        mean, var = self[f"{name}.1.running_mean"], self[f"{name}.1.running_var"]
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        return F.relu(x * self[f"{name}.1.weight"].view(1, -1, 1, 1) + self[f"{name}.1.bias"].view(1, -1, 1, 1))

    def oranges(self, x, name):
        return self.orange(self.orange(x, f"{name}.0"), f"{name}.1")

    def green(self, x, name):
        return F.conv_transpose2d(x, self[f"{name}.weight"], self[f"{name}.bias"], stride=2)

    def blue(self, x, name):
        return self.orange(self.green(x, f"{name}.0"), f"{name}.1")

    def grey(self, x, name):
        return F.conv2d(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def merge(self, below, skip, stage):
        return self.oranges(torch.cat([self.green(below, f"ups.{stage}"), skip], dim=1), f"merges.{stage}")

    def patch_16(self, image):
        """Figure 2."""
        z = self.z(image, 16, depth=12)
        z3, z6, z9, z12 = z[3], z[6], z[9], z[12]
        eighth = self.merge(z12, self.blue(z9, "skips.0.0"), 0)
        quarter = self.merge(eighth, self.blue(self.blue(z6, "skips.1.0"), "skips.1.1"), 1)
        half = self.merge(quarter, self.blue(self.blue(self.blue(z3, "skips.2.0"), "skips.2.1"), "skips.2.2"), 2)
        return self.grey(self.merge(half, self.oranges(image, "skips.3"), 3), "head")

    def patch_8(self, image):
        """Three halvings: layers 4, 8 and 12."""
        z = self.z(image, 8, depth=12)
        z4, z8, z12 = z[4], z[8], z[12]
        quarter = self.merge(z12, self.blue(z8, "skips.0.0"), 0)
        half = self.merge(quarter, self.blue(self.blue(z4, "skips.1.0"), "skips.1.1"), 1)
        return self.grey(self.merge(half, self.oranges(image, "skips.2"), 2), "head")

    def patch_32(self, image):
        """Five halvings: layers 2, 5, 7, 10 and 12."""
        z = self.z(image, 32, depth=12)
        z2, z5, z7, z10, z12 = z[2], z[5], z[7], z[10], z[12]
        sixteenth = self.merge(z12, self.blue(z10, "skips.0.0"), 0)
        eighth = self.merge(sixteenth, self.blue(self.blue(z7, "skips.1.0"), "skips.1.1"), 1)
        x = self.blue(self.blue(self.blue(z5, "skips.2.0"), "skips.2.1"), "skips.2.2")
        quarter = self.merge(eighth, x, 2)
        x = self.blue(self.blue(self.blue(self.blue(z2, "skips.3.0"), "skips.3.1"), "skips.3.2"), "skips.3.3")
        half = self.merge(quarter, x, 3)
        return self.grey(self.merge(half, self.oranges(image, "skips.4"), 4), "head")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("patch, size", [(8, (32, 48)), (16, (64, 64)), (16, (96, 32)), (32, (64, 128))])
def test_network_agrees_with_a_second_writing(patch, size, training, dtype):
    config = unetr.UNETRConfig(size, patch, 3, 2, 48, 12, 4, 80, 0.0, 6)
    model = shake(unetr.UNETR(config)).to(dtype).train(training)
    second = SecondWriting({**model.state_dict()}, config.num_heads, training)
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        theirs = getattr(second, f"patch_{patch}")(image)
        largest = largest_difference(model(image), theirs)
    print(f"\nnetwork against a second writing, P = {patch}, {dtype}: {largest:.1e}")
    assert largest <= TOLERANCE[dtype]


# What the README says of MONAI's UNETR


def monai_unetr(**options):
    sizes = dict(in_channels=1, out_channels=1, img_size=32, feature_size=2, hidden_size=12, mlp_dim=12, num_heads=3)
    return monai_nets.UNETR(**sizes, **options, spatial_dims=2)


def test_monai_taps_layers_4_7_10_and_12_behind_a_norm():
    model = monai_unetr().eval()
    layers, read = [], []
    for block in model.vit.blocks:
        block.register_forward_hook(lambda module, args, output: layers.append(output))
    model.vit.norm.register_forward_hook(lambda module, args, output: layers.append(output))
    proj_feat = model.proj_feat
    model.proj_feat = lambda z: read.append(z) or proj_feat(z)
    model(torch.rand(1, 1, 32, 32))
    tapped = [next(number for number, layer in enumerate(layers, 1) if layer is z) for z in read]
    assert tapped == [4, 7, 10, 13]  # the 13th output is that of the norm, which follows layer 12


def test_monai_leaves_24_weights_without_gradient():
    model = monai_unetr()
    model(torch.rand(1, 1, 32, 32)).sum().backward()
    assert sum(p.grad is None for p in model.parameters()) == 24


def test_monai_builds_residual_blocks_with_instance_norm_and_leaky_relu():
    model = monai_unetr()
    kinds = {type(module) for module in model.modules()}
    assert nn.InstanceNorm2d in kinds and nn.LeakyReLU in kinds and not kinds & {nn.BatchNorm2d, nn.ReLU}
    assert model.decoder5.conv_block.__class__.__name__ == "UnetResBlock"
    convolutions = [m for m in model.decoder5.conv_block.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions and all(conv.bias is None for conv in convolutions)
    assert not hasattr(model.vit, "cls_token")
    widths = {m.out_channels for m in model.encoder2.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)}
    assert widths == {4}  # 2F, all along the chain
    assert all(block.norm1.eps == 1e-5 for block in model.vit.blocks)


def test_logits_start_where_the_readme_says():
    def scale(reset):
        total = 0.0
        for seed in range(10):
            torch.manual_seed(seed)
            model = unetr.UNETR(unetr.UNETRConfig(**{**SMALL, "feature_size": 16}))
            if reset:
                for module in model.modules():
                    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                        kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.ConvTranspose2d
                        kind.reset_parameters(module)
            with torch.no_grad():
                total += model(torch.rand(2, 3, 64, 64)).square().mean().sqrt().item()
        return total / 10

    assert scale(reset=False) == pytest.approx(1, abs=0.25) and scale(reset=True) == pytest.approx(0.4, abs=0.1)
