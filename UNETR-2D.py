"""UNETR in 2D: image segmentation with a Vision Transformer as the encoder and a U-Net-style CNN as the decoder.

Run as a command, it plots an image beside the output of the network; --help lists the options.

[1] Hatamizadeh et al., "UNETR", https://arxiv.org/abs/2103.10504: source of all equations and figures cited here.
[2] Dosovitskiy et al., "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929: ViT.
[3] He et al., "Delving Deep into Rectifiers", https://arxiv.org/abs/1502.01852: He initialization.

Shapes: batch size B, image channels C, image size H x W in pixels, patch size P, number of tokens N = (H/P)(W/P),
hidden size K (the embedding dimension), feature map size h x w.
"""

import argparse
import gc
import math
import os
import re
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn


class InputError(ValueError):
    """A value, shape, or file that the user has to correct. The command reports it in one sentence."""


@dataclass(frozen=True)
class UNETRConfig:
    """Hyperparameters; the encoder is ViT-B/16 by default, as in the paper. Raises InputError for an invalid value."""

    image_size: int | tuple[int, int] = 256  # H (and W = H), or (H, W), in pixels
    patch_size: int = 16  # P, in pixels
    in_channels: int = 3  # C
    out_channels: int = 1  # channels of the logits: 1 for a binary mask, otherwise one per class
    hidden_dim: int = 768  # K
    num_layers: int = 12  # L
    num_heads: int = 12  # attention heads per layer, of dimension K / num_heads
    mlp_dim: int = 3072  # hidden units of the MLP in each layer
    dropout_rate: float = 0.0  # on embeddings, attention outputs, MLP hidden units and MLP outputs; encoder only
    feature_size: int = 64  # F, the decoder's channels at full resolution; they double at each coarser resolution

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "hidden_dim", "num_layers", "num_heads", "mlp_dim", "feature_size"):
            if not 1 <= getattr(self, name) <= 1_000_000:
                raise InputError(f"{name} must be from 1 to 1000000, got {getattr(self, name)}")
        patch, stages = self.patch_size, len(self.tapped_layers)
        if patch < 2 or patch.bit_count() != 1:
            raise InputError(f"patch_size must be a power of two, at least 2, got {patch}")
        if len(self.size) != 2 or any(side < 1 or side % patch for side in self.size):
            raise InputError(f"image_size must be H or (H, W), multiples of patch_size {patch}, got {self.image_size}")
        if self.hidden_dim % self.num_heads:
            raise InputError(f"hidden_dim must be a multiple of num_heads {self.num_heads}, got {self.hidden_dim}")
        if self.num_layers < stages:
            raise InputError(f"num_layers must be at least {stages} for patch_size {patch}, got {self.num_layers}")
        if not 0 <= self.dropout_rate < 1:
            raise InputError(f"dropout_rate must be at least 0 and less than 1, got {self.dropout_rate}")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W), in pixels."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(H/P, W/P), in patches."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """The layers, counted from 1, whose outputs feed the decoder: 3, 6, 9, 12 by default, as in Figure 2."""
        stages = self.patch_size.bit_length() - 1  # log2(P): each stage of the decoder doubles the resolution
        return tuple(round(self.num_layers * i / stages) for i in range(1, stages + 1))


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C*P*P): patches in row-major order, each flattened as (channel, row, column)."""
    patches = image.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, H/P, P, W/P, P)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C*P*P)


class PatchEmbed(nn.Module):
    """Linear projection of the patches, E in eq. 1, like a P x P convolution of stride P: (B, C, H, W) -> (B, N, K)."""

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Linear(config.in_channels * config.patch_size**2, config.hidden_dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(patchify(image, self.patch_size))


class Attention(nn.Module):
    """Multi-head self-attention, MSA in eq. 2: exchanges information between tokens. (B, N, K) -> (B, N, K)."""

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_dim, 3 * config.hidden_dim)
        self.proj = nn.Linear(config.hidden_dim, config.hidden_dim)  # W_msa in eq. 6

    def forward(self, z: Tensor) -> Tensor:
        qkv = self.qkv(z).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, heads, K/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, K/heads)
        # softmax(q k^T / sqrt(K/heads)) v, eqs. 4 and 5, no dropout. The fused kernels do not store the N x N matrix.
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(z.transpose(1, 2).flatten(2))  # heads concatenated: (B, N, K), eq. 6


class MLP(nn.Module):
    """The MLP in eq. 3: transforms each token separately. (B, N, K) -> (B, N, K)."""

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_dim, config.mlp_dim)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.fc2 = nn.Linear(config.mlp_dim, config.hidden_dim)

    def forward(self, z: Tensor) -> Tensor:
        return self.fc2(self.dropout(nn.functional.gelu(self.fc1(z))))


class TransformerBlock(nn.Module):
    """One Transformer layer, pre-norm, with two residual connections: (B, N, K) -> (B, N, K)."""

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_dim, eps=1e-6)  # ViT's epsilon
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_dim, eps=1e-6)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.dropout(self.attn(self.norm1(z)))  # eq. 2
        return z + self.dropout(self.mlp(self.norm2(z)))  # eq. 3


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize a position embedding to another grid (bicubic, no antialiasing): (1, N, K) -> (1, new N, K)."""
    if grid == new_grid:
        return pos_embed
    pos_embed = pos_embed.transpose(1, 2).unflatten(2, grid)  # (1, K, rows, columns)
    return nn.functional.interpolate(pos_embed, size=new_grid, mode="bicubic").flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Vision Transformer [2] with no class token: (B, C, H, W) -> outputs of the tapped layers, each (B, K, H/P, W/P).

    H and W may be any multiples of P: the position embedding is resized to them. Raises InputError for other shapes.
    The state_dict of a plain timm ViT loads with strict=False; its class token, final norm, and head are left over.
    """

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(config.grid), config.hidden_dim))  # E_pos, eq. 1
        self.dropout = nn.Dropout(config.dropout_rate)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.register_load_state_dict_pre_hook(ViT.adapt_checkpoint)

    def forward(self, image: Tensor) -> list[Tensor]:
        channels, patch, shape = self.config.in_channels, self.config.patch_size, tuple(image.shape)
        if image.ndim != 4 or shape[1] != channels or any(side < 1 or side % patch for side in shape[2:]):
            raise InputError(f"image must be (B, {channels}, H, W) with H and W multiples of {patch}, got {shape}")
        grid = (shape[2] // patch, shape[3] // patch)
        z = self.patch_embed(image) + resize_pos_embed(self.pos_embed, self.config.grid, grid)  # z0 in eq. 1
        z = self.dropout(z)  # (B, N, K)
        feature_maps = []
        for layer, block in enumerate(self.blocks, start=1):
            z = block(z)
            if layer in self.config.tapped_layers:
                feature_maps.append(z.transpose(1, 2).unflatten(2, grid))  # (B, K, H/P, W/P)
        return feature_maps  # no final norm: the decoder gets the residual stream as it is

    def adapt_checkpoint(self, state_dict: dict, prefix: str, *_: object) -> None:
        """On loading: flatten a patch kernel, drop the class position, resize a square grid unless it has N tokens."""
        kernel, positions = f"{prefix}patch_embed.proj.weight", f"{prefix}pos_embed"
        channels, patch = self.config.in_channels, self.config.patch_size
        if kernel in state_dict and state_dict[kernel].shape[1:] == (channels, patch, patch):
            state_dict[kernel] = state_dict[kernel].flatten(1)
        if positions in state_dict:
            pos_embed, tokens = state_dict[positions], math.prod(self.config.grid)
            if f"{prefix}cls_token" in state_dict:
                pos_embed = pos_embed[:, 1:]
            count, side = pos_embed.shape[1], math.isqrt(pos_embed.shape[1])
            if count not in (tokens, side**2):
                raise InputError(f"pos_embed must have {tokens} or a square number of positions, got {count}")
            grid = self.config.grid if count == tokens else (side, side)
            state_dict[positions] = resize_pos_embed(pos_embed, grid, self.config.grid)


class OrangeBlock(nn.Sequential):
    """Orange in Figure 2 (conv 3x3, batch norm, ReLU): (B, in_channels, h, w) -> (B, out_channels, h, w)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)  # batch norm has a bias
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class GreenBlock(nn.ConvTranspose2d):
    """Green in Figure 2 (transposed conv 2x2, stride 2): (B, in_channels, h, w) -> (B, out_channels, 2h, 2w)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)


class BlueBlock(nn.Sequential):
    """Blue in Figure 2 (green, then orange): (B, in_channels, h, w) -> (B, out_channels, 2h, 2w)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(GreenBlock(in_channels, out_channels), OrangeBlock(out_channels, out_channels))


