"""The figure: what the network sees, under its patch grid, beside its output for the same pixels."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import small, unetr


@pytest.fixture
def draw():
    def draw(logits, trained=False, channels=3, **sizes):
        config = small(**{"image_size": (32, 48), "in_channels": channels, "out_channels": logits.shape[1], **sizes})
        image = torch.rand(1, channels, *config.size, generator=torch.Generator().manual_seed(0))
        return image, unetr.draw(image, logits, config, trained)

    yield draw
    plt.close("all")


def logits(classes=1):
    return torch.randn(1, classes, 32, 48, generator=torch.Generator().manual_seed(1))


def pixels_of(figure, axes):
    """The pixels inside of axes, without those at its border."""
    figure.canvas.draw()
    height = figure.canvas.get_width_height()[1]
    box = axes.get_window_extent()
    rows = slice(round(height - box.y1) + 3, round(height - box.y0) - 3)
    return np.asarray(figure.canvas.buffer_rgba())[rows, round(box.x0) + 3 : round(box.x1) - 3, :3]


@pytest.mark.parametrize("channels", [1, 3])
def test_input_and_output_are_those_given(draw, channels):
    image, figure = draw(logits(), channels=channels)
    left, right = figure.axes[:2]
    np.testing.assert_allclose(left.images[0].get_array(), image[0].permute(1, 2, 0).squeeze(2).numpy())
    np.testing.assert_allclose(right.images[0].get_array(), logits()[0, 0].sigmoid().numpy())
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, 1)  # never stretched


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (256, 32)])
def test_patches_are_squares_and_both_panels_have_the_same_size(draw, size):
    _, figure = draw(torch.zeros(1, 1, *size), image_size=size)
    figure.canvas.draw()
    left, right = (axes.get_window_extent() for axes in figure.axes[:2])
    assert left.height / left.width == pytest.approx(size[0] / size[1], rel=0.01)
    assert (left.width, left.height) == pytest.approx((right.width, right.height), rel=0.01)
    assert left.x1 < right.x0 and left.y0 == pytest.approx(right.y0, abs=1)


def test_the_patch_grid_is_visible_on_black_and_on_white(draw):
    for value in (0.0, 1.0):
        figure = unetr.draw(torch.full((1, 3, 64, 64), value), torch.zeros(1, 1, 64, 64), small(), False)
        pixels = pixels_of(figure, figure.axes[0]).astype(int)
        lines = (abs(pixels - 255 * value).sum(axis=2) > 60).mean(axis=0) > 0.9  # columns of pixels
        assert np.count_nonzero(np.diff(lines.astype(int)) == 1) == 3  # between four patches


def test_the_title_says_whether_the_network_is_trained(draw):
    for trained in (True, False):
        _, figure = draw(logits(), trained=trained)
        titles = [axes.get_title() for axes in figure.axes[:2]]
        assert titles[0] == "Input: 2 x 3 patches of 16 x 16 pixels"
        assert ("untrained" in titles[1].lower() and "meaningless" in titles[1]) != trained


@pytest.mark.parametrize("classes", [2, 20, 45])
def test_several_channels_are_drawn_as_a_class_map(draw, classes):
    _, figure = draw(logits(classes))
    _, right, bar = figure.axes
    (shown,) = right.images
    assert torch.equal(torch.from_numpy(shown.get_array().data), logits(classes)[0].argmax(0))
    assert len({tuple(shown.cmap(shown.norm(number))) for number in range(classes)}) == classes
    ticks = bar.get_yticks()
    assert np.array_equal(ticks, ticks.round()) and ticks[0] == 0 and ticks[-1] < classes and len(ticks) <= 20


def test_no_third_class_is_drawn_between_two(draw):
    halves = torch.zeros(1, 5, 192, 288)  # drawn a little larger, which Matplotlib would smooth by itself
    halves[:, 0, :, :125] = halves[:, 4, :, 125:] = 1
    _, figure = draw(halves, image_size=(192, 288))
    (shown,) = figure.axes[1].images
    drawn = {tuple(pixel) for pixel in pixels_of(figure, figure.axes[1]).reshape(-1, 3).tolist()}
    assert drawn == {tuple(shown.cmap(shown.norm(number), bytes=True)[:3]) for number in (0, 4)}


def test_a_matplotlibrc_does_not_turn_the_figure_upside_down(draw):
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, :32] = 1
    for origin in ("upper", "lower"):
        with matplotlib.rc_context({"image.origin": origin}):
            figure = unetr.draw(image, 20 * image[:, :1] - 10, small(), True)
        for axes in figure.axes[:2]:
            upper, lower = np.array_split(pixels_of(figure, axes).astype(int), 2)
            assert upper.sum() > 1.5 * lower.sum()
