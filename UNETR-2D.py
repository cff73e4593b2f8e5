"""2D UNETR [1]: image segmentation with a Vision Transformer [2] encoder and a CNN decoder.

The network at its defaults, Figure 2 of [1] in 2D, with output shapes for an image (3, 256, 256):

    orange = conv 3x3, batch norm, ReLU         green = transposed conv 2x2, stride 2
    blue   = green, then orange                 grey  = conv 1x1

    encoder      image > patches > linear, add position embedding                  (256 tokens, 768)
                 > 12 Transformer layers, with outputs z3, z6, z9, z12             (768, 16, 16)
    decoder[0]   cat(z12 > green, z9 > blue)                   > orange > orange   (512, 32, 32)
    decoder[1]   cat(x > green, z6 > blue > blue)              > orange > orange   (256, 64, 64)
    decoder[2]   cat(x > green, z3 > blue > blue > blue)       > orange > orange   (128, 128, 128)
    decoder[3]   cat(x > green, image > orange > orange)       > orange > orange   (64, 256, 256)
    head         x > grey                                                          (1, 256, 256)

z3 is the output of layer 3 as a feature map, and so on. x is the previous row's output. Every block
in a row outputs the number of channels shown on the right; cat concatenates along the channels.

Run it:    python UNETR-2D.py [image] [options]    prints shapes, and plots an image beside the
           network's output in unetr-2d.png; the network is untrained unless given --weights
Call it:   cp UNETR-2D.py unetr_2d.py              a module name cannot contain a hyphen; then:
           from unetr_2d import UNETR, UNETRConfig
           model = UNETR(UNETRConfig(out_channels=4)).eval()  # (B, 3, H, W) -> (B, 4, H, W)
Save it:   save_checkpoint(model, "unetr.pt"); model = load_checkpoint("unetr.pt")

[1] Hatamizadeh et al., "UNETR", https://arxiv.org/abs/2103.10504 (source of equations and figures)
[2] Dosovitskiy et al., "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929 (ViT)
[3] He et al., "Delving Deep into Rectifiers", https://arxiv.org/abs/1502.01852 (initialization)

Symbols: batch size B, image channels C, image height H and width W in pixels, patch size P,
number of tokens N = (H/P)(W/P), hidden size K, feature map height h and width w.
"""

import argparse
import math
import textwrap
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.backend_bases import FigureCanvasBase
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

# Configuration


