"""python tests/draw_architecture.py: draw the default network as tests/baseline/architecture.svg.

Blocks and numbers are read from a network on the meta device, which has shapes but no values. The
file also holds them as JSON, under "Description" in its metadata, so that a test can compare the
picture with the network of today.
"""

import json

import torch
from conftest import ROOT, unetr
from matplotlib import patches, path, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

PICTURE = ROOT / "tests/baseline/architecture.svg"
# Those of Figure 2. They differ in lightness too, for a print in gray.
COLORS = {"orange": "#fbb15c", "green": "#b9e6a5", "blue": "#6ea3e0", "grey": "#e9e9e9"}
ENCODER, SKIP, DECODER = "#efe4f6", "#e6eef6", "#fdf3dc"  # backgrounds of the parts
# Lengths in points. At the defaults, the picture is about 880 wide.
MARGIN = 10
GAP = 11  # the shortest arrow
PAD = 3  # of a background around its part
ROW = 86  # the height of a row
BLOCK = WIDTH, HEIGHT = 36, 30
RADIUS = 12  # of a concatenation
STAGE = RADIUS + 2 * (GAP + WIDTH)  # from the center of the concatenation to the end of the stage
SIDE, OUTPUT = 98, 44  # widths of the boxes for the image and for the logits
LABEL, CAPTION, LEGEND = 64, 340, 316  # widths of texts


def color(block: nn.Module) -> str:
    """The color of a block in Figure 2: OrangeBlock -> "orange"."""
    return type(block).__name__.removesuffix("Block").lower()


def times(sizes: tuple[int, ...] | list[int]) -> str:
    """[256, 256] -> "256 x 256", with a multiplication sign."""
    return " \N{MULTIPLICATION SIGN} ".join(str(size) for size in sizes)


def explain(block: nn.Module) -> str:
    """What a block computes: OrangeBlock -> "conv 3 x 3, batch norm, ReLU"."""
    if isinstance(block, nn.Sequential):
        separator = ", then " if isinstance(block, unetr.BlueBlock) else ", "
        return separator.join(explain(part) for part in block)
    if isinstance(block, nn.ConvTranspose2d):
        return f"transposed conv {times(block.kernel_size)}, stride {block.stride[0]}"
    if isinstance(block, nn.Conv2d):
        return f"conv {times(block.kernel_size)}"
    return {nn.BatchNorm2d: "batch norm", nn.ReLU: "ReLU"}[type(block)]


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
    model(image)
    feature_maps = outputs[model.encoder]
    names = {id(image): "image"}  # of tensors
    names |= {id(z): f"z{i}" for i, z in zip(config.tapped_layers, feature_maps, strict=True)}
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

    return {
        "image": list(image.shape[1:]),
        "patch_size": model.encoder.patch_embed.patch_size,
        "tokens": list(outputs[model.encoder.patch_embed].shape[1:]),
        "layers": len(model.encoder.blocks),
        "tapped_layers": list(config.tapped_layers),
        "feature_map": list(feature_maps[0].shape[1:]),
        "stages": stages,
        "head": block(model.head),
        "legend": {color(m): explain(m) for m in model.modules() if color(m) in COLORS},
    }


def put_text(axes: Axes, x: float, y: float, text: object, **font: object) -> None:
    """Put lines of text around the height y; x is their center unless ha says otherwise."""
    y += 1  # centers digits and capitals, which have no descenders
    axes.text(x, y, text, **{"size": 12, "ha": "center", "va": "center", **font})


def put_box(axes: Axes, x: float, y: float, text: object, fill: str, size: tuple = BLOCK) -> None:
    """Put a box of a size (width, height) around (x, y), with text in it."""
    corner, shape = (x - size[0] / 2, y - size[1] / 2), "round, pad=0, rounding_size=3"
    axes.add_patch(patches.FancyBboxPatch(corner, *size, shape, fc=fill, lw=0.8))
    put_text(axes, x, y, text)


