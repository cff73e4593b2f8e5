"""The picture: the input under its patch grid, beside the mask, both in the size of the image file."""

import importlib

import numpy as np
import pytest
import torch
from conftest import SMALL
from matplotlib import colors

unetr = importlib.import_module("UNETR-2D")
CONFIG = unetr.UNETRConfig(**{**SMALL, "image_size": (32, 48)})


@pytest.fixture
def draw():
    def draw(logits, size=(300, 100), trained=False, channels=3, **sizes):
        config = unetr.UNETRConfig(**{**SMALL, "image_size": (32, 48), "out_channels": logits.shape[1], **sizes})
        image = torch.rand(1, channels, 32, 48, generator=torch.Generator().manual_seed(0))
        return image, unetr.draw(image, logits, config, size, trained)

    yield draw
    unetr.plt.close("all")


def logits(classes=1):
    return torch.randn(1, classes, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels", [1, 3])
def test_input_under_its_patch_grid(draw, channels):
    image, figure = draw(logits(), channels=channels)
    left = figure.axes[0]
    (shown,) = left.images
    np.testing.assert_allclose(shown.get_array(), image[0].permute(1, 2, 0).squeeze(2).numpy())
    assert shown.get_cmap().name == "gray" and shown.get_clim() == (0, 1)  # never stretched to its own range
    assert shown.get_extent() == [0, 300, 100, 0]
    down, across = left.collections
    assert [line[:, 0].tolist() for line in down.get_segments()] == [[x, x] for x in (0, 100, 200, 300)]  # 3 columns
    assert [line[:, 1].tolist() for line in across.get_segments()] == [[y, y] for y in (0, 50, 100)]  # 2 rows
    assert all(line[:, 1].tolist() == [0, 100] for line in down.get_segments())
    assert all(line[:, 0].tolist() == [0, 300] for line in across.get_segments())
    for lines in (down, across):
        assert lines.get_linewidth() == [0.4] and lines.get_alpha() == 0.8
        assert colors.same_color(lines.get_color(), ("deepskyblue", 0.8))
    assert left.get_xlim() == (0, 300) and left.get_ylim() == (100, 0)  # no margin, the first row at the top
    assert left.get_xticks().size == left.get_yticks().size == 0
    assert left.get_title() == "Input: 2 x 3 patches of 16 x 16 pixels"


def test_probabilities_with_the_range_that_they_have(draw):
    _, figure = draw(logits())
    _, right, bar = figure.axes
    (shown,) = right.images
    mask = logits()[0, 0].sigmoid().numpy()
    np.testing.assert_allclose(shown.get_array(), mask)
    assert shown.get_clim() == (mask.min(), mask.max()) and shown.get_extent() == [0, 300, 100, 0]
    assert shown.get_cmap().name == "viridis" and shown.get_interpolation() == "nearest"
    np.testing.assert_allclose(bar.get_yticks(), np.linspace(mask.min(), mask.max(), 5), rtol=1e-6)
    assert [label.get_text() for label in bar.get_yticklabels()] == [f"{tick:.3f}" for tick in bar.get_yticks()]
    assert bar.get_ylabel() == "probability" and shown.colorbar.ax is bar
    assert right.get_xticks().size == right.get_yticks().size == 0
    assert right.get_title() == "Mask of the untrained network: it means nothing yet"


def test_a_mask_of_one_value_is_drawn(draw):
    _, figure = draw(torch.zeros(1, 1, 32, 48))
    figure.canvas.draw()
    assert figure.axes[2].get_yticklabels()[0].get_text() == "0.500"


@pytest.mark.parametrize("classes, ticks", [(2, [0, 1]), (20, range(20)), (21, range(0, 21, 2)), (45, range(0, 45, 3))])
def test_one_colour_for_each_class(draw, classes, ticks):
    _, figure = draw(logits(classes), trained=True)
    _, right, bar = figure.axes
    (shown,) = right.images
    assert torch.equal(torch.from_numpy(shown.get_array().data), logits(classes)[0].argmax(0))
    assert classes == shown.get_cmap().N and shown.colorbar.ax is bar
    assert len({colors.to_hex(shown.cmap(shown.norm(number))) for number in range(classes)}) == classes
    assert shown.norm(0) * classes == pytest.approx(0.5) and shown.get_extent() == [0, 300, 100, 0]
    assert bar.get_yticks().tolist() == list(ticks) and bar.get_ylabel() == "class"
    assert right.get_title() == "Mask"


def test_between_two_classes_is_no_third(draw):
    halves = torch.zeros(1, 5, 200, 300)  # drawn a little enlarged, where Matplotlib smooths by itself
    halves[:, 0, :, :125] = halves[:, 4, :, 125:] = 1
    _, figure = draw(halves)
    figure.canvas.draw()
    _, right, _ = figure.axes
    (shown,) = right.images
    box = right.get_window_extent()
    height = figure.canvas.get_width_height()[1]
    rows = slice(round(height - box.y1) + 3, round(height - box.y0) - 3)
    inside = np.asarray(figure.canvas.buffer_rgba())[rows, round(box.x0) + 3 : round(box.x1) - 3, :3]
    seen = {tuple(pixel) for pixel in inside.reshape(-1, 3).tolist()}
    assert seen == {tuple(shown.cmap(shown.norm(number), bytes=True)[:3]) for number in (0, 4)}


@pytest.mark.parametrize("size, aspect", [((100, 100), 1), ((300, 240), 0.8), ((1000, 100), 0.4), ((10, 1000), 2.5)])
def test_the_figure_is_as_high_as_the_image_asks(draw, size, aspect):
    _, figure = draw(logits(), size=size)
    np.testing.assert_allclose(figure.get_size_inches(), (10, 4.3 * aspect + 0.4))
    figure.canvas.draw()
    box, right = (axis.get_window_extent() for axis in figure.axes[:2])
    assert box.x1 < right.x0 and box.y0 == pytest.approx(right.y0, abs=1)
    assert box.height / box.width == pytest.approx(size[1] / size[0], rel=0.01)
    assert figure.get_layout_engine() is not None