class GreyBlock(nn.Conv2d):
    """Grey in Figure 2 (conv 1x1): (B, in_channels, h, w) -> (B, out_channels, h, w)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)


class DecoderStage(nn.Module):
    """Upsample x, concatenate the skip connection, merge: (B, in_channels, h, w) -> (B, out_channels, 2h, 2w)."""

    def __init__(self, in_channels: int, out_channels: int, skip: nn.Module) -> None:
        super().__init__()
        self.up = GreenBlock(in_channels, out_channels)
        self.skip = skip  # -> (B, out_channels, 2h, 2w)
        self.merge1 = OrangeBlock(2 * out_channels, out_channels)
        self.merge2 = OrangeBlock(out_channels, out_channels)

    def forward(self, x: Tensor, skip_input: Tensor) -> Tensor:
        x = torch.cat([self.up(x), self.skip(skip_input)], dim=1)  # (B, 2*out_channels, 2h, 2w)
        x = self.merge1(x)  # rebinding x releases the concatenation, unless it is kept for gradients
        return self.merge2(x)


class UNETR(nn.Module):
    """Images (B, C, H, W) -> logits (B, out_channels, H, W): apply sigmoid if out_channels is 1, otherwise softmax.

    Figure 2 in 2D at the default sizes, with the output channels of each block. z3, z6, z9, z12 are the outputs of
    Transformer layers 3, 6, 9, 12 as feature maps, 768 channels at 1/16 resolution; x is the output of the row above.

                      up               skip                                  merge1, merge2
    decoder[0]  1/8   z12 ─ green 512  z9 ─ blue 512                         concat 1024 ─ orange 512 ─ orange 512
    decoder[1]  1/4   x ─── green 256  z6 ─ blue 256 ─ blue 256              concat 512 ── orange 256 ─ orange 256
    decoder[2]  1/2   x ─── green 128  z3 ─ blue 128 ─ blue 128 ─ blue 128   concat 256 ── orange 128 ─ orange 128
    decoder[3]  1/1   x ─── green 64   image ─ orange 64 ─ orange 64         concat 128 ── orange 64 ── orange 64
    head        1/1   x ─── grey 1 ─── logits
    """

    def __init__(self, config: UNETRConfig = UNETRConfig()) -> None:
        super().__init__()
        self.config = config
        self.encoder = ViT(config)
        self.decoder = nn.ModuleList()  # the deepest stage first
        stages, channels = len(config.tapped_layers), config.hidden_dim
        for i in range(1, stages + 1):
            width = config.feature_size * 2 ** (stages - i)
            if i < stages:  # i blue blocks bring a feature map from 1/P to 2^i/P of the resolution
                blues = [BlueBlock(width, width) for _ in range(i - 1)]
                skip = nn.Sequential(BlueBlock(config.hidden_dim, width), *blues)
            else:  # the image has full resolution
                skip = nn.Sequential(OrangeBlock(config.in_channels, width), OrangeBlock(width, width))
            self.decoder.append(DecoderStage(channels, width, skip))
            channels = width
        self.head = GreyBlock(channels, config.out_channels)
        if not self.head.weight.is_meta:  # on the meta device, weights have no values yet
            initialize(self)

    def forward(self, image: Tensor) -> Tensor:
        *skips, x = [image, *self.encoder(image)]  # skips: image, z3, z6, z9; x: z12
        for stage in self.decoder:
            x = stage(x, skips.pop())
        return self.head(x)


def initialize(model: UNETR) -> None:
    """Initialize a UNETR: Gaussian weights with the std below, norm weights one, all biases zero.

    Without training, the logits of sample.png have a std of 0.5 to 0.9 in eval mode, depending on the seed. With
    PyTorch's defaults it is about 0.004, and the encoder hardly matters.
    """
    nn.init.normal_(model.encoder.pos_embed, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # He [3]: std sqrt(2 / fan-in)
        elif isinstance(module, nn.ConvTranspose2d):  # each output pixel sums one tap per input channel
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_channels))
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            module.reset_parameters()  # weight one, running mean zero, running variance one
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


# Demo

SAMPLE = Path(__file__).resolve().parent / "sample.png"
EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".pdf", ".svg", ".svgz", ".eps", ".ps")
COLORS = {"orange": 208, "green": 71, "blue": 68, "grey": 246}  # the colors of Figure 2 in a terminal


def load_image(path: str | Path, config: UNETRConfig) -> Tensor:
    """Read the first frame of an image file, rotated per its EXIF data, and resized: (1, C, H, W), in [0, 1].

    Transparency is composited over black. Grayscale of more than 8 bits is min-max scaled: a 12-bit X-ray in a 16-bit
    file would be almost black otherwise. Raises InputError if C is neither 1 nor 3, if the file is not a readable
    image, or if the file or the configured size exceeds Pillow's pixel limit.
    """
    (height, width), channels, limit = config.size, config.in_channels, Image.MAX_IMAGE_PIXELS or math.inf
    if channels not in (1, 3):
        raise InputError(f"in_channels must be 1 (grayscale) or 3 (RGB) for an image file, got {channels}")
    if height * width > limit:
        raise InputError(f"image_size must be within Pillow's limit of {limit} pixels, got {height} x {width}")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():  # Image.open(path) scrambles some rotated TIFFs
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file)
            image.load()
            with suppress(Exception):  # with damaged EXIF data, keep the image as stored
                image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # integers of 16 or 32 bits, floats
            values = np.asarray(image, dtype=np.float64)
            finite = values[np.isfinite(values)]
            if not finite.size:
                raise InputError("no pixel is finite")
            low, high = finite.min(), finite.max()
            values = np.nan_to_num(values, nan=low).clip(low, high) - low
            image = Image.fromarray((values / ((high - low) or 1)).astype(np.float32))
        else:
            image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")  # La converts to LA only
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            image = image.convert("L" if channels == 1 else "RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path} is refused: it has more pixels than Pillow's limit of {limit}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} must be an image file in a format that Pillow reads") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise InputError(f"cannot read {path} as an image: {getattr(error, 'strerror', None) or error}") from error
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    pixels = np.atleast_3d(pixels / (1 if image.mode == "F" else 255))  # (H, W, 1 or C)
    return torch.from_numpy(pixels).permute(2, 0, 1).expand(1, channels, height, width).contiguous()


def draw(image: Tensor, logits: Tensor, config: UNETRConfig, trained: bool) -> plt.Figure:
    """Plot an image (1, C, H, W) under its patch grid, beside the probability or class map of its logits."""
    (height, width), (rows, columns), patch, classes = config.size, config.grid, config.patch_size, config.out_channels
    figsize = (10, np.clip(4.4 * height / width, 2, 12) + 0.4)
    figure, (left, right) = plt.subplots(1, 2, figsize=figsize, layout="constrained", subplot_kw={"frame_on": False})
    options = {"extent": (0, width, height, 0), "origin": "upper", "interpolation": "nearest"}
    left.imshow(image[0].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1, **options)
    left.vlines(range(0, width + 1, patch), 0, height, color="deepskyblue", linewidth=0.4)
    left.hlines(range(0, height + 1, patch), 0, width, color="deepskyblue", linewidth=0.4)
    if classes == 1:
        shown = right.imshow(logits[0, 0].sigmoid().numpy(), vmin=0, vmax=1, **options)
        figure.colorbar(shown, label="probability")
    else:
        options |= {"cmap": plt.get_cmap("turbo", classes), "vmin": -0.5, "vmax": classes - 0.5}
        shown = right.imshow(logits[0].argmax(0).numpy(), **options)
        figure.colorbar(shown, label="class", ticks=range(0, classes, math.ceil(classes / 20)))
    left.set(title=f"Input: {rows} x {columns} patches of {patch} x {patch} pixels", xticks=[], yticks=[])
    right.set(title="Output" if trained else "Output of an untrained network: meaningless", xticks=[], yticks=[])
    return figure


def save(figure: plt.Figure, path: Path) -> None:
    """Write the figure as a whole or not at all, with the permissions of the file that it replaces."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            complete = Path(folder, path.name)
            figure.savefig(complete)
            if path.exists():
                complete.chmod(path.stat().st_mode)
            complete.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def print_stage(name: str, blocks: str, module: nn.Module, args: tuple, output: Tensor) -> None:
    """A forward hook: print the name of a module, the shapes of its input and output, and its blocks."""
    print(f"{name:<19} {tuple(args[0].shape)!s:<19} {tuple(output.shape)!s:<19} {blocks}", flush=True)


