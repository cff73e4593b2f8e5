"""UNETR in two dimensions: a Vision Transformer reads the image, a U-Net-like CNN writes the mask.

The whole model is in this file, which is read from top to bottom.

[1] Hatamizadeh et al., "UNETR: Transformers for 3D Medical Image Segmentation", https://arxiv.org/abs/2103.10504
    Every "eq." and "Figure" below is one of this paper.
[2] Dosovitskiy et al., "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929: ViT, the encoder.
[3] He et al., "Delving Deep into Rectifiers", https://arxiv.org/abs/1502.01852: how the convolutions start.

In shapes, B counts images, C channels, H rows and W columns of pixels; P is the patch size,
N = (H/P)(W/P) the number of tokens, K the hidden size and F the feature size.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # all that is imported stays: to search it for garbage is time lost

import argparse
import math
import os
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn, get_type_hints

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn

# Configuration


def nearest_multiples(value: int, step: int) -> str:
    """The multiples of step around value, in words: 250, 16 -> '240 or 256'."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)


@dataclass(frozen=True)
class UNETRConfig:
    """The sizes of the network; the defaults are the ViT-B/16 encoder of [1], for RGB images of 256 x 256.

    Raises ValueError for what cannot work, with the rule, the value and one that would do.
    """

    image_size: Annotated[int | tuple[int, int], "H and W in pixels, multiples of P: 256 or 192x256"] = 256
    patch_size: Annotated[int, "P, the side of a patch in pixels, a power of two"] = 16
    in_channels: Annotated[int, "C, the channels of the image: 1 reads grey, 3 reads RGB"] = 3
    out_channels: Annotated[int, "channels of the logits: 1 for a mask, else one for each class"] = 1
    hidden_dim: Annotated[int, "K, the length of a token"] = 768
    num_layers: Annotated[int, "L, the layers of the Transformer"] = 12
    num_heads: Annotated[int, "attention heads of a layer, which share K"] = 12
    mlp_dim: Annotated[int, "hidden units of a layer's MLP"] = 3072
    dropout_rate: Annotated[float, "dropout in training, where ViT has it"] = 0.0
    feature_size: Annotated[int, "F, the decoder's channels at full resolution"] = 64

    def __post_init__(self) -> None:
        def require(fits: bool, name: str, rule: str, would_do: object) -> None:
            if not fits:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}; {would_do} would do")

        for name, value in vars(self).items():
            pair = name == "image_size" and isinstance(value, tuple) and len(value) == 2
            if name != "dropout_rate":
                whole = all(isinstance(v, int) and 0 < v <= 1_000_000 for v in (value if pair else (value,)))
                require(whole, name, "a whole number from 1 to 1000000", getattr(UNETRConfig, name))
        patch, heads, stages, (height, width) = self.patch_size, self.num_heads, len(self.tapped_layers), self.size
        near = str(2 ** max(round(math.log2(patch)), 1))
        require(patch == 2 ** max(stages, 1), "patch_size", "a power of two from 2 up", near)
        near = f"height {nearest_multiples(height, patch)} and width {nearest_multiples(width, patch)}"
        rule = f"a multiple of patch_size {patch} on both sides"
        require(height % patch == width % patch == 0, "image_size", rule, near)
        near = nearest_multiples(self.hidden_dim, heads)
        require(self.hidden_dim % heads == 0, "hidden_dim", f"a multiple of num_heads {heads}", near)
        rule = f"{stages} or more for the {stages} decoder stages of patch_size {patch}"
        require(self.num_layers >= stages, "num_layers", rule, stages)
        is_number = isinstance(self.dropout_rate, int | float)
        require(
            is_number and 0 <= self.dropout_rate < 1, "dropout_rate", "a number from 0 up to, not including, 1", 0.1
        )

    @property
    def size(self) -> tuple[int, int]:
        """(H, W), in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(H/P, W/P), in patches."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """The layers, counted from 1, whose outputs go to the decoder: 3, 6, 9, 12 as in Figure 2, by default.

        P = 2^n is n halvings, hence n decoder stages, which tap n layers spread evenly over the depth.
        """
        stages = self.patch_size.bit_length() - 1
        return tuple(round(self.num_layers * i / stages) for i in range(1, stages + 1))


# The coloured blocks of Figure 2


def start_he_normal(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Weights normal with std = sqrt(2 / fan-in) [3], biases zero; PyTorch's own start is smaller and uniform."""
    nn.init.kaiming_normal_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class Conv2d(nn.Conv2d):
    def reset_parameters(self) -> None:  # nn.Conv2d calls this once, so that the weights are drawn once
        start_he_normal(self)


