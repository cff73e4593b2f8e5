"""Agreement: the encoder with MONAI's ViT, and the full network with an independent reimplementation of the paper."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import largest_difference, unetr
from monai.networks import nets as monai_nets
from torch import nn

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}


def randomize(model):
    """Random weights, biases, and running statistics, so that a missing norm or bias would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.5 / math.sqrt(max(tensor[0].numel(), 4)), generator=generator)
                tensor += tensor.ndim == 1 and name.endswith("weight")  # norms around 1
    return model


# Encoder against MONAI's ViT


NAMES = {"attn.out_proj": "attn.proj", "mlp.linear1": "mlp.fc1", "mlp.linear2": "mlp.fc2",
         "patch_embedding.position_embeddings": "pos_embed", "patch_embedding.patch_embeddings.1.": "patch_embed.proj.",
         "patch_embedding.patch_embeddings.": "patch_embed.proj."}  # fmt: skip


def encoder_weights(vit, channels, patch):
    """The state_dict of MONAI's ViT under this encoder's names. Its perceptron flattens a patch as row, column, channel."""
    ours = {}
    for name, tensor in vit.state_dict().items():
        if name.endswith("patch_embeddings.1.weight"):
            tensor = tensor.unflatten(1, (patch, patch, channels)).permute(0, 3, 1, 2)
        for theirs, here in NAMES.items():
            name = name.replace(theirs, here)
        if name.startswith(("patch_embed.", "pos_embed", "blocks.")) and "cross" not in name:
            ours[name] = tensor.flatten(1) if name == "patch_embed.proj.weight" else tensor
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
    vit = randomize(vit).to(dtype).eval()
    config = unetr.UNETRConfig(size, patch, channels, 1, hidden, layers, heads, mlp, 0.0, 2)
    encoder = unetr.ViT(config).to(dtype).eval()
    encoder.load_state_dict(encoder_weights(vit, channels, patch))

    ours = []
    for block in encoder.blocks:
        block.norm1.eps = block.norm2.eps = 1e-5  # MONAI's
        block.register_forward_hook(lambda module, args, output: ours.append(output))
    image = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        encoder(image)
        _, theirs = vit(image)
    assert len(ours) == len(theirs) == layers
    largest = max(map(largest_difference, ours, theirs))
    print(f"\nencoder against MONAI's ViT, {dtype}: {largest:.1e}")
    assert largest <= TOLERANCE[dtype]


# The full network against an independent reimplementation, from the equations and Figure 2


