"""Train this UNETR and MONAI's, of the same sizes, to predict the gray matter mask of a template.

python tests/compare_training.py [--steps N] [--seeds N] [--processes N] [--figure FILE]

It is a sanity check of learning, not a benchmark of segmentation: training and held-out slices are
of one averaged brain, with two slices left out between them.

Each run uses one thread of a worker process, so the results do not depend on the number of workers.
Other processors and versions of PyTorch round differently, and give somewhat different results.
"""

import argparse
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from benchmark import TESTS, build_monai, print_machine, unetr
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

CONFIG = unetr.UNETRConfig(
    image_size=(112, 96), in_channels=1, hidden_dim=96, mlp_dim=192, num_heads=4, feature_size=16
)
# Of 48 axial slices, 2 mm apart. Between training and held-out slices, two are left out.
TRAIN = [*range(10), *range(20, 30), *range(40, 48)]
HELD_OUT = [*range(12, 18), *range(32, 38)]
BATCH_SIZE = 4
LEARNING_RATE = 4e-3  # the maximum of the schedule
WEIGHT_DECAY = 0.01

MODELS = {
    "UNETR-2D": unetr.UNETR,
    "MONAI, batch norm": partial(build_monai, norm_name="batch"),
    "MONAI, instance norm": partial(build_monai, norm_name="instance"),
}
COLORS = ["black", "tab:purple", "tab:green"]  # of their curves
MARKS = 16  # number of times that each run records its results


def load_slices(kind: str) -> Tensor:
    """All slices, (48, 1, 112, 96): T1 images in [0, 1] ("t1") or gray matter masks ("gm")."""
    sheet = Image.open(TESTS / f"data/{kind}.png").convert("L")  # 6 rows of 8 slices
    pixels = torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)
    return pixels.reshape(6, 112, 8, 96).transpose(1, 2).reshape(48, 1, 112, 96)


def dice(prediction: Tensor, reference: Tensor) -> float:
    """Dice coefficient of two masks, over all their slices together: 2 |A and B| / (|A| + |B|)."""
    overlap = (prediction * reference).sum()
    return (2 * overlap / (prediction.sum() + reference.sum())).item()


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Masks of 0 and 1. Leaves the model in evaluation mode."""
    model.eval()
    with torch.inference_mode():
        return (model(images) > 0).float()


def evaluate(model: nn.Module) -> float:
    """Dice on the held-out slices."""
    predictions = predict(model, load_slices("t1")[HELD_OUT])
    return dice(predictions, load_slices("gm")[HELD_OUT])


def random_batch(images: Tensor, masks: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Random slices and their masks, all flipped and shifted in the same way."""
    chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
    batch = [images[chosen], masks[chosen]]
    if torch.rand((), generator=generator) < 0.5:
        batch = [x.flip(3) for x in batch]
    shift = torch.randint(-10, 11, (2,), generator=generator).tolist()
    return [x.roll(shift, (2, 3)) for x in batch]  # the black margin is at least as wide