class OrangeBlock(nn.Sequential):
    """Orange in Figure 2, conv 3x3, batch norm, ReLU: (B, in_channels, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),  # the norm has a bias
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class GreenBlock(nn.ConvTranspose2d):
    """Green in Figure 2, transposed conv 2x2, stride 2: (B, in_channels, H, W) -> (B, out_channels, 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)

    def reset_parameters(self) -> None:
        start_he_normal(self)  # PyTorch's fan-in here is 4 out_channels


class BlueBlock(nn.Sequential):
    """Blue in Figure 2, green then orange: (B, in_channels, H, W) -> (B, out_channels, 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(GreenBlock(in_channels, out_channels), OrangeBlock(out_channels, out_channels))


class GreyBlock(Conv2d):
    """Grey in Figure 2, conv 1x1: (B, in_channels, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)


# Patches and Transformer


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C*P*P): the patches in row-major order, each as channel, row, column (x_v of eq. 1).

    Raises ValueError where the image has other than four dimensions, or P does not divide H and W.
    """
    if image.ndim != 4 or any(side < 1 or side % patch_size for side in image.shape[2:]):
        raise ValueError(
            f"the image must have shape (B, C, H, W) with H and W multiples of {patch_size}, got {tuple(image.shape)}"
        )
    (batch, channels, height, width), size = image.shape, patch_size
    patches = image.reshape(batch, channels, height // size, size, width // size, size)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C*P*P)


def resize_positions(pos_embed: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """(1, rows*columns, K) -> (1, new rows*columns, K): a table of positions resized bicubically, as in [2], 3.2."""
    if grid == new_grid:
        return pos_embed
    table = torch.unflatten(pos_embed.transpose(1, 2), 2, grid)  # (1, K, rows, columns)
    return F.interpolate(table, size=new_grid, mode="bicubic").flatten(2).transpose(1, 2)


class Linear(nn.Linear):
    """nn.Linear that starts as a ViT's does, normal of std 0.02, rather than PyTorch's uniform."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Multi-head self-attention, the MSA of eq. 2: (B, N, K) -> (B, N, K)."""

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_dim, 3 * config.hidden_dim)
        self.proj = Linear(config.hidden_dim, config.hidden_dim)

    def forward(self, z: Tensor) -> Tensor:
        q, k, v = self.qkv(z).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, K/heads)
        z = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(K/heads)) v, eq. 4; no N x N matrix stored
        mixed: Tensor = self.proj(z.transpose(1, 2).flatten(2))  # (B, N, K)
        return mixed


class MLP(nn.Module):
    """The MLP of eq. 3, Linear, GELU, Linear on each token: (B, N, K) -> (B, N, K)."""

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_dim, config.mlp_dim)
        self.fc2 = Linear(config.mlp_dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, z: Tensor) -> Tensor:
        mixed: Tensor = self.fc2(self.dropout(F.gelu(self.fc1(z))))  # (B, N, K)
        return mixed


class TransformerBlock(nn.Module):
    """One layer of the encoder, pre-norm (eq. 2 and 3): (B, N, K) -> (B, N, K)."""

    def __init__(self, config: UNETRConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_dim)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_dim)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.dropout(self.attn(self.norm1(z)))  # eq. 2
        z = z + self.dropout(self.mlp(self.norm2(z)))  # eq. 3
        return z


# UNETR