def put_cat(axes: Axes, x: float, y: float) -> None:
    """Put the sign of a concatenation around (x, y)."""
    axes.add_patch(patches.Circle((x, y), RADIUS, fc="white", ec="black", lw=0.8))
    put_text(axes, x, y, "cat")


def put_arrow(axes: Axes, *points: tuple[float, float]) -> None:
    """Put a line through points, with a head at the last one."""
    look = {"arrowstyle": "-|>, head_length=5, head_width=2.4", "fc": "black"}
    axes.add_patch(patches.FancyArrowPatch(path=path.Path(points), mutation_scale=1, **look))


def put_blocks(axes: Axes, x: float, y: float, blocks: list, borders: list) -> tuple[float, float]:
    """Put blocks one after the other from (x, y) on. The result is where the last one ends.

    A block that doubles the resolution is on the next border of two rows, others are in a row.
    """
    for block in blocks:
        text, fill = block["channels"], COLORS[block["color"]]
        if block["color"] in ("green", "blue"):
            border = max(border for border in borders if border < y)
            put_arrow(axes, (x, y), (x, border + HEIGHT / 2))
            put_box(axes, x, border, text, fill)
            y = border - HEIGHT / 2
        else:
            put_arrow(axes, (x, y), (x + GAP, y))
            put_box(axes, x + GAP + WIDTH / 2, y, text, fill)
            x += GAP + WIDTH
    return (x, y)


