"""Train this UNETR and MONAI's at the same sizes to segment gray matter, and compare loss and Dice during training.

A sanity check, not a benchmark of segmentation quality: training and held-out slices are neighbors in one averaged
brain, with two slices left out between them.

python tests/compare_training.py [--steps N] [--seeds N] [--figure FILE]
"""

import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
unetr = importlib.import_module("UNETR-2D")

SIZES = dict(image_size=(112, 96), in_channels=1, hidden_dim=96, mlp_dim=192, num_heads=4, feature_size=16)
# Of 48 axial slices, 2 mm apart; two are left out wherever training and held-out slices would be neighbors.
TRAIN = [*range(10), *range(20, 30), *range(40, 48)]
HELD_OUT = [*range(12, 18), *range(32, 38)]


def load_slices(kind: str) -> Tensor:
    """All slices of 2 mm pixels, (48, 1, 112, 96): T1 images from 0 to 1 ("t1") or gray matter masks ("gm")."""
    sheet = np.asarray(Image.open(TESTS / f"data/{kind}.png").convert("L"), dtype=np.float32) / 255
    return torch.from_numpy(sheet).reshape(6, 112, 8, 96).transpose(1, 2).reshape(48, 1, 112, 96)


def dice(prediction: Tensor, truth: Tensor) -> float:
    """Dice coefficient of two masks, over all their slices together: 2 |A and B| / (|A| + |B|)."""
    return (2 * (prediction * truth).sum() / (prediction.sum() + truth.sum())).item()


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Masks of 0 and 1, computed in evaluation mode; the model then returns to the mode it was in."""
    training = model.training
    model.eval()
    with torch.inference_mode():
        masks = (model(images) > 0).float()
    model.train(training)
    return masks


def evaluate(model: nn.Module) -> float:
    """Dice on the held-out slices."""
    return dice(predict(model, load_slices("t1")[HELD_OUT]), load_slices("gm")[HELD_OUT])


def train(model: nn.Module, steps: int, seed: int, marks: tuple[int, ...] = ()) -> list[tuple[float, float]]:
    """Train with cross-entropy on batches of 4 randomly flipped and shifted slices.

    Returns, for each step in marks, the mean loss of the last 20 steps and the Dice on the held-out slices.
    """
    images, masks = load_slices("t1")[TRAIN], load_slices("gm")[TRAIN]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    losses, results = [], []
    model.train()
    for step in range(1, steps + 1):
        batch = torch.randint(len(TRAIN), (4,), generator=generator)
        x, y = images[batch], masks[batch]
        if torch.rand((), generator=generator) < 0.5:
            x, y = x.flip(3), y.flip(3)
        shift = torch.randint(-10, 11, (2,), generator=generator).tolist()  # the black margin is at least as wide
        x, y = x.roll(shift, (2, 3)), y.roll(shift, (2, 3))
        loss = F.binary_cross_entropy_with_logits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step in marks:
            results.append((float(np.mean(losses[-20:])), evaluate(model)))
    return results


def build_unetr() -> nn.Module:
    return unetr.UNETR(unetr.UNETRConfig(**SIZES))


def build_monai(norm_name: str) -> nn.Module:
    from monai.networks.nets import UNETR

    return UNETR(
        in_channels=SIZES["in_channels"],
        out_channels=1,
        img_size=SIZES["image_size"],
        feature_size=SIZES["feature_size"],
        hidden_size=SIZES["hidden_dim"],
        mlp_dim=SIZES["mlp_dim"],
        num_heads=SIZES["num_heads"],
        norm_name=norm_name,
        spatial_dims=2,
    )


MODELS = {
    "UNETR-2D": build_unetr,
    "MONAI, batch norm": lambda: build_monai("batch"),
    "MONAI, instance norm": lambda: build_monai("instance"),
}


def draw(model: nn.Module, path: str) -> None:
    """Plot the held-out slices of the worst, median and best Dice: image, ground truth, and prediction with errors."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    images, truths = load_slices("t1")[HELD_OUT], load_slices("gm")[HELD_OUT]
    predictions = predict(model, images)
    scores = [dice(prediction, truth) for prediction, truth in zip(predictions, truths, strict=True)]
    order = np.argsort(scores)
    gray, orange, blue = (0.75, 0.75, 0.75), (0.9, 0.45, 0.0), (0.1, 0.45, 1.0)

    # In pixels: 9 panels of 240 x 288, 80 x 96 enlarged exactly three times; gaps of 16 x 32; margins of 16, 32 and 36.
    figure, axes = plt.subplots(3, 3, figsize=(7.84, 9.96), dpi=100)
    figure.subplots_adjust(16 / 784, 36 / 996, 768 / 784, 964 / 996, wspace=16 / 240, hspace=32 / 288)
    chosen = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
    for row, (name, i) in zip(axes, chosen.items(), strict=True):
        image, truth, found = (x[i, 0, 8:104, 8:88, None].numpy() for x in (images, truths, predictions))
        errors = found * truth * gray + found * (1 - truth) * orange + (1 - found) * truth * blue
        titles = (f"{name} of {len(order)} held-out slices", "ground truth", f"prediction, Dice {scores[i]:.3f}")
        for axis, title, panel in zip(row, titles, (image.repeat(3, axis=2), truth * gray, errors), strict=True):
            axis.imshow(panel, interpolation="nearest")
            axis.set_title(title, fontsize=10)
            axis.set_axis_off()
    colors = {"true positive": gray, "false positive": orange, "false negative": blue}
    patches = [Patch(color=color, label=label) for label, color in colors.items()]
    figure.legend(handles=patches, loc="lower right", ncols=3, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def print_table(title: str, marks: tuple[int, ...], values: dict[str, np.ndarray]) -> None:
    """Print mean ± standard deviation over the seeds as a Markdown table. values: for each model, (seeds, marks)."""
    print(f"\n| {title} | {' | '.join(f'{mark} steps' for mark in marks)} |")
    print("|---" * (len(marks) + 1) + "|")
    for name, runs in values.items():
        cells = [f"{mean:.3f}" for mean in runs.mean(axis=0)]
        if len(runs) > 1:
            cells = [f"{cell} ± {std:.3f}" for cell, std in zip(cells, runs.std(axis=0, ddof=1), strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="training steps per run (default: 800)")
    parser.add_argument("--seeds", type=int, default=5, help="runs per model (default: 5)")
    parser.add_argument("--figure", help="file for the predictions of the first UNETR-2D run on three held-out slices")
    args = parser.parse_args()
    if args.steps < 8 or args.seeds < 1:
        parser.error(f"--steps must be at least 8 and --seeds at least 1, got {args.steps} and {args.seeds}")
    marks = (args.steps // 8, args.steps // 4, args.steps // 2, args.steps)
    results: dict[str, list] = {name: [] for name in MODELS}
    for seed in range(args.seeds):
        for name, build in MODELS.items():
            torch.manual_seed(seed)
            model = build()
            results[name].append(train(model, args.steps, seed, marks))
            for mark, (loss, score) in zip(marks, results[name][-1], strict=True):
                print(f"seed {seed}, {name}, step {mark}: loss {loss:.4f}, Dice {score:.4f}", flush=True)
            if args.figure and name == "UNETR-2D" and seed == 0:
                draw(model, args.figure)
    runs = {name: np.array(values) for name, values in results.items()}  # (seeds, marks, 2)
    print_table("Dice, held-out slices", marks, {name: values[..., 1] for name, values in runs.items()})
    print_table("loss, last 20 steps", marks, {name: values[..., 0] for name, values in runs.items()})