@dataclass(frozen=True)
class UNETRConfig:
    """Hyperparameters. The defaults of the encoder and the decoder are the paper's.

    Raises ValueError for an invalid integer or size; nn.Dropout checks dropout_rate later.
    """

    image_size: int | tuple[int, int] = 256  # H (and W = H), or (H, W), in pixels
    patch_size: int = 16  # P, in pixels
    in_channels: int = 3  # C
    out_channels: int = 1  # 1 for a binary mask, otherwise one per class
    hidden_dim: int = 768  # K, the embedding dimension
    num_layers: int = 12  # Transformer layers
    num_heads: int = 12  # attention heads per layer, each of dimension K / num_heads
    mlp_dim: int = 3072  # hidden units of the MLP in each layer
    dropout_rate: float = 0.0  # after position embedding, attention, GELU and MLP; encoder only
    feature_size: int = 64  # decoder channels at full resolution, doubled at each coarser stage

    @property
    def size(self) -> tuple[int, int]:
        """(H, W), in pixels."""
        if isinstance(self.image_size, int):
            return (self.image_size, self.image_size)
        return tuple(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(H/P, W/P), in patches."""
        height, width = self.size
        return (height // self.patch_size, width // self.patch_size)

    @property
    def num_stages(self) -> int:
        """Decoder stages, log2(P): each doubles the resolution. 4 for P = 16."""
        return int(math.log2(self.patch_size))

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """Layers that feed the decoder, counted from 1: 3, 6, 9, 12; or 4, 8, 12 if P = 8."""
        stages = range(1, self.num_stages + 1)
        return tuple(round(self.num_layers * i / self.num_stages) for i in stages)

    def __post_init__(self) -> None:
        K, P, heads = self.hidden_dim, self.patch_size, self.num_heads
        for name, value in asdict(self).items():
            if name not in ("image_size", "patch_size", "dropout_rate") and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if P < 2 or 2**self.num_stages != P:
            raise ValueError(f"patch_size must be a power of two of at least 2, got {P}")
        if len(self.size) != 2 or any(side < P or side % P for side in self.size):
            rule = f"image_size must be H or (H, W), positive multiples of patch_size {P}"
            raise ValueError(f"{rule}, got {self.image_size}")
        if K % heads:
            raise ValueError(f"hidden_dim must be a multiple of num_heads {heads}, got {K}")
        if self.num_layers < self.num_stages:
            rule = f"num_layers must be at least {self.num_stages} for patch_size {P}"
            raise ValueError(f"{rule}, got {self.num_layers}")


# Encoder


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C*P*P): row-major patches, flattened as (channel, row, column)."""
    B, C, H, W = image.shape
    P = patch_size
    patches = image.reshape(B, C, H // P, P, W // P, P)
    patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, H/P, W/P, C, P, P)
    return patches.reshape(B, (H // P) * (W // P), C * P * P)


class PatchEmbed(nn.Module):
    """Linear projection of the patches, E in eq. 1: (B, C, H, W) -> (B, N, K)."""

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Linear(config.in_channels * config.patch_size**2, config.hidden_dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(patchify(image, self.patch_size))


class Attention(nn.Module):
    """Multi-head self-attention, MSA in eq. 2, mixes tokens: (B, N, K) -> (B, N, K)."""

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_dim, 3 * config.hidden_dim)
        self.proj = nn.Linear(config.hidden_dim, config.hidden_dim)  # W_msa in eq. 6

    def forward(self, z: Tensor) -> Tensor:
        B, N, K = z.shape
        qkv = self.qkv(z).reshape(B, N, 3, self.num_heads, K // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, K/heads) each
        # Eqs. 4 and 5: softmax(q k^T / sqrt(K/heads)) v, without dropout on the attention weights.
        # The fused kernels, which PyTorch uses where it can, do not store the N x N matrix.
        heads = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, K/heads)
        heads = heads.transpose(1, 2).reshape(B, N, K)  # concatenated
        return self.proj(heads)  # eq. 6


class MLP(nn.Module):
    """The MLP in eq. 3 transforms each token separately: (B, N, K) -> (B, N, K)."""

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_dim, config.mlp_dim)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.fc2 = nn.Linear(config.mlp_dim, config.hidden_dim)

    def forward(self, z: Tensor) -> Tensor:
        z = F.gelu(self.fc1(z))
        z = self.dropout(z)
        return self.fc2(z)


class TransformerBlock(nn.Module):
    """A Transformer layer, pre-norm, with two residual connections: (B, N, K) -> (B, N, K)."""

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_dim, eps=1e-6)  # ViT's epsilon
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_dim, eps=1e-6)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.dropout(self.attn(self.norm1(z)))  # eq. 2
        z = z + self.dropout(self.mlp(self.norm2(z)))  # eq. 3
        return z


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize pos_embed bicubically, without antialiasing: (1, h, w, K) -> (1, *grid, K)."""
    if tuple(pos_embed.shape[1:3]) == grid:
        return pos_embed
    pos_embed = pos_embed.permute(0, 3, 1, 2)  # (1, K, h, w)
    pos_embed = F.interpolate(pos_embed, size=grid, mode="bicubic")
    return pos_embed.permute(0, 2, 3, 1)


class ViT(nn.Module):
    """Vision Transformer [2] without a class token: image -> [z3, z6, z9, z12] as feature maps.

    (B, C, H, W) -> a list of (B, K, H/P, W/P), one per tapped layer. H and W may be any multiples
    of P: if they differ from the configured size, the position embedding is resized. Raises
    ValueError for any other shape.

    The parameters have timm's names. Two shapes differ: the patch projection is linear, and the
    position embedding is a grid (1, H/P, W/P, K). load_vit loads the weights of a timm ViT.
    """

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, *config.grid, config.hidden_dim))  # E_pos
        self.dropout = nn.Dropout(config.dropout_rate)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))

    def forward(self, image: Tensor) -> list[Tensor]:
        C, P = self.config.in_channels, self.config.patch_size
        shape = tuple(image.shape)
        if len(shape) != 4 or shape[1] != C or any(side < P or side % P for side in shape[2:]):
            rule = f"image must be (B, {C}, H, W) with H and W positive multiples of {P}"
            raise ValueError(f"{rule}, got {shape}")

        grid = (shape[2] // P, shape[3] // P)
        pos_embed = resize_pos_embed(self.pos_embed, grid)  # (1, H/P, W/P, K)
        z = self.patch_embed(image) + pos_embed.flatten(1, 2)  # z0 in eq. 1, (B, N, K)
        z = self.dropout(z)
        feature_maps = []
        for layer, block in enumerate(self.blocks, start=1):
            z = block(z)
            if layer in self.config.tapped_layers:
                feature_map = z.transpose(1, 2).unflatten(2, grid)  # (B, K, H/P, W/P)
                # Without a copy, the strides of channels-last would slow the decoder down.
                feature_maps.append(feature_map.contiguous())
        return feature_maps  # no final norm: the decoder gets the output of the last layer as it is


# Decoder: the blocks are named after their colors in Figure 2


class OrangeBlock(nn.Sequential):
    """Conv 3x3, batch norm, ReLU: (B, in_channels, h, w) -> (B, out_channels, h, w)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            # a bias would be redundant before batch norm
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class GreenBlock(nn.ConvTranspose2d):
    """Transposed conv 2x2, stride 2: (B, in_channels, h, w) -> (B, out_channels, 2h, 2w)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)


class BlueBlock(nn.Sequential):
    """Green, then orange: (B, in_channels, h, w) -> (B, out_channels, 2h, 2w)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            GreenBlock(in_channels, out_channels),
            OrangeBlock(out_channels, out_channels),
        )


