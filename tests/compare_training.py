"""Train this UNETR and MONAI's of the same sizes to find grey matter, side by side: losses and Dice on unseen slices.

python tests/compare_training.py [--steps N] [--seeds N] [--picture FILE]
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
# 48 slices from below to above, 2 mm apart. Two are left out wherever training slices would touch unseen ones.
UNSEEN = [*range(12, 18), *range(32, 38)]
TRAINING = [*range(10), *range(20, 30), *range(40, 48)]


def slices(kind: str) -> Tensor:
    """(48, 1, 112, 96): T1 images from 0 to 1, or masks of 0 and 1, one slice of 2 mm pixels each."""
    sheet = np.asarray(Image.open(TESTS / f"data/{kind}.png").convert("L"), dtype=np.float32) / 255
    return torch.from_numpy(sheet).reshape(6, 112, 8, 96).transpose(1, 2).reshape(48, 1, 112, 96)


def dice(logits: Tensor, truth: Tensor) -> float:
    """Of all slices together: twice the overlap over the sum of both areas."""
    found = logits > 0
    return (2 * (found * truth).sum() / (found.sum() + truth.sum())).item()


def predict(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return model(images)


def train(model: nn.Module, steps: int, seed: int) -> list[float]:
    """The loss of each step: cross entropy over batches of 4 slices, mirrored at random and shifted by up to 20 mm."""
    images, truth = slices("t1")[TRAINING], slices("gm")[TRAINING]
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    model.train()
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(TRAINING), (4,), generator=draw)
        x, y = images[chosen], truth[chosen]
        if torch.rand((), generator=draw) < 0.5:
            x, y = x.flip(3), y.flip(3)
        shift = torch.randint(-10, 11, (2,), generator=draw).tolist()  # the head has that much black around it
        x, y = x.roll(shift, (2, 3)), y.roll(shift, (2, 3))
        loss = F.binary_cross_entropy_with_logits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def score(model: nn.Module) -> float:
    return dice(predict(model, slices("t1")[UNSEEN]), slices("gm")[UNSEEN])


def here() -> nn.Module:
    return unetr.UNETR(unetr.UNETRConfig(**SIZES))


def monai(norm_name: str) -> nn.Module:
    from monai.networks.nets import UNETR

    sizes = dict(feature_size=SIZES["feature_size"], hidden_size=SIZES["hidden_dim"], mlp_dim=SIZES["mlp_dim"])
    return UNETR(1, 1, SIZES["image_size"], num_heads=SIZES["num_heads"], norm_name=norm_name, spatial_dims=2, **sizes)


def draw(model: nn.Module, path: str) -> None:
    """An unseen slice, its grey matter, and what the model takes for it."""
    import matplotlib.pyplot as plt

    image, truth = slices("t1")[UNSEEN[8]], slices("gm")[UNSEEN[8]]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.7), layout="constrained")
    found = (predict(model, image[None])[0] > 0).float()
    for axis, panel, title in zip(axes, (image, truth, found), ("unseen slice", "truth", "prediction"), strict=True):
        axis.imshow(panel[0].numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", help="slice, truth and prediction of the first UNETR trained here")
    args = parser.parse_args()
    models = {
        "here": here,
        "MONAI, batch norm": lambda: monai("batch"),
        "MONAI, instance norm": lambda: monai("instance"),
    }
    print(f"{args.steps} steps; each loss is the mean of the twenty steps up to there")
    marks = [args.steps * part // 4 for part in (1, 2, 3, 4)]
    print(f"{'model':<22}  seed  {'  '.join(f'at {mark:>4}' for mark in marks)}  Dice, unseen")
    scores: dict[str, list[float]] = {name: [] for name in models}
    for seed in range(args.seeds):
        for name, build in models.items():
            torch.manual_seed(seed)
            model = build()
            losses = train(model, args.steps, seed)
            scores[name].append(score(model))
            shown = "  ".join(f"{np.mean(losses[max(mark - 20, 0) : mark]):7.4f}" for mark in marks)
            print(f"{name:<22}  {seed:>4}  {shown}  {scores[name][-1]:.4f}", flush=True)
            if args.picture and name == "here" and seed == 0:
                draw(model, args.picture)
    for name in models:
        print(f"{name:<22}  mean of {args.seeds} seeds: {np.mean(scores[name]):.4f}")