def train(model: nn.Module, steps: int, seed: int) -> list[tuple[float, float]]:
    """Train with cross-entropy. Returns the results at MARKS evenly spaced steps.

    A result is the mean loss of the last 20 steps and the Dice on the held-out slices.
    """
    images, masks = load_slices("t1")[TRAIN], load_slices("gm")[TRAIN]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    losses, results = [], []
    for step in range(1, steps + 1):
        model.train()
        x, y = random_batch(images, masks, generator)
        loss = F.binary_cross_entropy_with_logits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step % (steps // MARKS) == 0:
            results.append((float(np.mean(losses[-20:])), evaluate(model)))
    return results


def run(name: str, seed: int, steps: int) -> tuple[list, Tensor]:
    """Train one model from scratch. Returns its results and its masks of the held-out slices."""
    torch.manual_seed(seed)
    model = MODELS[name](CONFIG)
    results = train(model, steps, seed)
    loss, score = results[-1]
    print(f"{name}, seed {seed}: loss {loss:.4f}, Dice {score:.4f}", flush=True)
    return results, predict(model, load_slices("t1")[HELD_OUT])


def print_table(title: str, steps: int, values: np.ndarray) -> None:
    """Print mean ± standard deviation over the seeds of values (models, seeds, MARKS)."""
    marks = [2, 4, 8, 16]  # an eighth, a quarter, half and all of the steps
    print(f"\n| {title} | {' | '.join(f'{steps * mark // MARKS} steps' for mark in marks)} |")
    print("|---" * 5 + "|")
    for name, runs in zip(MODELS, values, strict=True):
        columns = runs[:, [mark - 1 for mark in marks]].T
        cells = [f"{x.mean():.3f} ± {x.std(ddof=1):.3f}" for x in columns]
        print(f"| {name} | {' | '.join(cells)} |")


def draw_slice(axes: dict[str, plt.Axes], predictions: Tensor) -> None:
    """Plot the held-out slice of median Dice: image, reference mask and prediction."""
    images, references = load_slices("t1")[HELD_OUT], load_slices("gm")[HELD_OUT]
    scores = [dice(*masks) for masks in zip(predictions, references, strict=True)]
    i = np.argsort(scores)[len(scores) // 2]
    slices = (x[i, 0, 8:104, 8:88].numpy() for x in (images, references, predictions))
    image, reference, prediction = slices
    titles = ["Held-out slice", "Reference mask", f"Prediction, Dice {scores[i]:.3f}"]
    for name, panel, title in zip("ABC", [image, reference, image], titles, strict=True):
        axes[name].imshow(panel, cmap="gray")
        axes[name].set_title(title)
        axes[name].set_axis_off()

    patches = []
    for label, mask, color in [
        ("true positive", prediction * reference, (1.0, 0.85, 0.2, 0.4)),
        ("false positive", prediction * (1 - reference), (1.0, 0.0, 0.0, 1.0)),
        ("false negative", (1 - prediction) * reference, (0.0, 0.5, 1.0, 1.0)),
    ]:
        axes["C"].imshow(mask[..., None] * color)  # transparent where the mask is 0
        patches.append(Patch(color=color, label=label))
    axes["L"].legend(handles=patches, loc="center", frameon=False)
    axes["L"].set_axis_off()


def draw_curves(axis: plt.Axes, steps: int, scores: np.ndarray) -> None:
    """Plot the mean and the range over the seeds of scores (models, seeds, MARKS)."""
    x = np.arange(1, MARKS + 1) * steps / MARKS
    for rank, i in enumerate(np.argsort(-scores[:, :, -1].mean(1))):  # the best first
        low, mean, high = scores[i].min(0), scores[i].mean(0), scores[i].max(0)
        axis.fill_between(x, low, high, color=COLORS[i], alpha=0.15, linewidth=0)
        axis.plot(x, mean, color=COLORS[i])
        label = list(MODELS)[i].replace(", ", ",\n")
        position = (1.06, 0.96 - 0.12 * rank)  # the ends of the curves may coincide
        place = dict(xytext=position, textcoords=axis.transAxes, va="center", color=COLORS[i])
        line = dict(arrowstyle="-", color=COLORS[i], relpos=(0, 0.5))
        axis.annotate(label, (steps, mean[-1]), arrowprops=line, **place)
    title = f"Dice on held-out slices: mean and range of {scores.shape[1]} seeds"
    axis.set(title=title, xlabel="training step", xlim=(0, steps), ylim=(0, 1))
    axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="multiple of 16 (default: 800)")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2 (default: 5)")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--figure", type=Path, help="plot a prediction and the Dice over the steps")
    args = parser.parse_args()

    print_machine()
    print(f"slices: {len(TRAIN)} to train, {len(HELD_OUT)} held out; batch size {BATCH_SIZE}")
    print(f"optimizer: AdamW, weight decay {WEIGHT_DECAY}, OneCycleLR up to {LEARNING_RATE}")
    print(CONFIG)
    for name, build in MODELS.items():
        print(f"parameters of {name}: {sum(p.numel() for p in build(CONFIG).parameters()):,}")

    jobs = [(name, seed, args.steps) for name in MODELS for seed in range(args.seeds)]
    with get_context("spawn").Pool(args.processes, torch.set_num_threads, (1,)) as pool:
        runs = pool.starmap(run, jobs, chunksize=1)
    results = np.array([result for result, _ in runs])
    results = results.reshape(len(MODELS), args.seeds, MARKS, 2)  # loss and Dice
    print_table("Dice, held-out slices", args.steps, results[..., 1])
    print_table("loss, last 20 steps", args.steps, results[..., 0])
    if args.figure:
        plt.rc("axes", titlesize=10)
        layout = dict(width_ratios=[1, 1, 2.2], figsize=(8.3, 4.2), layout="constrained")
        figure, axes = plt.subplot_mosaic("ABD;LCD", **layout)
        draw_slice(axes, predictions=runs[0][1])  # of UNETR-2D, seed 0
        draw_curves(axes["D"], args.steps, results[..., 1])
        figure.savefig(args.figure, dpi=100)


if __name__ == "__main__":
    main()