class GreyBlock(nn.Conv2d):
    """Conv 1x1: (B, in_channels, h, w) -> (B, out_channels, h, w)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)


class DecoderStage(nn.Module):
    """One resolution level of Figure 2: upsample x, concatenate the skip connection, merge.

    x: (B, in_channels, h, w) -> (B, out_channels, 2h, 2w). The skip module must map skip_input to
    the same output shape.
    """

    def __init__(self, in_channels: int, out_channels: int, skip: nn.Module) -> None:
        super().__init__()
        self.up = GreenBlock(in_channels, out_channels)
        self.skip = skip
        self.merge1 = OrangeBlock(2 * out_channels, out_channels)
        self.merge2 = OrangeBlock(out_channels, out_channels)

    def forward(self, x: Tensor, skip_input: Tensor) -> Tensor:
        x = torch.cat([self.up(x), self.skip(skip_input)], dim=1)  # (B, 2*out_channels, 2h, 2w)
        x = self.merge1(x)  # (B, out_channels, 2h, 2w)
        return self.merge2(x)


# Network


class UNETR(nn.Module):
    """Figure 2 in 2D: (B, C, H, W) -> logits (B, out_channels, H, W).

    Images may have any value range, as long as it is the same in training and prediction;
    load_image returns [0, 1]. Probabilities are the sigmoid of the logits if out_channels is 1,
    otherwise their softmax over dim=1. H and W may be any multiples of P.
    """

    def __init__(self, config: UNETRConfig = UNETRConfig()) -> None:
        super().__init__()
        self.config = config
        self.encoder = ViT(config)
        self.decoder = nn.ModuleList()  # the deepest stage first
        x_channels = config.hidden_dim
        for i in range(config.num_stages):  # the comments are for P = 16
            channels = config.feature_size * 2 ** (config.num_stages - 1 - i)  # 512, 256, 128, 64
            if i < config.num_stages - 1:  # z9, z6, z3: one, two, three blue blocks
                skip = nn.Sequential(BlueBlock(config.hidden_dim, channels))
                skip.extend(BlueBlock(channels, channels) for _ in range(i))
            else:  # the image
                skip = nn.Sequential(OrangeBlock(config.in_channels, channels))
                skip.append(OrangeBlock(channels, channels))
            self.decoder.append(DecoderStage(x_channels, channels, skip))
            x_channels = channels
        self.head = GreyBlock(x_channels, config.out_channels)
        initialize(self)

    def forward(self, image: Tensor) -> Tensor:
        *feature_maps, x = self.encoder(image)  # z3, z6, z9 and z12
        skip_inputs = [*reversed(feature_maps), image]  # z9, z6, z3, image
        for stage, skip_input in zip(self.decoder, skip_inputs, strict=True):
            x = stage(x, skip_input)
        return self.head(x)


def initialize(model: UNETR) -> None:
    """Initialize all parameters and running statistics of a UNETR.

    linear, position embedding   normal, std 0.02
    convolution                  He normal [3], std sqrt(2 / fan-in)
    transposed convolution       normal, std 1 / sqrt(in_channels), which preserves the scale:
                                 an output pixel sums one term per input channel; no ReLU follows
    all biases                   zero
    layer norm, batch norm       PyTorch's: weight and running variance one, the rest zero
    """
    nn.init.normal_(model.encoder.pos_embed, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            std = 0.02
        elif isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / module.weight[0].numel())
        elif isinstance(module, nn.ConvTranspose2d):
            std = 1 / math.sqrt(module.in_channels)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            module.reset_parameters()
            continue
        else:
            continue
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Checkpoints


class CheckpointError(ValueError):
    """The file was not written by save_checkpoint, or it is damaged."""


def save_checkpoint(model: UNETR, path: str | Path) -> None:
    """Save a network and its configuration for later use: {"config": ..., "state_dict": ...}.

    Training state, such as the optimizer's, is not saved. Raises TypeError for a wrapped network,
    such as the result of torch.compile: pass the network itself.
    """
    if not isinstance(model, UNETR):
        raise TypeError(f"model must be a UNETR, got {type(model).__name__}")
    config = asdict(model.config)
    for name, value in config.items():
        plain = np.asarray(value).tolist()  # NumPy's numbers would not load again
        config[name] = tuple(plain) if isinstance(plain, list) else plain
    torch.save({"config": config, "state_dict": model.state_dict()}, path)


def load_checkpoint(path: str | Path) -> UNETR:
    """Load a network saved by save_checkpoint, on the CPU and in eval mode.

    Call .train() on it to continue training. Raises CheckpointError, a ValueError, if the file is
    damaged or was not written by save_checkpoint; OSError if it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises EOFError, KeyError and others
            raise CheckpointError(f"{path} is not a readable checkpoint") from error
    if not isinstance(checkpoint, dict) or not {"config", "state_dict"} <= checkpoint.keys():
        rule = "must contain config and state_dict, as written by save_checkpoint"
        raise CheckpointError(f"{path} {rule}")

    try:
        config = UNETRConfig(**checkpoint["config"])
        missing = asdict(config).keys() - checkpoint["config"].keys()
        if missing:  # today's defaults would take their place
            raise ValueError(f"missing {', '.join(sorted(missing))}")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has an invalid configuration: {error}") from error

    model = UNETR(config)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except Exception as error:
        reason = textwrap.shorten(str(error), 300)
        raise CheckpointError(f"{path} does not match its configuration: {reason}") from error
    return model.eval()


