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
    "patch_embedding.patch_embeddings.": "patch_embed.proj.",
}


def encoder_weights(vit, config):
    """The state_dict of MONAI's ViT under this encoder's names."""
    ours = {}
    for name, tensor in vit.state_dict().items():
        for theirs, here in NAMES.items():
            name = name.replace(theirs, here)
        if name.startswith(("patch_embed.", "pos_embed", "blocks.")) and "cross" not in name:
            ours[name] = tensor
    ours["patch_embed.proj.weight"] = ours["patch_embed.proj.weight"].flatten(1)
    ours["pos_embed"] = ours["pos_embed"].unflatten(1, config.grid)
    return ours


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
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
    size, patch, channels, hidden, layers, heads, mlp, dtype
):
    sizes = (channels, size, patch, hidden, mlp, layers, heads)
    vit = monai_nets.ViT(*sizes, proj_type="conv", qkv_bias=True, spatial_dims=2)
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
        grid = resized(self.state["encoder.pos_embed"], (rows, columns))
        positions = [grid[:, n // columns, n % columns] for n in range(len(squares))]
        z0 = self.linear(torch.stack(squares, dim=1), "encoder.patch_embed.proj")
        z = [z0 + torch.stack(positions, dim=1)]
        for number in range(1, 13):
            z.append(self.transformer_layer(z[-1], number))
        split = [[tokens[:, c::columns] for c in range(columns)] for tokens in z]
        return [torch.stack(parts, dim=-1).transpose(1, 2) for parts in split]

    def orange(self, x, name):
        x = F.conv2d(x, self.state[f"{name}.0.weight"], padding=1)
        mean, var = self.state[f"{name}.1.running_mean"], self.state[f"{name}.1.running_var"]
        if self.training:
            unbiased = x.detach().var((0, 2, 3), correction=1)
            self.running[f"{name}.1.running_mean"] = 0.9 * mean + 0.1 * x.detach().mean((0, 2, 3))
            self.running[f"{name}.1.running_var"] = 0.9 * var + 0.1 * unbiased
            batches = self.state[f"{name}.1.num_batches_tracked"]
            self.running[f"{name}.1.num_batches_tracked"] = batches + 1
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        weight, bias = self.state[f"{name}.1.weight"], self.state[f"{name}.1.bias"]
        mean, var, weight, bias = (vector.view(1, -1, 1, 1) for vector in (mean, var, weight, bias))
        return F.relu((x - mean) / (var + 1e-5).sqrt() * weight + bias)

    def green(self, x, name):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv_transpose2d(x, weight, bias, stride=2)

    def stage(self, number, x, skip_input, blues):
        """Figure 2: the skip connection is blue blocks, or for the image two orange blocks."""
        name = f"decoder.{number}"
        for i in range(blues or 2):
            skip = f"{name}.skip.{i}"
            if blues:
                skip_input = self.orange(self.green(skip_input, f"{skip}.0"), f"{skip}.1")
            else:
                skip_input = self.orange(skip_input, skip)
        x = torch.cat([self.green(x, f"{name}.up"), skip_input], dim=1)  # up first, then skip
        return self.orange(self.orange(x, f"{name}.merge1"), f"{name}.merge2")

    def decode(self, image, *z):
        """z3, z6, z9 and z12 if P = 16; z4, z8 and z12 if P = 8."""
        if self.patch == 16:
            z3, z6, z9, z12 = z
            x = self.stage(0, z12, z9, blues=1)
            x = self.stage(1, x, z6, blues=2)
            x = self.stage(2, x, z3, blues=3)
            x = self.stage(3, x, image, blues=0)
        else:
            z4, z8, z12 = z
            x = self.stage(0, z12, z8, blues=1)
            x = self.stage(1, x, z4, blues=2)
            x = self.stage(2, x, image, blues=0)
        return F.conv2d(x, self.state["head.weight"], self.state["head.bias"])

    def inputs_of_the_decoder(self, image):
        z = self.encode(image)
        layers = {16: (3, 6, 9, 12), 8: (4, 8, 12)}[self.patch]
        return [image, *(z[layer] for layer in layers)]


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
        theirs = second.decode(*inputs)
        largest = largest_difference(model(image), theirs)
        # Every input of the decoder matters, otherwise the agreement would say little.
        for i, removed in enumerate(inputs):
            without = second.decode(*inputs[:i], torch.zeros_like(removed), *inputs[i + 1 :])
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
    logits = [model(images[0]), second.decode(*second.inputs_of_the_decoder(images[1]))]
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
    def build(**options):
        sizes = dict(img_size=32, hidden_size=12, mlp_dim=12, num_heads=3, spatial_dims=2)
        return monai_nets.UNETR(in_channels=1, out_channels=1, **sizes, **options)

    def fused(*args):
        pytest.fail("a fused kernel was used")

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    model, outputs, tapped = build(), [], []
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
    assert model.vit.norm.eps == 1e-5
    assert all(block.attn.qkv.bias is None for block in model.vit.blocks)
    assert build(qkv_bias=True).vit.blocks[0].attn.qkv.bias is not None
    assert model.patch_size == (16, 16)
    assert len(model.vit.blocks) == 12
    assert model.encoder1.layer.conv1.out_channels == 16  # feature_size
    with pytest.raises(TypeError):
        build(patch_size=8)
