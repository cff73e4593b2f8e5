"""The encoder agrees with MONAI's ViT, the network with a second implementation."""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from conftest import largest_difference, resized, unetr
from monai.networks import nets as monai_nets
from torch import nn

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}


def randomize(model):
    """Random weights, biases and running statistics, with which every part matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(3)
            elif tensor.ndim == 1 and name.endswith("weight"):  # a norm's
                tensor.uniform_(1, 3, generator=generator)
            elif tensor.ndim == 1 or "pos" in name:
                tensor.normal_(std=0.5, generator=generator)
            else:
                tensor.normal_(std=1 / math.sqrt(tensor[0].numel()), generator=generator)
    return model


# Encoder against MONAI's ViT

NAMES = {
    "attn.out_proj": "attn.proj",
    "mlp.linear1": "mlp.fc1",
    "mlp.linear2": "mlp.fc2",
    "patch_embedding.position_embeddings": "pos_embed",
    "patch_embedding.patch_embeddings.1.": "patch_embed.proj.",
    "patch_embedding.patch_embeddings.": "patch_embed.proj.",
}


def encoder_weights(vit, config):
    """The state_dict of MONAI's ViT under this encoder's names."""
    ours = {}
    for name, tensor in vit.state_dict().items():
        # MONAI's perceptron flattens a patch as (row, column, channel)
        if name.endswith("patch_embeddings.1.weight"):
            tensor = tensor.unflatten(1, (config.patch_size, config.patch_size, config.in_channels))
            tensor = tensor.permute(0, 3, 1, 2)
        for theirs, here in NAMES.items():
            name = name.replace(theirs, here)
        if name == "patch_embed.proj.weight":
            tensor = tensor.flatten(1)
        if name == "pos_embed":
            tensor = tensor.unflatten(1, config.grid)
        if name.startswith(("patch_embed.", "pos_embed", "blocks.")) and "cross" not in name:
            ours[name] = tensor
    return ours


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("proj_type", ["perceptron", "conv"])
@pytest.mark.parametrize(
    "size, patch, channels, hidden, layers, heads, mlp",
    [
        ((64, 64), 16, 3, 48, 12, 4, 96),
        ((32, 80), 16, 1, 36, 4, 3, 100),
        ((48, 24), 8, 5, 64, 3, 8, 64),
        ((96, 64), 32, 2, 24, 5, 1, 30),
        ((224, 224), 16, 3, 192, 4, 3, 768),
    ],
)
def test_encoder_agrees_with_monai_at_every_layer(
    size, patch, channels, hidden, layers, heads, mlp, proj_type, dtype
):
    sizes = dict(
        img_size=size, patch_size=patch, in_channels=channels, hidden_size=hidden, num_layers=layers
    )
    vit = monai_nets.ViT(
        **sizes, num_heads=heads, mlp_dim=mlp, proj_type=proj_type, qkv_bias=True, spatial_dims=2
    )
    vit = randomize(vit).to(dtype).eval()
    config = unetr.UNETRConfig(size, patch, channels, 1, hidden, layers, heads, mlp, 0.0, 2)
    encoder = unetr.ViT(config).to(dtype).eval()
    encoder.load_state_dict(encoder_weights(vit, config))

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


# The full network against a second implementation, from the equations and Figure 2


class SecondImplementation:
    """UNETR as functions of the tensors of a state_dict, without any module of the script."""

    def __init__(self, state, patch, heads, training):
        self.state, self.patch, self.heads, self.training = state, patch, heads, training
        self.running = {}  # the running statistics after a step in training mode

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

    def encode(self, image):
        """z0 to z12 as feature maps (B, K, H/P, W/P), with token n at row n // columns."""
        P = self.patch
        rows, columns = image.shape[2] // P, image.shape[3] // P
        corners = [(r * P, c * P) for r in range(rows) for c in range(columns)]
        squares = [image[:, :, r : r + P, c : c + P].flatten(1) for r, c in corners]
        positions = resized(self.state["encoder.pos_embed"], (rows, columns))
        positions = torch.stack(
            [positions[:, r, c] for r in range(rows) for c in range(columns)], dim=1
        )
        z = [self.linear(torch.stack(squares, dim=1), "encoder.patch_embed.proj") + positions]
        for number in range(1, 13):
            z.append(self.transformer_layer(z[-1], number))
        return [
            torch.stack([z[:, c::columns] for c in range(columns)], dim=-1).transpose(1, 2)
            for z in z
        ]

    def orange(self, x, name):
        x = F.conv2d(x, self.state[f"{name}.0.weight"], padding=1)
        mean, var = self.state[f"{name}.1.running_mean"], self.state[f"{name}.1.running_var"]
        if self.training:
            unbiased = x.detach().var((0, 2, 3), correction=1)
            self.running[f"{name}.1.running_mean"] = 0.9 * mean + 0.1 * x.detach().mean((0, 2, 3))
            self.running[f"{name}.1.running_var"] = 0.9 * var + 0.1 * unbiased
            self.running[f"{name}.1.num_batches_tracked"] = (
                self.state[f"{name}.1.num_batches_tracked"] + 1
            )
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        weight, bias = self.state[f"{name}.1.weight"], self.state[f"{name}.1.bias"]
        mean, var, weight, bias = (vector.view(1, -1, 1, 1) for vector in (mean, var, weight, bias))
        return F.relu((x - mean) / (var + 1e-5).sqrt() * weight + bias)

    def green(self, x, name):
        return F.conv_transpose2d(
            x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride=2
        )

    def blue(self, x, *names):
        for name in names:
            x = self.orange(self.green(x, f"{name}.0"), f"{name}.1")
        return x

    def merge(self, below, skip, stage):
        x = torch.cat([self.green(below, f"{stage}.up"), skip], dim=1)
        return self.orange(self.orange(x, f"{stage}.merge1"), f"{stage}.merge2")

    def last(self, below, image, stage):
        skip = self.orange(self.orange(image, f"{stage}.skip.0"), f"{stage}.skip.1")
        return F.conv2d(
            self.merge(below, skip, stage), self.state["head.weight"], self.state["head.bias"]
        )

    def decode_16(self, image, z3, z6, z9, z12):
        """Figure 2."""
        x = self.merge(z12, self.blue(z9, "decoder.0.skip.0"), "decoder.0")
        x = self.merge(x, self.blue(z6, "decoder.1.skip.0", "decoder.1.skip.1"), "decoder.1")
        x = self.merge(
            x,
            self.blue(z3, "decoder.2.skip.0", "decoder.2.skip.1", "decoder.2.skip.2"),
            "decoder.2",
        )
        return self.last(x, image, "decoder.3")

    def decode_8(self, image, z4, z8, z12):
        """Three doublings: layers 4, 8 and 12."""
        x = self.merge(z12, self.blue(z8, "decoder.0.skip.0"), "decoder.0")
        x = self.merge(x, self.blue(z4, "decoder.1.skip.0", "decoder.1.skip.1"), "decoder.1")
        return self.last(x, image, "decoder.2")

    def inputs_of_the_decoder(self, image):
        z = self.encode(image)
        layers = {16: (3, 6, 9, 12), 8: (4, 8, 12)}[self.patch]
        return [image, *(z[layer] for layer in layers)]

    def decode(self, inputs):
        return {16: self.decode_16, 8: self.decode_8}[self.patch](*inputs)