def load_vit(encoder: ViT, state_dict: dict[str, Tensor]) -> None:
    """Load the weights of a timm ViT: load_vit(model.encoder, vit.state_dict()).

    The kernel of the patch embedding, (K, C, P, P), is flattened. The position embedding,
    (1, tokens, K), is taken as a square grid and resized. The prefix tokens (class, distillation
    and register) and what follows the last layer have no place in the encoder and are left out.

    Raises ValueError if the positions cannot be read as a square grid, or in more than one way;
    RuntimeError, from a strict load_state_dict, for a parameter that is missing, of another shape,
    or not part of the encoder. After an error, the encoder can be partly overwritten.

    Some differences go undetected, because no name or shape reveals them: the number of heads; the
    kind of GELU (exact here); where the norms are (pre-norm here) and their epsilon (1e-6 here); a
    grid that was not square but whose positions, with or without those of prefix tokens, form a
    square; and how images must be normalized.
    """
    config = encoder.config
    prefix_tokens = 0
    parameters = {}
    for name, tensor in state_dict.items():
        if name in ("cls_token", "dist_token", "reg_token"):
            prefix_tokens += tensor.shape[1]
        elif name.split(".")[0] not in ("norm", "fc_norm", "head", "head_dist", "attn_pool"):
            parameters[name] = tensor

    kernel = parameters.get("patch_embed.proj.weight")
    kernel_shape = (config.in_channels, config.patch_size, config.patch_size)
    if kernel is not None and kernel.shape[1:] == kernel_shape:
        parameters["patch_embed.proj.weight"] = kernel.flatten(1)
    pos_embed = parameters.get("pos_embed")
    if pos_embed is not None and pos_embed.ndim == 3:
        pos_embed = unflatten_positions(pos_embed, prefix_tokens)
        parameters["pos_embed"] = resize_pos_embed(pos_embed, config.grid)
    encoder.load_state_dict(parameters)


def unflatten_positions(pos_embed: Tensor, prefix_tokens: int) -> Tensor:
    """(1, tokens, K) -> (1, side, side, K), without the positions of the prefix tokens.

    Some ViTs have no positions for these tokens, so up to prefix_tokens are dropped.
    """
    tokens = pos_embed.shape[1]
    sides = []  # all that fit: a small grid with many prefix tokens can be ambiguous
    for side in range(1, math.isqrt(tokens) + 1):
        if tokens - side**2 <= prefix_tokens:
            sides.append(side)
    if len(sides) != 1:
        rule = f"pos_embed must be one square grid after at most {prefix_tokens} prefix tokens"
        raise ValueError(f"{rule}, got {tokens} positions")
    side = sides[0]
    grid_positions = pos_embed[:, tokens - side**2 :]
    return grid_positions.unflatten(1, (side, side))