def draw(description: dict) -> Figure:
    """Draw what describe returns. Positions are in points from the upper left corner."""
    stages, layers = description["stages"], description["layers"]
    tapped, feature_map = description["tapped_layers"], description["feature_map"]

    # Rows, from the highest resolution to the lowest
    sizes = [stage["up"]["size"] for stage in reversed(stages)] + [feature_map[1:]]
    tops = [MARGIN + 8 + ROW * row for row in range(len(sizes))]
    rows = [top + ROW / 2 for top in tops]
    rows[-1] += 28  # the encoder is below the blocks on the border
    first, last = rows[0], rows[-1]
    height = last + 90

    # Columns, from left to right
    image_x = MARGIN + LABEL + GAP + SIDE / 2
    layers_x = image_x + SIDE / 2 + GAP
    step = max(18, (WIDTH + GAP) / (layers // len(stages)))  # the width of a layer
    cats = [layers_x + step * (layers - 0.5) + (STAGE - WIDTH / 2) * i for i in range(len(stages))]
    encoder_end = layers_x + max(CAPTION, step * layers)
    width = max(cats[-1] + STAGE + 2 * GAP + WIDTH + OUTPUT, encoder_end + GAP + LEGEND) + MARGIN

    figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.hlines(tops[1:], MARGIN, width - MARGIN, "#a0a6ad", "dashed", lw=0.8, zorder=0.5)
    for size, y in zip(sizes, rows, strict=True):
        put_text(axes, MARGIN + LABEL / 2, y, f"1/{sizes[0][0] // size[0]}\n{times(size)}")

    # Backgrounds and titles of the parts. From y[i] to y[i + 1], the decoder starts at left[i].
    y = [MARGIN + PAD, *tops[1:-1], tops[-1] + HEIGHT / 2]
    left = [x - WIDTH / 2 for x in [*reversed(cats), cats[0]]]
    look = {"step": "post", "lw": 2 * PAD, "joinstyle": "round", "zorder": 0}
    axes.fill_betweenx(y, layers_x, [x - GAP for x in left], color=SKIP, **look)
    axes.fill_betweenx(y, left, [x + WIDTH / 2 + STAGE for x in left], color=DECODER, **look)
    y = [last - 40, height - MARGIN - PAD]
    axes.fill_betweenx(y, image_x - SIDE / 2, encoder_end, color=ENCODER, **look)
    title = {"size": 17, "weight": "bold", "ha": "left"}
    put_text(axes, layers_x, first - 32, "skip connections", **title)
    put_text(axes, cats[-1] + RADIUS + GAP, first - 32, "decoder", **title)
    put_text(axes, layers_x, last + 33, "encoder", **title)

    # Encoder
    patch = times([description["patch_size"]] * 2)
    embedding = f"patches of\n{patch} pixels\nlinear\n+ position\nembedding"
    put_box(axes, image_x, first, f"image\n{description['image'][0]}", "white", (SIDE, HEIGHT))
    put_arrow(axes, (image_x, first + HEIGHT / 2), (image_x, last - 40))
    put_box(axes, image_x, last, embedding, "white", (SIDE, 80))
    put_arrow(axes, (image_x + SIDE / 2, last), (layers_x, last))
    ends = {"image": (image_x + SIDE / 2, first)}  # where each source leaves
    for layer in range(1, layers + 1):
        x = layers_x + step * (layer - 0.5)
        put_box(axes, x, last, layer, "white", (step, HEIGHT))
        if layer in tapped:
            ends[f"z{layer}"] = (x, last - HEIGHT / 2)
            put_text(axes, x + 5, last - HEIGHT / 2 - 11, f"$z_{{{layer}}}$", size=14, ha="left")
    tokens, dim = description["tokens"]
    caption = f"{layers} Transformer layers, {tokens} tokens of {dim} numbers\n"
    caption += f"$z$: tokens as a feature map, {times(feature_map)}"
    put_text(axes, layers_x, last + 58, caption, ha="left")

    # Skip connections and decoder
    for stage, cat_x, y in zip(stages, cats, reversed(rows[:-1]), strict=True):
        up = put_blocks(axes, *ends[stage["source"]], [stage["up"]], tops)
        put_arrow(axes, up, (cat_x, y + RADIUS))
        skip = put_blocks(axes, *ends[stage["skip_source"]], stage["skip"], tops)
        put_arrow(axes, skip, (skip[0], y), (cat_x - RADIUS, y))
        put_cat(axes, cat_x, y)
        put_text(axes, cat_x, y - RADIUS - 8, stage["concatenated"])
        x, y = put_blocks(axes, cat_x + RADIUS, y, stage["merge"], tops)
        put_text(axes, x - WIDTH - GAP / 2, y + HEIGHT / 2 + 10, stage["name"])
        ends[stage["name"]] = (x - WIDTH / 2, y - HEIGHT / 2)
    x, y = put_blocks(axes, x, y, [description["head"]], tops)
    put_text(axes, x - WIDTH / 2, y + HEIGHT / 2 + 10, "head")
    put_arrow(axes, (x, y), (x + GAP, y))
    logits = f"logits\n{description['head']['channels']}"
    put_box(axes, x + GAP + OUTPUT / 2, y, logits, "white", (OUTPUT, HEIGHT))

    # Legend
    x, y = width - MARGIN - LEGEND + WIDTH / 2, last - 40
    for name, operation in description["legend"].items():
        text = f"{operation} ({name})".replace("then", "\nthen")
        put_box(axes, x, y, "", COLORS[name], (WIDTH, 14))
        put_text(axes, x + 27, y - 7, text, ha="left", va="top")
        y += 19 + 14 * text.count("\n")
    put_cat(axes, x, y + 5)
    put_text(axes, x + 27, y + 5, "concatenation along the channels", ha="left")
    put_text(axes, x - 18, y + 28, "number in a colored block: output channels", ha="left")
    return figure


def main() -> None:
    """The command: draw the network at its defaults."""
    description = describe(unetr.UNETRConfig())
    metadata = {"Description": json.dumps(description), "Date": None}
    with style.context(["default", {"svg.fonttype": "path", "svg.hashsalt": "UNETR"}]):
        draw(description).savefig(PICTURE, metadata=metadata)
    print(f"figure: {PICTURE}")


if __name__ == "__main__":
    main()