class UNETR(nn.Module):
    """The network of Figure 2, in 2D: images (B, C, H, W) -> logits (B, out_channels, H, W).

    H and W may be any multiples of P: where they are not config.image_size, the positions are resized.
    Raises ValueError for any other shape.
    """

    def __init__(self, config: UNETRConfig = UNETRConfig()) -> None:
        super().__init__()
        self.config = config
        channels, hidden, stages = config.in_channels, config.hidden_dim, len(config.tapped_layers)

        self.patch_embed = Linear(channels * config.patch_size**2, hidden)  # E of eq. 1
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(config.grid), hidden))  # E_pos of eq. 1
        nn.init.normal_(self.pos_embed, std=0.02)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))

        # One stage for each halving, from the deepest up: at 1/8, 1/4, 1/2 and 1/1 of the image for P = 16.
        self.ups, self.skips, self.merges = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        below = hidden
        for level in reversed(range(stages)):
            width = config.feature_size * 2**level
            self.ups.append(GreenBlock(below, width))
            chain: list[nn.Module]
            if level:  # from z at 1/P, one doubling for each blue block
                chain = [BlueBlock(hidden if i == level else width, width) for i in range(level, stages)]
            else:  # from the image itself
                chain = [OrangeBlock(channels, width), OrangeBlock(width, width)]
            self.skips.append(nn.Sequential(*chain))
            self.merges.append(nn.Sequential(OrangeBlock(2 * width, width), OrangeBlock(width, width)))
            below = width
        self.head = GreyBlock(below, config.out_channels)

    def forward(self, image: Tensor) -> Tensor:
        config = self.config
        if image.ndim != 4 or image.shape[1] != config.in_channels:
            raise ValueError(
                f"the image must have shape (B, {config.in_channels}, H, W) with H and W multiples of "
                f"{config.patch_size}, got {tuple(image.shape)}"
            )
        grid = image.shape[2] // config.patch_size, image.shape[3] // config.patch_size

        tokens = self.patch_embed(patchify(image, config.patch_size))  # (B, N, K)
        z = self.dropout(tokens + resize_positions(self.pos_embed, config.grid, grid))  # z0 of eq. 1
        features = [image]
        for layer, block in enumerate(self.blocks, start=1):
            z = block(z)
            if layer in config.tapped_layers:
                features.append(z.transpose(1, 2).unflatten(2, grid))  # (B, K, H/P, W/P)

        x = features.pop()  # z12 climbs from 1/P; image, z3, z6, z9 join it, the deepest first
        for up, skip, merge in zip(self.ups, self.skips, self.merges, strict=True):
            x = up(x)  # (B, F * 2^level, H / 2^level, W / 2^level)
            x = torch.cat([x, skip(features.pop())], dim=1)
            for orange in merge.children():  # one by one: merge(x) would keep x in memory to its end
                x = orange(x)
        logits: Tensor = self.head(x)  # (B, out_channels, H, W)
        return logits


# Image in, picture out