# Demo: python UNETR-2D.py

SAMPLE = Path(__file__).resolve().parent / "sample.png"
SEED = 0


def load_image(path: str | Path, config: UNETRConfig) -> Tensor:
    """Read an image file, resized to the configured size: (1, C, H, W) float32 in [0, 1].

    Pillow decodes the first frame, and its EXIF orientation is applied. Grayscale images with more
    than 8 bits per pixel and no alpha keep their precision and are min-max scaled, since a 12-bit
    X-ray in a 16-bit file would be almost black otherwise. All others are reduced to 8 bits per
    channel, and transparent images are composited over black. The aspect ratio is not preserved.

    Raises ValueError if C is neither 1 nor 3, if the file is not a readable image, or if a pixel
    is not finite; OSError if the file cannot be opened.
    """
    C = config.in_channels
    if C not in (1, 3):
        raise ValueError(f"in_channels must be 1 (grayscale) or 3 (RGB) for an image file, got {C}")

    # Given a path, Pillow memory-maps an uncompressed TIFF, and scrambles it when rotating it.
    with open(path, "rb") as file:
        try:
            image = ImageOps.exif_transpose(Image.open(file))  # reads all pixels
        except Exception as error:  # not only OSError: a damaged PNG raises SyntaxError
            raise ValueError(f"{path} is not a readable image: {error}") from error

    if image.mode.startswith(("I", "F")):  # grayscale of more than 8 bits
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"{path} must have finite pixels, got NaN or infinity")
        values = (values - values.min()) / (np.ptp(values) or 1)  # 0 if all pixels are equal
        image = Image.fromarray((255 * values).astype(np.float32))
    else:
        if image.has_transparency_data:  # or colors under transparent pixels would show
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        image = image.convert("L" if C == 1 else "RGB")

    image = image.resize(config.size[::-1], Image.Resampling.BILINEAR)  # (width, height)
    pixels = np.atleast_3d(np.asarray(image, dtype=np.float32))  # (H, W, 1 or C)
    tensor = torch.from_numpy(pixels / 255).permute(2, 0, 1)
    return tensor.expand(1, C, *config.size).contiguous()  # repeats a single channel


