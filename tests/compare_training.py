"""Train this UNETR and MONAI's, of the same sizes, to predict the gray matter mask of a template.

python tests/compare_training.py [--steps N] [--seeds N] [--processes N] [--figure FILE]

It is a sanity check of learning, not a benchmark of segmentation: training and held-out slices are
of one averaged brain, with two slices left out between them.

Each run uses one thread of one worker process, also with --processes 1. The number of processes
therefore changes how long it takes and in which order the runs finish, but not their results.
Other processors and other versions of PyTorch round differently, and give somewhat other results.
"""

import argparse
import importlib
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
unetr = importlib.import_module("UNETR-2D")

CONFIG = unetr.UNETRConfig(
    image_size=(112, 96), in_channels=1, hidden_dim=96, mlp_dim=192, num_heads=4, feature_size=16
)
# Of 48 axial slices, 2 mm apart. Between training and held-out slices, two are left out.
TRAIN = [*range(10), *range(20, 30), *range(40, 48)]
HELD_OUT = [*range(12, 18), *range(32, 38)]
BATCH_SIZE = 4
LEARNING_RATE = 4e-3  # the maximum of the schedule
WEIGHT_DECAY = 0.01


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
    """Masks of 0 and 1, in evaluation mode. The model then returns to the mode it was in."""
    training = model.training
    model.eval()
    with torch.inference_mode():
        masks = (model(images) > 0).float()
    model.train(training)
    return masks


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


def train(
    model: nn.Module, steps: int, seed: int, marks: tuple[int, ...] = ()
) -> list[tuple[float, float]]:
    """Train with cross-entropy, and return the results at the steps in marks.

    A result is the mean loss of the last 20 steps and the Dice on the held-out slices.
    """
    images, masks = load_slices("t1")[TRAIN], load_slices("gm")[TRAIN]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    losses, results = [], []
    model.train()
    for step in range(1, steps + 1):
        x, y = random_batch(images, masks, generator)
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
    return unetr.UNETR(CONFIG)


def build_monai(norm_name: str) -> nn.Module:
    from monai.networks.nets import UNETR

    return UNETR(
        in_channels=CONFIG.in_channels,
        out_channels=CONFIG.out_channels,
        img_size=CONFIG.size,
        feature_size=CONFIG.feature_size,
        hidden_size=CONFIG.hidden_dim,
        mlp_dim=CONFIG.mlp_dim,
        num_heads=CONFIG.num_heads,
        norm_name=norm_name,
        spatial_dims=2,
    )


MODELS = {
    "UNETR-2D": build_unetr,
    "MONAI, batch norm": partial(build_monai, "batch"),
    "MONAI, instance norm": partial(build_monai, "instance"),
}