def open_image(path: str | Path) -> Image.Image:
    """The first image in a file, upright by its EXIF tag, with transparent parts black.

    The mode is "RGB"; or "F", in [0, 1], for more than 8 bits a pixel, which are scaled by their own range,
    since a 12-bit X-ray in a 16-bit file would else come out black. Raises ValueError for no readable image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # the 16-bit, 32-bit and float modes
            values = np.asarray(image, dtype=np.float64)
            finite = values[np.isfinite(values)]
            if not finite.size:
                raise ValueError("no pixel of it is a number")
            low, high = finite.min(), finite.max()
            values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
            image = Image.fromarray(((values - low) / ((high - low) or 1)).astype(np.float32))
        else:
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            image = image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {path} as an image ({why}); a file that Pillow opens would do") from error
    return image


def to_tensor(image: Image.Image, config: UNETRConfig) -> Tensor:
    """An image from open_image, resized to the configured size: (1, C, H, W), float32 in [0, 1].

    Raises ValueError where C is neither 1 (grey) nor 3 (RGB).
    """
    if config.in_channels not in (1, 3):
        raise ValueError(
            f"an image file is read with in_channels 1 (grey) or 3 (RGB), got {config.in_channels}; "
            f"the class UNETR itself takes any number"
        )
    height, width = config.size
    scale = 1 if image.mode == "F" else 255
    if image.mode == "RGB" and config.in_channels == 1:
        image = image.convert("L")
    pixels = np.atleast_3d(np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32))
    planes = torch.from_numpy(pixels / scale).permute(2, 0, 1)  # (1 or C, H, W)
    return planes.expand(config.in_channels, -1, -1).unsqueeze(0).contiguous()


def load_image(path: str | Path, config: UNETRConfig) -> Tensor:
    """An image file as the network takes it: (1, C, H, W), float32 in [0, 1], resized to the configured size.

    Raises ValueError for what is no readable image, and where C is neither 1 (grey) nor 3 (RGB).
    """
    return to_tensor(open_image(path), config)


def draw(image: Tensor, logits: Tensor, config: UNETRConfig, size: tuple[int, int], trained: bool) -> Figure:
    """The input (1, C, H, W) under its patch grid, beside the mask that its logits stand for.

    Both are drawn in the size of the image file, (width, height) in pixels; the mask is not smoothed, since there is
    no class between two classes.
    """
    (width, height), (rows, columns) = size, config.grid
    aspect = min(max(height / width, 0.4), 2.5)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.3 * aspect + 0.4), layout="constrained", subplot_kw={"xticks": [], "yticks": []}
    )
    extent = (0, width, height, 0)

    left.imshow(image[0].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
    thin = {"colors": "deepskyblue", "linewidth": 0.4, "alpha": 0.8}  # seen on black and on white
    left.vlines(np.linspace(0, width, columns + 1), 0, height, **thin)
    left.hlines(np.linspace(0, height, rows + 1), 0, width, **thin)
    left.set_title(f"Input: {rows} x {columns} patches of {config.patch_size} x {config.patch_size} pixels")

    if config.out_channels == 1:
        mask = logits[0, 0].sigmoid().numpy()
        shown = right.imshow(mask, extent=extent, interpolation="nearest")
        ticks = np.linspace(mask.min(), mask.max(), 5)
        figure.colorbar(shown, ticks=ticks, format="%.3f", label="probability")
    else:
        classes = config.out_channels
        mask = logits[0].argmax(0).numpy()
        colours = matplotlib.colormaps["turbo"].resampled(classes)
        shown = right.imshow(mask, extent=extent, interpolation="nearest", cmap=colours, vmin=-0.5, vmax=classes - 0.5)
        figure.colorbar(shown, ticks=range(0, classes, math.ceil(classes / 20)), label="class")
    right.set_title("Mask" if trained else "Mask of the untrained network: it means nothing yet")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the picture in the format that the ending names. What stood there is replaced only by a whole picture."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder, path.name)
        figure.savefig(partial)
        partial.replace(path)


# The command line

SAMPLE = Path(__file__).resolve().parent / "sample.png"

COLOURS = {  # as in Figure 2: the word, the terminal's number for the colour, what the block is
    OrangeBlock: ("orange", 208, "conv 3x3, batch norm, ReLU"),
    GreenBlock: ("green", 71, "transposed conv 2x2"),
    BlueBlock: ("blue", 68, "green, then orange"),
    GreyBlock: ("grey", 246, "conv 1x1"),
}


def watch(model: UNETR, colour: bool) -> None:
    """Have a line printed for each stage when it is done: its name, its shape and the blocks that led to it.

    Hooks on the parts do it, so that the model knows nothing of it. A block is a square in colour, or a word.
    """

    def mark(block: type[nn.Module]) -> str:
        word, number, _ = COLOURS[block]
        return f"\033[48;5;{number}m  \033[0m" if colour else word

    def show(stage: str, tensor: Tensor, blocks: Iterable[nn.Module] = ()) -> None:
        marks = " ".join(mark(type(block)) for block in blocks)
        print(f"{stage:<10}  {tuple(tensor.shape)!s:<20}  {marks}".rstrip(), flush=True)

    def show_output(module: nn.Module, stage: str, blocks: Iterable[nn.Module] = ()) -> None:
        module.register_forward_hook(lambda module, args, output: show(stage, output, blocks))

    print("; ".join(f"{mark(block)}: {what}" for block, (_, _, what) in COLOURS.items()))
    print(f"{'stage':<10}  {'shape':<20}  blocks")
    model.patch_embed.register_forward_pre_hook(lambda module, args: show("patches", args[0]))
    show_output(model.dropout, "tokens z0")
    for layer in model.config.tapped_layers:
        show_output(model.blocks[layer - 1], f"z{layer}")
    scale = model.config.patch_size
    for up, skip, merge in zip(model.ups, model.skips, model.merges, strict=True):
        scale //= 2
        show_output(skip, f"skip 1/{scale}", [*skip.children()])
        *_, last = oranges = [*merge.children()]
        show_output(last, f"merge 1/{scale}", [up, *oranges])
    show_output(model.head, "output", [model.head])


def find_device(name: str | None) -> torch.device:
    """The device of that name, by default the accelerator that PyTorch finds, else the CPU."""
    found = ["cpu"]
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        numbered = [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
        found = [accelerator.type, *numbered, "cpu"]
    if name is not None and name not in found:
        raise ValueError(f"device must be one that is there, got {name!r}; {' or '.join(found)} would do")
    return torch.device(found[0] if name is None else name)


def load_weights(model: UNETR, path: Path) -> None:
    """Load a state_dict that torch.save wrote. A pickle of anything but weights is refused, and not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that other programs wrote: they are refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read the weights {path}: {error.strerror}") from error
    except Exception as error:  # a damaged file fails in as many ways as there are damages
        would_do = "a file that torch.save(model.state_dict(), FILE) wrote would do"
        raise ValueError(f"{path} holds no weights, or is damaged; {would_do}") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        differences = " ".join(textwrap.shorten(line, 180) for line in str(error).splitlines()[:4])
        raise ValueError(f"{path} does not fit; weights of this configuration would do: {differences}") from error


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Raise ValueError for a path that the picture can't be written to, or that is one of the inputs."""
    endings = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.is_dir():
        raise ValueError(f"the output must be a file, got the folder {path}; {path / 'unetr-2d.png'} would do")
    if path.suffix[1:].lower() not in endings:
        raise ValueError(f"the output's ending must be one of {', '.join(endings)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"the output's folder {path.parent} does not exist; make it first, or name another")
    if not all(os.access(place, os.W_OK) for place in (path.parent, path) if place.exists()):
        raise ValueError(f"the output {path} may not be written; another name would do")
    if path in inputs:
        raise ValueError(f"the output must not replace an input, got {path} for both; another name would do")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists what would do")


def number(text: str) -> object:
    """'256' -> 256, '0.1' -> 0.1, '192x256' -> (192, 256); the rest stays text, which the configuration refuses."""
    for read in (int, float, lambda text: tuple(int(side) for side in text.split("x"))):
        try:
            return read(text)
        except ValueError:
            pass
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="UNETR-2D.py",
        description="Take an image apart into patches, run UNETR on it, untrained by default, and plot image and mask.",
    )
    add = parser.add_argument
    add("image", type=Path, nargs="?", default=SAMPLE, help="any that Pillow opens (default: sample.png by the script)")
    add("--output", type=Path, default="unetr-2d.png", metavar="FILE", help="PNG, PDF, ... (default: %(default)s)")
    add("--weights", type=Path, metavar="FILE", help="a state_dict to load (default: none, untrained)")
    add("--device", metavar="D", help="cpu, cuda, mps, ... (default: the accelerator that PyTorch finds, else cpu)")
    add("--seed", type=number, default=0, metavar="N", help="of the untrained weights (default: %(default)s)")
    add("--no-show", action="store_true", help="open no window (default: open one where there is a screen)")
    network = parser.add_argument_group("the network")
    for name, annotation in get_type_hints(UNETRConfig, include_extras=True).items():
        option, default = f"--{name.replace('_', '-')}", getattr(UNETRConfig, name)
        hint = f"{annotation.__metadata__[0]} (default: %(default)s)"
        network.add_argument(option, type=number, default=default, metavar="N", help=hint)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    config = UNETRConfig(**{name: getattr(args, name) for name in UNETRConfig.__dataclass_fields__})
    if not isinstance(args.seed, int) or not 0 <= args.seed < 2**63:
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {args.seed!r}; 0 would do")
    output = args.output.resolve()
    check_output(output, [path.resolve() for path in (args.image, args.weights) if path])
    device = find_device(args.device)
    file = open_image(args.image)
    image = to_tensor(file, config)

    torch.manual_seed(args.seed)
    model = UNETR(config).eval()
    if args.weights:
        load_weights(model, args.weights)
    layout = torch.channels_last if device.type in ("cpu", "cuda") else torch.contiguous_format
    nn.utils.convert_conv2d_weight_memory_format(model.to(device), layout)

    print(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    print(f"weights: {args.weights or f'untrained, seed {args.seed}'}")
    print(f"image: {args.image}, {file.width} x {file.height} pixels, read as {tuple(image.shape)}\n")
    watch(model, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    start = time.perf_counter()
    with torch.inference_mode():
        logits = model(image.to(device, memory_format=layout)).cpu()
    print(f"\nforward pass: {time.perf_counter() - start:.2f} s")

    try:
        plt.switch_backend("agg" if args.no_show else plt.get_backend())
    except ImportError:  # the backend that the user chose needs a screen, and there is none
        plt.switch_backend("agg")
    figure = draw(image, logits, config, file.size, trained=args.weights is not None)
    save(figure, output)
    print(f"picture: {output}")
    if figure.canvas.required_interactive_framework:
        plt.show()
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 after one sentence on standard error."""
    try:
        run(parse(argv))
    except (ValueError, OSError) as error:
        sentence = " ".join(str(error).split())
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        sentence = "this network and image size need more memory than there is; smaller sizes would do"
    else:
        return 0
    print(f"UNETR-2D.py: error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    gc.freeze()  # nor is it searched when the command ends
    gc.enable()
    sys.exit(main())