def network(patch, size, training, dtype):
    """A network with random weights, and the second implementation of it."""
    config = unetr.UNETRConfig(size, patch, 3, 2, 48, 12, 4, 80, 0.0, 6)
    model = randomize(unetr.UNETR(config)).to(dtype).train(training)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    return model, SecondImplementation(state, patch, 4, training)


def random_image(size, dtype):
    return 4 * torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2)).to(dtype)


SIZES = [  # patch size, configured size, size of the image
    (8, (32, 48), (32, 48)),
    (16, (64, 64), (64, 64)),
    (16, (96, 32), (96, 32)),
    (16, (96, 32), (32, 96)),
    (16, (64, 48), (80, 96)),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("patch, configured, size", SIZES)
def test_network_agrees_with_a_second_implementation(patch, configured, size, training, dtype):
    model, second = network(patch, configured, training, dtype)
    image = random_image(size, dtype)
    with torch.no_grad():
        inputs = second.inputs_of_the_decoder(image)
        theirs = second.decode(inputs)
        largest = largest_difference(model(image), theirs)
        # Every input of the decoder matters, otherwise the agreement would say little.
        for i, removed in enumerate(inputs):
            without = second.decode([*inputs[:i], torch.zeros_like(removed), *inputs[i + 1 :]])
            assert (without - theirs).std() > 0.1 * theirs.std(), f"input {i} of the decoder"
    print(f"\nnetwork against a second implementation, P = {patch}, {dtype}: {largest:.1e}")
    assert largest <= TOLERANCE[dtype]


@pytest.mark.parametrize("patch, configured, size", [SIZES[0], SIZES[1], SIZES[4]])
def test_gradients_and_running_statistics_agree_with_a_second_implementation(
    patch, configured, size
):
    model, second = network(patch, configured, True, torch.float64)
    images = [random_image(size, torch.float64).requires_grad_() for _ in range(2)]
    # a loss that weights every logit differently
    weights = torch.randn(2, 2, *size, dtype=torch.float64)
    logits = [model(images[0]), second.decode(second.inputs_of_the_decoder(images[1]))]
    for side in logits:
        (side * weights).mean().backward()

    differences = {"image": largest_difference(images[0].grad, images[1].grad)}
    for name, parameter in model.named_parameters():
        expected = second.state[name].grad
        assert expected.any(), name
        differences[name] = largest_difference(parameter.grad, expected)
    name, largest = max(differences.items(), key=operator.itemgetter(1))
    print(f"\ngradients, P = {patch}, torch.float64: {largest:.1e}")
    assert largest <= 1e-9, name
    assert second.running.keys() == dict(model.named_buffers()).keys()
    for name, expected in second.running.items():
        torch.testing.assert_close(model.get_buffer(name), expected, rtol=1e-9, atol=1e-9)


# What the README says of MONAI's UNETR


def test_what_the_readme_says_of_monai(monkeypatch):
    def monai_unetr(**options):
        sizes = dict(
            in_channels=1, out_channels=1, img_size=32, hidden_size=12, mlp_dim=12, num_heads=3
        )
        return monai_nets.UNETR(**sizes, **options, spatial_dims=2)

    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args: pytest.fail("a fused kernel was used")
    )
    model = monai_unetr()
    outputs, tapped = [], []
    for module in (*model.vit.blocks, model.vit.norm):
        module.register_forward_hook(lambda module, args, output: outputs.append(output))
    reshape = model.proj_feat

    def watch(z):
        tapped.extend(number for number, output in enumerate(outputs, start=1) if output is z)
        return reshape(z)

    model.proj_feat = watch
    model(torch.rand(1, 1, 32, 32)).sum().backward()
    assert sorted(tapped) == [4, 7, 10, 13]  # the 13th output is that of the norm
    assert sum(parameter.grad is None for parameter in model.parameters()) == 24

    kinds = {type(module) for module in model.modules()}
    assert {nn.InstanceNorm2d, nn.LeakyReLU} <= kinds
    assert not kinds & {nn.BatchNorm2d, nn.ReLU}
    assert type(model.decoder5.conv_block).__name__ == "UnetResBlock"  # residual
    (first,) = model.encoder2.transp_conv_init.children()
    assert isinstance(first, nn.ConvTranspose2d)
    assert first.bias is None
    assert model.vit.norm.eps == 1e-5
    assert all(block.attn.qkv.bias is None for block in model.vit.blocks)
    assert isinstance(model.vit.blocks[0].attn.drop_weights, nn.Dropout)
    assert model.patch_size == (16, 16)
    assert len(model.vit.blocks) == 12
    assert model.encoder1.layer.conv1.out_channels == 16  # feature_size
    with pytest.raises(TypeError):
        monai_unetr(patch_size=8)
