"""The figure: what the network sees, under its patch grid, beside its output for the same pixels."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import small, unetr


@pytest.fixture
def draw():
    """The panels of a figure: left, right, and color bar."""

    def draw(image, logits, trained=False):
        config = small(image_size=image.shape[2:], in_channels=image.shape[1], out_channels=logits.shape[1])
        figure = unetr.draw(image, logits, config, trained)
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
    image = random(channels).sigmoid()
    left, right, _ = draw(image, random(1, seed=1))
    np.testing.assert_allclose(left.images[0].get_array(), image[0].permute(1, 2, 0).squeeze(2).numpy())
    np.testing.assert_allclose(right.images[0].get_array(), random(1, seed=1)[0, 0].sigmoid().numpy())
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, 1)  # never stretched


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (256, 32)])
def test_patches_are_squares_and_both_panels_have_the_same_size(draw, size):
    left, right = (axes.get_window_extent() for axes in draw(torch.zeros(1, 3, *size), torch.zeros(1, 1, *size))[:2])
    assert left.height / left.width == pytest.approx(size[0] / size[1], rel=0.01)
    assert (left.width, left.height) == pytest.approx((right.width, right.height), rel=0.01)
    assert left.x1 < right.x0 and left.y0 == pytest.approx(right.y0, abs=1)


@pytest.mark.parametrize("value", [0, 1])
def test_the_patch_grid_is_visible_on_black_and_on_white(draw, value):
    left = draw(torch.full((1, 3, 64, 64), float(value)), torch.zeros(1, 1, 64, 64))[0]
    lines = (abs(pixels_of(left) - 255 * value).sum(axis=2) > 60).mean(axis=0) > 0.9  # columns of pixels
    assert np.count_nonzero(np.diff(lines.astype(int)) == 1) == 3  # between four patches


@pytest.mark.parametrize("trained", [True, False])
def test_the_title_says_whether_the_network_is_trained(draw, trained):
    left, right, _ = draw(random(3).sigmoid(), random(1), trained)
    assert left.get_title() == "Input: 2 x 3 patches of 16 x 16 pixels"
    assert ("untrained" in right.get_title().lower() and "meaningless" in right.get_title()) != trained


@pytest.mark.parametrize("classes", [2, 20, 45])
def test_several_channels_are_drawn_as_a_class_map(draw, classes):
    _, right, bar = draw(random(3).sigmoid(), random(classes))
    (shown,), ticks = right.images, bar.get_yticks()
    assert torch.equal(torch.from_numpy(shown.get_array().data), random(classes)[0].argmax(0))
    assert len({tuple(shown.cmap(shown.norm(number))) for number in range(classes)}) == classes
    assert np.array_equal(ticks, ticks.round()) and ticks[0] == 0 and ticks[-1] < classes and len(ticks) <= 20


def test_no_third_class_is_drawn_between_two(draw):
    halves = torch.zeros(1, 5, 192, 288)  # drawn a little larger, which Matplotlib would smooth by itself
    halves[:, 0, :, :125] = halves[:, 4, :, 125:] = 1
    right = draw(torch.zeros(1, 3, 192, 288), halves)[1]
    drawn, (shown,) = {tuple(pixel) for pixel in pixels_of(right).reshape(-1, 3).tolist()}, right.images
    assert drawn == {tuple(shown.cmap(shown.norm(number), bytes=True)[:3]) for number in (0, 4)}


@pytest.mark.parametrize("origin", ["upper", "lower"])
def test_a_matplotlibrc_does_not_turn_the_figure_upside_down(draw, origin):
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, :32] = 1
    with matplotlib.rc_context({"image.origin": origin}):
        panels = draw(image, 20 * image[:, :1] - 10, True)[:2]
    for axes in panels:
        upper, lower = np.array_split(pixels_of(axes), 2)
        assert upper.sum() > 1.5 * lower.sum()