def print_stages(model: UNETR, color: bool) -> None:
    """Print a header, and register forward hooks that print each stage as it finishes."""
    print("orange: conv 3x3, batch norm, ReLU; green: transposed conv 2x2; blue: green, orange; grey: conv 1x1")
    print(f"{'module':<19} {'input':<19} {'output':<19} blocks")
    stages = {"encoder.patch_embed": "linear", "head": "grey"}
    stages |= {f"encoder.blocks.{n - 1}": f"Transformer layer {n}" for n in model.config.tapped_layers}
    for i, stage in enumerate(model.decoder):
        skip = " ".join(type(block).__name__.removesuffix("Block").lower() for block in stage.skip)
        stages |= {f"decoder.{i}.skip": skip, f"decoder.{i}": "green orange orange"}
    for name, blocks in stages.items():
        if color:
            for word, number in COLORS.items():
                blocks = blocks.replace(word, f"\033[30;48;5;{number}m {word} \033[0m")
        model.get_submodule(name).register_forward_hook(partial(print_stage, name, blocks))


def load_weights(model: UNETR, path: Path) -> None:
    """Load a state_dict saved with torch.save. Any other pickle is refused, never executed."""
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        reason = getattr(error, "strerror", None) or "it is not a state_dict saved with torch.save"
        raise InputError(f"cannot load the weights {path}: {reason}") from error
    try:
        model.load_state_dict(state_dict, assign=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        differences = " ".join(line.strip()[:180] for line in str(error).splitlines()[:4])
        raise InputError(f"{path} does not match this configuration: {differences}") from error


def parse_size(text: str) -> int | tuple[int, int]:
    """'256' -> 256, '192x256' -> (192, 256)."""
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be SIDE or HEIGHTxWIDTH in pixels, got {text!r}")
    height, _, width = text.partition("x")
    return (int(height), int(width)) if width else int(height)


def run(args: argparse.Namespace) -> None:
    """Run the network on an image, print its stages, and save and show the figure."""
    config = UNETRConfig(**{field.name: getattr(args, field.name) for field in fields(UNETRConfig)})
    if not 0 <= args.seed < 2**63:
        raise InputError(f"seed must be from 0 to 2**63 - 1, got {args.seed}")
    output = args.output.resolve()
    if output.suffix.lower() not in EXTENSIONS:
        raise InputError(f"the output extension must be one of {', '.join(EXTENSIONS)}, got {output.name!r}")
    if output in [path.resolve() for path in (args.image, args.weights) if path]:
        raise InputError(f"the output must not replace an input, got {output} for both")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"cannot write {output}: its folder does not exist or is not writable")
    image = load_image(args.image, config)
    with torch.device("meta"):  # shapes only, so that weights are drawn once, or not at all if loaded
        model = UNETR(config)
    if args.weights:
        load_weights(model, args.weights)
    else:
        empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
        model.load_state_dict(empty, assign=True)  # to_empty() would spend half a second on imports
        torch.manual_seed(args.seed)
        initialize(model)
    model.eval().to(args.device, torch.float32)
    print(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}")
    print(f"weights: {args.weights or f'untrained, seed {args.seed}'}")
    print(f"image: {args.image}, resized to {config.size[0]} x {config.size[1]} pixels\n")
    print_stages(model, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    start = time.perf_counter()
    with torch.inference_mode():
        logits = model(image.to(args.device)).cpu()
    print(f"\nforward pass: {time.perf_counter() - start:.2f} s")
    save(draw(image, logits, config, trained=args.weights is not None), output)
    print(f"figure: {output}")
    if not args.no_show:
        plt.show()


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 after printing the usage and one sentence to standard error."""
    devices = ["cpu"]
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        numbered = [f"{accelerator}:{i}" for i in range(torch.accelerator.device_count())]
        devices = [str(accelerator), *numbered, "cpu"]
    usage, formatter = "%(prog)s [image] [options]", argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("UNETR-2D.py", usage, __doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("image", type=Path, nargs="?", default=SAMPLE, help="image file")
    parser.add_argument("--output", type=Path, default="unetr-2d.png", help="figure file: PNG, PDF, SVG, ...")
    parser.add_argument("--weights", type=Path, help="state_dict to load; without it, the network is untrained")
    parser.add_argument("--device", choices=devices, default=devices[0], help="where to run")
    parser.add_argument("--seed", type=int, default=0, help="random seed for the weights")
    parser.add_argument("--no-show", action="store_true", help="open no window, even if a display is available")
    network = parser.add_argument_group("network")
    network.add_argument("--image-size", type=parse_size, default=256, help="H and W in pixels: 256 or 192x256")
    network.add_argument("--patch-size", type=int, default=16, help="P in pixels, a power of two")
    network.add_argument("--in-channels", type=int, default=3, help="C: 1 for grayscale, 3 for RGB")
    network.add_argument("--out-channels", type=int, default=1, help="1 for a binary mask, otherwise one per class")
    network.add_argument("--hidden-dim", type=int, default=768, help="K, the hidden size")
    network.add_argument("--num-layers", type=int, default=12, help="L, Transformer layers")
    network.add_argument("--num-heads", type=int, default=12, help="attention heads per layer")
    network.add_argument("--mlp-dim", type=int, default=3072, help="hidden units of each MLP")
    network.add_argument("--dropout-rate", type=float, default=0.0, help="no effect: the command runs in eval mode")
    network.add_argument("--feature-size", type=int, default=64, help="F, the decoder's channels at full resolution")
    try:
        run(parser.parse_args(argv))
        return 0
    except SystemExit as done:  # --help, or an error that argparse has reported
        return int(done.code or 0)
    except InputError as error:
        sentence = " ".join(str(error).split())
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        sentence = "the network and its image need more memory than is available"
    parser.print_usage(sys.stderr)
    print(f"{parser.prog}: error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for file names that it cannot encode
    gc.freeze()  # skips the garbage collection of imported modules at exit
    sys.exit(main())