def draw(image: Tensor, logits: Tensor, patch_size: int, title: str) -> plt.Figure:
    """Plot an image (1, C, H, W), C = 1 or 3, beside its logits (1, out_channels, H, W).

    The logits are shown as probabilities if out_channels is 1, otherwise as the likeliest classes.
    """
    height, width = image.shape[2:]
    P, classes = patch_size, logits.shape[1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    # "upper", since a matplotlibrc may say otherwise; "nearest", since classes cannot be blended
    options = dict(extent=(0, width, height, 0), origin="upper", interpolation="nearest")

    left.imshow(image[0].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1, **options)
    lines = dict(color="deepskyblue", linewidth=0.4, clip_on=False)
    left.vlines(range(0, width + 1, P), 0, height, **lines)
    left.hlines(range(0, height + 1, P), 0, width, **lines)
    left.set_title(f"Input: {height // P} x {width // P} patches of {P} x {P} pixels")
    left.set_axis_off()

    if classes == 1:
        output = right.imshow(logits[0, 0].sigmoid().numpy(), vmin=0, vmax=1, **options)
        figure.colorbar(output, label="probability")
    else:
        colors = plt.get_cmap("turbo", classes)
        limits = dict(vmin=-0.5, vmax=classes - 0.5)
        output = right.imshow(logits[0].argmax(0).numpy(), cmap=colors, **limits, **options)
        step = math.ceil(classes / 20)  # at most 20 ticks
        figure.colorbar(output, label="class", ticks=range(0, classes, step))
    right.set_title(title)
    right.set_axis_off()
    return figure


def run_and_print(model: UNETR, image: Tensor) -> Tensor:
    """Run the network, print the shapes of its blocks as they finish, and return the logits.

    Of the Transformer layers, only those that feed the decoder are printed; blocks.2 is layer 3.
    The input of merge1 is the concatenation of the outputs of up and skip.
    """

    def print_row(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        blocks = module if type(module) is nn.Sequential else [module]
        names = " ".join(type(block).__name__ for block in blocks)
        print(f"{name:<19} {tuple(args[0].shape)!s:<20} {tuple(output.shape)!s:<20} {names}")

    print(f"{'module':<19} {'input':<20} {'output':<20} class")
    modules = ["encoder.patch_embed"]
    modules += [f"encoder.blocks.{layer - 1}" for layer in model.config.tapped_layers]
    for i in range(len(model.decoder)):
        modules += [f"decoder.{i}.{part}" for part in ("up", "skip", "merge1", "merge2")]
    modules.append("head")
    hooks = []
    for name in modules:
        hooks.append(model.get_submodule(name).register_forward_hook(partial(print_row, name)))
    with torch.inference_mode():
        logits = model(image)
    for hook in hooks:
        hook.remove()
    return logits


def main(argv: list[str] | None = None) -> None:
    """Run the command. A likely mistake ends in SystemExit(2), after usage and one sentence."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [image] [options]",
        description="Plot an image beside the output of a 2D UNETR.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if accelerator is None else [accelerator.type, "cpu"]
    parser.add_argument("image", type=Path, nargs="?", default=SAMPLE, help="image file")
    parser.add_argument("--output", type=Path, default="unetr-2d.png", help="figure file")
    parser.add_argument("--weights", type=Path, help="checkpoint trained on images from load_image")
    parser.add_argument("--device", choices=devices, default=devices[0], help="where to run")
    parser.add_argument("--no-show", action="store_true", help="do not open a window")

    # The options below are attributes of args only if they are given.
    network = parser.add_argument_group("untrained network", "not allowed with --weights")
    add = partial(network.add_argument, type=int, default=argparse.SUPPRESS)
    default = UNETRConfig()
    add("--seed", help=f"random seed for the weights (default: {SEED})")
    add("--image-size", nargs=2, metavar=("H", "W"), help=f"in pixels (default: {default.size})")
    add("--patch-size", help=f"P in pixels, a power of two (default: {default.patch_size})")
    add("--in-channels", help=f"C: 1 for grayscale, 3 for RGB (default: {default.in_channels})")
    add("--out-channels", help=f"1, or one per class (default: {default.out_channels})")
    add("--hidden-dim", help=f"K, the embedding dimension (default: {default.hidden_dim})")
    add("--num-layers", help=f"Transformer layers (default: {default.num_layers})")
    add("--num-heads", help=f"attention heads per layer (default: {default.num_heads})")
    add("--mlp-dim", help=f"hidden units of each MLP (default: {default.mlp_dim})")
    add("--feature-size", help=f"channels at full resolution (default: {default.feature_size})")

    args = parser.parse_args(argv)
    extensions = FigureCanvasBase.get_supported_filetypes()  # without the dot
    if args.output.suffix.lower().lstrip(".") not in extensions:
        parser.error(f"--output must end in .{', .'.join(extensions)}, got {args.output}")
    if not args.output.parent.is_dir():
        parser.error(f"--output must be in an existing folder, got {args.output}")
    untrained = {name: getattr(args, name) for name in ("seed", *asdict(default)) if name in args}
    if args.weights and untrained:
        parser.error(f"not allowed with --weights: {', '.join(untrained)}")

    # Only these exceptions are caught, so that a bug in the network ends in its traceback.
    if args.weights:
        weights, title = args.weights, "Output"
        try:
            model = load_checkpoint(args.weights)
        except (CheckpointError, OSError) as error:
            parser.error(str(error))
    else:
        seed = untrained.pop("seed", SEED)
        weights, title = f"untrained, seed {seed}", "Output of an untrained network: meaningless"
        try:
            config = UNETRConfig(**untrained)
        except ValueError as error:
            parser.error(str(error))
        torch.manual_seed(seed)
        model = UNETR(config)
    try:
        image = load_image(args.image, model.config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for path in (args.image, args.weights):
        if path and args.output.exists() and args.output.samefile(path):
            parser.error(f"--output must not be an input file, got {args.output}")

    model.to(args.device).eval()
    print(model.config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}")
    print(f"weights: {weights}")
    print(f"image: {args.image}, resized to {model.config.size} pixels\n")
    logits = run_and_print(model, image.to(args.device)).cpu()

    figure = draw(image, logits, model.config.patch_size, title)
    figure.savefig(args.output)
    print(f"\nfigure: {args.output.resolve()}")
    if not args.no_show:
        plt.show()


if __name__ == "__main__":
    main()
