"""The figure: what the network sees, under its patch grid, beside its output."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import unetr


@pytest.fixture
def draw():
    """The panels of a figure: left, right, and color bar."""

    def draw(image, logits, title=""):
        figure = unetr.draw(image, logits, 16, title)
        figure.canvas.draw()
        return figure.axes

    yield draw
    plt.close("all")


def random(channels, seed=0):
    return torch.randn(1, channels, 32, 48, generator=torch.Generator().manual_seed(seed))


def pixels_of(axes):
    """The pixels inside of a panel, without those at its border."""
    height, box = axes.figure.canvas.get_width_height()[1], axes.get_window_extent()
    rows = slice(round(height - box.y1) + 3, round(height - box.y0) - 3)
    columns = slice(round(box.x0) + 3, round(box.x1) - 3)
    return np.asarray(axes.figure.canvas.buffer_rgba())[rows, columns, :3].astype(int)


@pytest.mark.parametrize("channels", [1, 3])
def test_input_and_output_are_those_given(draw, channels):
    image, logits = random(channels).sigmoid(), random(1, seed=1)
    left, right, _ = draw(image, logits)
    shown = image[0].permute(1, 2, 0).squeeze(2).numpy()
    np.testing.assert_allclose(left.images[0].get_array(), shown)
    np.testing.assert_allclose(right.images[0].get_array(), logits[0, 0].sigmoid().numpy())
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, 1)  # never stretched


def test_grayscale_is_drawn_gray(draw):
    left = draw(torch.full((1, 1, 16, 16), 0.25), torch.zeros(1, 1, 16, 16))[0]
    assert abs(np.median(pixels_of(left), axis=(0, 1)) - 64).max() < 3


def test_pixels_of_the_input_are_not_blended(draw):
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, :, 24:40] = 1
    logits = 100 * (image[:, :1] - 0.5)
    before = logits.clone()
    left, right, _ = draw(image, logits)
    gray = pixels_of(left)[np.ptp(pixels_of(left), axis=2) < 5]  # without the patch grid
    assert set(np.unique(gray)) == {0, 255}
    assert len(np.unique(pixels_of(right).reshape(-1, 3), axis=0)) == 2
    assert torch.equal(logits, before)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (256, 32)])
def test_pixels_are_squares_and_both_panels_have_the_same_size(draw, size):
    panels = draw(torch.zeros(1, 3, *size), torch.zeros(1, 1, *size))[:2]
    left, right = (axes.get_window_extent() for axes in panels)
    assert left.height / left.width == pytest.approx(size[0] / size[1], rel=0.01)
    assert (left.width, left.height) == pytest.approx((right.width, right.height), rel=0.01)
    assert left.x1 < right.x0
    assert left.y0 == pytest.approx(right.y0, abs=1)


@pytest.mark.parametrize("value", [0, 1])
def test_every_line_of_the_patch_grid_is_visible_on_black_and_on_white(draw, value):
    size = (48, 80)  # 3 x 5 patches
    left = draw(torch.full((1, 3, *size), float(value)), torch.zeros(1, 1, *size))[0]
    canvas = np.asarray(left.figure.canvas.buffer_rgba())[:, :, :3].astype(int)
    colored = np.ptp(canvas, axis=2) > 30  # neither black, white, nor gray
    assert (np.ptp(pixels_of(left), axis=2) > 30).mean() < 0.03  # thin lines

    def has_line(x, y):
        """Is a colored pixel near this point of the image?"""
        column, row = left.transData.transform((x, y))
        column, row = round(column), round(len(canvas) - row)
        return colored[row - 2 : row + 3, column - 2 : column + 3].any()

    for x in range(0, 81, 16):
        assert has_line(x, 8) and has_line(x, 40), f"vertical line at {x}"
    for y in range(0, 49, 16):
        assert has_line(8, y) and has_line(72, y), f"horizontal line at {y}"
    assert not has_line(8, 8)
    assert not has_line(40, 24)


def test_titles_and_labels(draw):
    left, right, bar = draw(random(3).sigmoid(), random(1), "a title of the caller")
    assert "prob" in bar.get_ylabel().lower()
    assert left.get_title().index("2 x 3") < left.get_title().index("16 x 16")
    assert right.get_title() == "a title of the caller"
    assert draw(random(3).sigmoid(), random(1))[0].figure is not left.figure


@pytest.mark.parametrize("classes", [2, 20, 45])
def test_several_channels_are_drawn_as_a_class_map(draw, classes):
    _, right, bar = draw(random(3).sigmoid(), random(classes))
    (shown,) = right.images
    assert torch.equal(torch.from_numpy(shown.get_array().data), random(classes)[0].argmax(0))
    colors = [tuple(shown.cmap(shown.norm(number))) for number in range(classes)]
    assert len(set(colors)) == classes
    assert "class" in bar.get_ylabel().lower()
    ticks = bar.get_yticks()
    assert np.array_equal(ticks, ticks.round())
    assert ticks[0] == 0
    assert ticks[-1] < classes
    assert len(ticks) <= 20
    for tick in ticks:  # each in the middle of its color
        for offset in (-0.4, 0.4):
            assert tuple(shown.cmap(shown.norm(tick + offset))) == colors[int(tick)]


@pytest.mark.parametrize("origin", ["upper", "lower"])
def test_both_panels_are_upright_and_not_mirrored(draw, origin):
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, :32, :32] = 1  # upper left
    with matplotlib.rc_context({"image.origin": origin}):
        panels = draw(image, 20 * image[:, :1] - 10)[:2]
        assert matplotlib.rcParams["image.origin"] == origin  # as before
    for axes in panels:
        upper, lower = np.array_split(pixels_of(axes).sum(axis=2), 2)
        upper_left, upper_right = np.array_split(upper, 2, axis=1)
        lower_left, lower_right = np.array_split(lower, 2, axis=1)
        assert upper_left.sum() > 1.5 * max(upper_right.sum(), lower_left.sum(), lower_right.sum())