def run(name: str, seed: int, steps: int, marks: tuple[int, ...], figure: Path | None) -> list:
    """Train one model from scratch, in a worker process. Returns its results at the marks."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    results = train(model, steps, seed, marks)
    if figure:
        draw(model, figure)
    return results


def run_all(args: argparse.Namespace, marks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Train all models with all seeds: for each model, an array (seeds, marks, loss and Dice)."""
    pool = ProcessPoolExecutor(
        args.processes,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    futures = {}
    for seed in range(args.seeds):
        for name in MODELS:
            figure = args.figure if name == "UNETR-2D" and seed == 0 else None
            future = pool.submit(run, name, seed, args.steps, marks, figure)
            futures[future] = (name, seed)

    results = {name: np.zeros((args.seeds, len(marks), 2)) for name in MODELS}
    try:
        for future in as_completed(futures):
            name, seed = futures[future]
            results[name][seed] = future.result()
            for mark, (loss, score) in zip(marks, results[name][seed], strict=True):
                print(f"seed {seed}, {name}, step {mark}: loss {loss:.4f}, Dice {score:.4f}")
            sys.stdout.flush()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, without starting the remaining runs
    return results


def draw(model: nn.Module, path: Path) -> None:
    """Plot the held-out slices of the worst, median and best Dice of one model.

    Each row shows the image, its reference mask, and the prediction with errors in color.
    """
    images, references = load_slices("t1")[HELD_OUT], load_slices("gm")[HELD_OUT]
    predictions = predict(model, images)
    scores = [dice(*masks) for masks in zip(predictions, references, strict=True)]
    order = np.argsort(scores)
    chosen = {"Worst": order[0], "Median": order[len(order) // 2], "Best": order[-1]}
    gray, orange, blue = (0.75, 0.75, 0.75), (0.9, 0.45, 0.0), (0.1, 0.45, 1.0)

    # In pixels: 9 panels of 240 x 288, which are 80 x 96 enlarged three times, with gaps of 16 x 32
    # and margins of 16 at the left and right, 32 at the top and 36 at the bottom.
    width, height = 784, 996
    figure, axes = plt.subplots(3, 3, figsize=(width / 100, height / 100), dpi=100)
    figure.subplots_adjust(
        left=16 / width,
        right=1 - 16 / width,
        bottom=36 / height,
        top=1 - 32 / height,
        wspace=16 / 240,
        hspace=32 / 288,
    )
    for row, (rank, i) in zip(axes, chosen.items(), strict=True):
        image, reference, prediction = (
            slices[i, 0, 8:104, 8:88, None].numpy() for slices in (images, references, predictions)
        )
        true_positive = prediction * reference
        false_positive = prediction * (1 - reference)
        false_negative = (1 - prediction) * reference
        panels = {
            f"{rank} of {len(order)} held-out slices": image.repeat(3, axis=2),
            "Reference mask": reference * gray,
            f"Prediction, Dice {scores[i]:.3f}": (
                true_positive * gray + false_positive * orange + false_negative * blue
            ),
        }
        for axis, (title, panel) in zip(row, panels.items(), strict=True):
            axis.imshow(panel, interpolation="nearest")
            axis.set_title(title, fontsize=10)
            axis.set_axis_off()
    colors = {"True positive": gray, "False positive": orange, "False negative": blue}
    patches = [Patch(color=color, label=label) for label, color in colors.items()]
    figure.legend(handles=patches, loc="lower right", ncols=3, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def print_facts(args: argparse.Namespace) -> None:
    """Print what the results depend on."""
    height, width = CONFIG.size
    print("images: axial slices of the ICBM 152 T1 template, an average of 152 brains")
    print("reference masks: gray matter probability map of the template > 0.5")
    print(f"image size: {height} x {width} pixels of 2 mm")
    print(f"slices: {len(TRAIN)} to train, {len(HELD_OUT)} held out, of the same brain")
    print(f"network: patch size {CONFIG.patch_size}, {CONFIG.num_layers} layers", end="")
    print(f", {CONFIG.num_heads} heads, hidden size {CONFIG.hidden_dim}", end="")
    print(f", MLP size {CONFIG.mlp_dim}, feature size {CONFIG.feature_size}")
    for name, build in MODELS.items():
        print(f"parameters of {name}: {sum(p.numel() for p in build().parameters()):,}")
    print(f"batch size: {BATCH_SIZE}, randomly flipped and shifted")
    print(f"optimizer: AdamW, weight decay {WEIGHT_DECAY}")
    print(f"schedule: OneCycleLR up to {LEARNING_RATE}, over {args.steps} steps")
    print(f"seeds: {args.seeds} for each model")
    print(f"processes: {args.processes}, each with one thread")
    print(f"date: {time.strftime('%Y-%m-%d')}")
    print(f"versions: Python {platform.python_version()}", end="")
    print(f", torch {torch.__version__}, MONAI {version('monai')}\n", flush=True)


def print_table(title: str, marks: tuple[int, ...], values: dict[str, np.ndarray]) -> None:
    """Print a Markdown table of mean ± standard deviation over the seeds.

    values has an array (seeds, marks) for each model.
    """
    print(f"\n| {title} | {' | '.join(f'{mark} steps' for mark in marks)} |")
    print("|---" * (1 + len(marks)) + "|")
    for name, runs in values.items():
        cells = []
        for column in runs.T:
            cell = f"{column.mean():.3f}"
            if len(column) > 1:
                cell += f" ± {column.std(ddof=1):.3f}"
            cells.append(cell)
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=800, help="steps per run (default: 800)")
    parser.add_argument("--seeds", type=int, default=5, help="runs per model (default: 5)")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--figure", type=Path, help="plot predictions of UNETR-2D with seed 0")
    args = parser.parse_args()
    if args.steps < 8:
        parser.error(f"--steps must be at least 8, got {args.steps}")
    for name in ("seeds", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.figure and not args.figure.parent.is_dir():
        parser.error(f"--figure must be in an existing folder, got {args.figure}")

    marks = (args.steps // 8, args.steps // 4, args.steps // 2, args.steps)
    print_facts(args)
    results = run_all(args, marks)
    losses = {name: values[:, :, 0] for name, values in results.items()}
    scores = {name: values[:, :, 1] for name, values in results.items()}
    print_table("Dice, held-out slices", marks, scores)
    print_table("loss, last 20 steps", marks, losses)


if __name__ == "__main__":
    main()
