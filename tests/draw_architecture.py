"""Draw the network as one picture: a row for each resolution, blocks in the colors of Figure 2.

python tests/draw_architecture.py [--output FILE]

Blocks and numbers are read from a network on the meta device, which has shapes but no values. The
file also holds them as JSON, under "Description" in its metadata, so that a picture that was kept
can be compared with the network of today.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch
from matplotlib import patches, path, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
unetr = importlib.import_module("UNETR-2D")

BLOCKS = (unetr.OrangeBlock, unetr.GreenBlock, unetr.BlueBlock, unetr.GreyBlock)
OPERATIONS = {
    nn.Conv2d: "conv",
    nn.ConvTranspose2d: "transposed conv",
    nn.BatchNorm2d: "batch norm",
    nn.ReLU: "ReLU",
}
STYLE = ["default", {"svg.fonttype": "path", "svg.hashsalt": "UNETR"}]
# In the order of the legend. They differ in lightness too, for a print in gray.
COLORS = {"orange": "#fbb15c", "green": "#b9e6a5", "blue": "#6ea3e0", "grey": "#e9e9e9"}
# Lengths in points. At the defaults, the picture is about 830 wide.
MARGIN = 10
GAP = 11  # the shortest arrow
ROW, LAST_ROW = 86, 132  # heights
BLOCK = WIDTH, HEIGHT = 36, 30
RADIUS = 12  # of a concatenation
SIDE, OUTPUT = 90, 44  # widths of the boxes for the image and for the logits
CAPTION, LEGEND = 240, 255  # widths


def color(block: nn.Module) -> str:
    """The color of a block in Figure 2: OrangeBlock -> "orange"."""
    return type(block).__name__.removesuffix("Block").lower()


def times(sizes: tuple[int, ...] | list[int]) -> str:
    """[256, 256] -> "256 x 256", with a multiplication sign."""
    return " \N{MULTIPLICATION SIGN} ".join(str(size) for size in sizes)


def explain(block: nn.Module) -> str:
    """What a block computes: OrangeBlock -> "conv 3 x 3, batch norm, ReLU"."""
    if isinstance(block, unetr.BlueBlock):
        return ", then ".join(color(part) for part in block)
    steps = []
    for layer in list(block.children()) or [block]:
        step = next(name for kind, name in OPERATIONS.items() if isinstance(layer, kind))
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            step += f" {times(layer.kernel_size)}"
            if layer.stride != (1, 1):
                step += f", stride {layer.stride[0]}"
        steps.append(step)
    return ", ".join(steps)


def describe(config: unetr.UNETRConfig) -> dict:
    """The structure of UNETR(config), as dictionaries, lists, strings and integers.

    Shapes are without the batch; a size is [height, width] in pixels. A source names the tensor
    that enters: "image", a feature map such as "z3", or the output of a stage such as "decoder[0]".
    """
    with torch.device("meta"):
        model = unetr.UNETR(config).eval()
        image = torch.empty(1, config.in_channels, *config.size)
    inputs, outputs = {}, {}

    def record(module: nn.Module, args: tuple, output: object) -> None:
        inputs[module], outputs[module] = args[0], output

    def block(module: nn.Module) -> dict:
        channels, *size = outputs[module].shape[1:]
        return {"color": color(module), "channels": channels, "size": size}

    for module in model.modules():
        module.register_forward_hook(record)
    with torch.no_grad():
        model(image)

    feature_maps = outputs[model.encoder]
    names = {id(image): "image"}  # of tensors
    for layer, feature_map in zip(config.tapped_layers, feature_maps, strict=True):
        names[id(feature_map)] = f"z{layer}"
    stages = []
    for i, stage in enumerate(model.decoder):
        names[id(outputs[stage])] = f"decoder[{i}]"
        description = {
            "name": f"decoder[{i}]",
            "source": names[id(inputs[stage.up])],
            "up": block(stage.up),
            "skip_source": names[id(inputs[stage.skip])],
            "skip": [block(module) for module in stage.skip],
            "concatenated": inputs[stage.merge1].shape[1],
            "merge": [block(stage.merge1), block(stage.merge2)],
        }
        stages.append(description)

    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    return {
        "image": list(image.shape[1:]),
        "patch_size": model.encoder.patch_embed.patch_size,
        "tokens": list(outputs[model.encoder.patch_embed].shape[1:]),
        "layers": len(model.encoder.blocks),
        "tapped_layers": list(config.tapped_layers),
        "feature_map": list(feature_maps[0].shape[1:]),
        "stages": stages,
        "head": block(model.head),
        "legend": {color(module): explain(module) for module in blocks},
    }


def put_text(axes: Axes, x: float, y: float, text: object, size: float = 10.5, **font: str) -> None:
    """Put lines of text around the height y; x is their center unless ha says otherwise."""
    lines = str(text).split("\n")
    y += 0.36 * size - 6.5 * (len(lines) - 1)  # the baseline of the first line
    for i, line in enumerate(lines):
        axes.text(x, y + 13 * i, line, fontsize=size, **{"ha": "center", **font})


def put_box(axes: Axes, x: float, y: float, text: object, fill: str, size: tuple = BLOCK) -> None:
    """Put a box of a size (width, height) around (x, y), with text in it."""
    width, height = size
    corner, shape = (x - width / 2, y - height / 2), "round, pad=0, rounding_size=3"
    box = patches.FancyBboxPatch(corner, width, height, shape, fc=fill, ec="black", lw=0.8)
    axes.add_patch(box)
    put_text(axes, x, y, text)


def put_circle(axes: Axes, x: float, y: float) -> None:
    """Put the sign of a concatenation around (x, y)."""
    axes.add_patch(patches.Circle((x, y), RADIUS, fc="white", ec="black", lw=0.8))
    put_text(axes, x, y, "cat")


def put_arrow(axes: Axes, *points: tuple[float, float]) -> None:
    """Put a line through points, with a head at the last one."""
    line, head = path.Path(points), "-|>, head_length=5, head_width=2.4"
    arrow = patches.FancyArrowPatch(path=line, arrowstyle=head, mutation_scale=1, fc="black")
    axes.add_patch(arrow)


def draw(description: dict) -> Figure:
    """Draw what describe returns. Positions are in points from the upper left corner."""
    stages, layers = description["stages"], description["layers"]
    tapped, feature_map = description["tapped_layers"], description["feature_map"]

    # Rows, from the highest resolution to the lowest
    sizes = [stage["up"]["size"] for stage in reversed(stages)] + [feature_map[1:]]
    tops = [MARGIN + ROW * row for row in range(len(sizes))]
    bottoms = [*tops[1:], tops[-1] + LAST_ROW]
    rows = [top + ROW / 2 for top in tops]
    rows[-1] += 14  # below the names of the feature maps

    # Columns, from left to right
    space = min(after - before for before, after in zip([0, *tapped], tapped, strict=False))
    skip_width = 2 * (WIDTH + GAP) + RADIUS  # of the blocks above the layers
    step = max(17, (WIDTH + GAP) / space, skip_width / (layers - 0.5))  # the width of a layer
    label = 6.4 * len(times(sizes[0]))  # the width of the labels of the rows
    image_x = MARGIN + label + GAP + SIDE / 2
    layers_x = image_x + SIDE / 2 + GAP
    stage_x = layers_x + step * (layers - 0.5)
    stage_width = RADIUS + GAP + WIDTH + GAP + WIDTH / 2
    width = stage_x + stage_width * len(stages) + WIDTH / 2 + GAP + WIDTH + GAP + OUTPUT
    width = max(width, stage_x + WIDTH + LEGEND, layers_x + CAPTION + LEGEND) + MARGIN

    figure = Figure(figsize=(width / 72, bottoms[-1] / 72), facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(bottoms[-1], 0))
    axes.set_axis_off()
    shape = "round, pad=0, rounding_size=8"
    size = (width - 2, bottoms[-1] - 2)
    card = patches.FancyBboxPatch((1, 1), *size, shape, fc="white", ec="#c8ccd0")
    axes.add_patch(card)
    for top, bottom in list(zip(tops, bottoms, strict=True))[1::2]:
        band = patches.Rectangle((1.5, top), width - 3, bottom - top, fc="#f0f2f5")
        axes.add_patch(band)
        band.set_clip_path(card)
    for size, y in zip(sizes, rows, strict=True):
        x = MARGIN + label / 2
        put_text(axes, x, y - 8, f"1/{sizes[0][0] // size[0]}", size=12, weight="bold")
        put_text(axes, x, y + 8, times(size))

    def put_blocks(x: float, y: float, blocks: list[dict]) -> tuple[float, float]:
        """Put blocks one after the other from (x, y) on. The result is where the last one ends.

        A block that doubles the resolution is on the border of two rows, others are in a row.
        """
        for block in blocks:
            text, fill = block["channels"], COLORS[block["color"]]
            border = bottoms[sizes.index(block["size"])]
            if y > border:
                put_arrow(axes, (x, y), (x, border + HEIGHT / 2))
                put_box(axes, x, border, text, fill)
                y = border - HEIGHT / 2
            else:
                put_arrow(axes, (x, y), (x + GAP, y))
                put_box(axes, x + GAP + WIDTH / 2, y, text, fill)
                x += GAP + WIDTH
        return (x, y)

    # Encoder
    first, last = rows[0], rows[-1]
    patch = times([description["patch_size"]] * 2)
    embedding = f"patches of\n{patch} pixels\nlinear\n+ position\nembedding"
    put_box(axes, image_x, first, f"image\n{description['image'][0]}", "white", (SIDE, HEIGHT))
    put_arrow(axes, (image_x, first + HEIGHT / 2), (image_x, last - 38))
    put_box(axes, image_x, last, embedding, "white", (SIDE, 76))
    put_arrow(axes, (image_x + SIDE / 2, last), (layers_x, last))
    ends = {"image": (image_x + SIDE / 2, first)}  # where each source leaves
    for layer in range(1, layers + 1):
        x = layers_x + step * (layer - 0.5)
        put_box(axes, x, last, layer, "white", (step, HEIGHT))
        if layer in tapped:
            ends[f"z{layer}"] = (x, last - HEIGHT / 2)
            put_text(axes, x + 5, last - HEIGHT / 2 - 9, f"$z_{{{layer}}}$", size=12, ha="left")
    tokens, dim = description["tokens"]
    caption = f"{layers} Transformer layers, {tokens} tokens of {dim} numbers\n"
    caption += f"$z$: tokens as a feature map, {times(feature_map)}"
    put_text(axes, layers_x, last + 36, caption, ha="left")

    # Decoder
    for stage in stages:
        y = rows[sizes.index(stage["up"]["size"])]
        put_arrow(axes, put_blocks(*ends[stage["source"]], [stage["up"]]), (stage_x, y + RADIUS))
        skip = put_blocks(*ends[stage["skip_source"]], stage["skip"])
        put_arrow(axes, skip, (skip[0], y), (stage_x - RADIUS, y))
        put_circle(axes, stage_x, y)
        put_text(axes, stage_x, y - RADIUS - 7, stage["concatenated"])
        x, y = put_blocks(stage_x + RADIUS, y, stage["merge"])
        put_text(axes, x - WIDTH - GAP / 2, y + HEIGHT / 2 + 10, stage["name"])
        stage_x += stage_width
        ends[stage["name"]] = (stage_x, y - HEIGHT / 2)
    x, y = put_blocks(x, y, [description["head"]])
    logits = f"logits\n{description['head']['channels']}"
    put_arrow(axes, (x, y), (x + GAP, y))
    put_box(axes, x + GAP + OUTPUT / 2, y, logits, "white", (OUTPUT, HEIGHT))

    # Legend
    x, y = width - LEGEND + 15, tops[-1] + 12
    for name, fill in COLORS.items():
        if name in description["legend"]:
            put_box(axes, x, y, name, fill, (50, 16))
            put_text(axes, x + 33, y, description["legend"][name], ha="left")
            y += 20
    put_circle(axes, x, y + 4)
    put_text(axes, x + 33, y + 4, "concatenation along the channels", ha="left")
    put_text(axes, x, y + 24, "number")
    put_text(axes, x + 33, y + 24, "channels", ha="left")
    return figure


def main(argv: list[str] | None = None) -> None:
    """The command: draw the network at its defaults."""
    parser = argparse.ArgumentParser(description="Draw the network at its defaults.")
    default = TESTS / "baseline" / "architecture.svg"
    parser.add_argument("--output", type=Path, default=default, help="SVG or PNG file")
    args = parser.parse_args(argv)
    description = describe(unetr.UNETRConfig())
    metadata = {"Description": json.dumps(description), "Date": None}
    with style.context(STYLE):
        draw(description).savefig(args.output, metadata=metadata)
    print(f"figure: {args.output.resolve()}")


if __name__ == "__main__":
    main()