class Reimplementation:
    """UNETR as functions of the tensors of a state_dict, without any module of the script."""

    def __init__(self, state, heads, training):
        self.state, self.heads, self.training = state, heads, training

    def layer_norm(self, x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def linear(self, x, name):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def transformer_layer(self, z, number):
        """Equations 2 to 6; number counts from 1."""
        name, size, attended = f"encoder.blocks.{number - 1}", z.shape[-1] // self.heads, []
        qkv = self.linear(self.layer_norm(z, f"{name}.norm1"), f"{name}.attn.qkv")
        for head in range(self.heads):
            q, k, v = (part[..., head * size : (head + 1) * size] for part in qkv.chunk(3, dim=-1))
            attended.append((q @ k.mT / math.sqrt(size)).softmax(-1) @ v)
        z = z + self.linear(torch.cat(attended, dim=-1), f"{name}.attn.proj")
        hidden = self.linear(self.layer_norm(z, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return z + self.linear(hidden, f"{name}.mlp.fc2")

    def z(self, image, patch):
        """z0 to z12 as feature maps (B, K, H/P, W/P): token n is at row n // columns, column n % columns."""
        rows, columns = image.shape[2] // patch, image.shape[3] // patch
        corners = [(r * patch, c * patch) for r in range(rows) for c in range(columns)]
        squares = [image[:, :, r : r + patch, c : c + patch].flatten(1) for r, c in corners]
        z = [self.linear(torch.stack(squares, dim=1), "encoder.patch_embed.proj") + self.state["encoder.pos_embed"]]
        for number in range(1, 13):
            z.append(self.transformer_layer(z[-1], number))
        return [torch.stack([z[:, c::columns] for c in range(columns)], dim=-1).transpose(1, 2) for z in z]

    def orange(self, x, name):
        x = F.conv2d(x, self.state[f"{name}.0.weight"], padding=1)
        mean, var = self.state[f"{name}.1.running_mean"], self.state[f"{name}.1.running_var"]
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        weight, bias = self.state[f"{name}.1.weight"], self.state[f"{name}.1.bias"]
        mean, var, weight, bias = (vector.view(1, -1, 1, 1) for vector in (mean, var, weight, bias))
        return F.relu((x - mean) / (var + 1e-5).sqrt() * weight + bias)

    def green(self, x, name):
        return F.conv_transpose2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride=2)

    def blue(self, x, *names):
        for name in names:
            x = self.orange(self.green(x, f"{name}.0"), f"{name}.1")
        return x

    def merge(self, below, skip, stage):
        x = torch.cat([self.green(below, f"{stage}.up"), skip], dim=1)
        return self.orange(self.orange(x, f"{stage}.merge1"), f"{stage}.merge2")

    def last(self, below, image, stage):
        skip = self.orange(self.orange(image, f"{stage}.skip.0"), f"{stage}.skip.1")
        return F.conv2d(self.merge(below, skip, stage), self.state["head.weight"], self.state["head.bias"])

    def patch_16(self, image):
        """Figure 2."""
        z = self.z(image, 16)
        x = self.merge(z[12], self.blue(z[9], "decoder.0.skip.0"), "decoder.0")
        x = self.merge(x, self.blue(z[6], "decoder.1.skip.0", "decoder.1.skip.1"), "decoder.1")
        x = self.merge(x, self.blue(z[3], "decoder.2.skip.0", "decoder.2.skip.1", "decoder.2.skip.2"), "decoder.2")
        return self.last(x, image, "decoder.3")

    def patch_8(self, image):
        """Three doublings: layers 4, 8 and 12."""
        z = self.z(image, 8)
        x = self.merge(z[12], self.blue(z[8], "decoder.0.skip.0"), "decoder.0")
        x = self.merge(x, self.blue(z[4], "decoder.1.skip.0", "decoder.1.skip.1"), "decoder.1")
        return self.last(x, image, "decoder.2")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("patch, size", [(8, (32, 48)), (16, (64, 64)), (16, (96, 32))])
def test_network_agrees_with_an_independent_reimplementation(patch, size, training, dtype):
    config = unetr.UNETRConfig(size, patch, 3, 2, 48, 12, 4, 80, 0.0, 6)
    model = randomize(unetr.UNETR(config)).to(dtype).train(training)
    second = Reimplementation({**model.state_dict()}, 4, training)
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        theirs = getattr(second, f"patch_{patch}")(image)
        largest = largest_difference(model(image), theirs)
    print(f"\nnetwork against an independent reimplementation, P = {patch}, {dtype}: {largest:.1e}")
    assert largest <= TOLERANCE[dtype]


# What the README says of MONAI's UNETR


def monai_unetr(**options):
    sizes = dict(in_channels=1, out_channels=1, img_size=32, feature_size=2, hidden_size=12, mlp_dim=12, num_heads=3)
    return monai_nets.UNETR(**sizes, **options, spatial_dims=2)


def test_monai_taps_layers_4_7_10_and_12_behind_a_norm():
    model, layers, read = monai_unetr().eval(), [], []
    for module in (*model.vit.blocks, model.vit.norm):
        module.register_forward_hook(lambda module, args, output: layers.append(output))
    proj_feat = model.proj_feat
    model.proj_feat = lambda z: read.append(z) or proj_feat(z)
    model(torch.rand(1, 1, 32, 32))
    tapped = [next(number for number, layer in enumerate(layers, 1) if layer is z) for z in read]
    assert tapped == [4, 7, 10, 13]  # the 13th output is that of the norm, which follows layer 12


def test_monai_leaves_24_weights_without_gradient():
    model = monai_unetr()
    model(torch.rand(1, 1, 32, 32)).sum().backward()
    assert sum(p.grad is None for p in model.parameters()) == 24


def test_monai_builds_other_decoder_blocks_and_no_qkv_bias():
    model = monai_unetr()
    kinds = {type(module) for module in model.modules()}
    assert {nn.InstanceNorm2d, nn.LeakyReLU} <= kinds and not kinds & {nn.BatchNorm2d, nn.ReLU}
    assert type(model.decoder5.conv_block).__name__ == "UnetResBlock"  # residual
    first = [module for module in model.encoder2.transp_conv_init.modules() if not [*module.children()]]
    assert [type(module) for module in first] == [nn.ConvTranspose2d]
    assert all(block.attn.qkv.bias is None for block in model.vit.blocks)


def test_monai_fixes_the_patch_size_and_computes_the_attention_matrix(monkeypatch):
    assert monai_unetr().patch_size == (16, 16)
    with pytest.raises(TypeError):
        monai_unetr(patch_size=8)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_: pytest.fail("a fused kernel was used"))
    monai_unetr()(torch.rand(1, 1, 32, 32))
