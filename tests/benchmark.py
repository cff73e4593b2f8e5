"""Measure this UNETR beside MONAI's and beside the machine's own limit, in one run.

python tests/benchmark.py [--quick] [--json FILE] [--plot FILE]

Every comparison alternates its two sides and takes the median of several rounds: compare the ratios, since seconds
belong to the machine and the minute. Peak memory is that of a process of its own, with Python and PyTorch in it.
"""

import argparse
import concurrent.futures
import gc
import importlib
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
unetr = importlib.import_module("UNETR-2D")

LAYOUT = torch.channels_last


@dataclass(frozen=True)
class Plan:
    """What is measured: image sizes, rounds, and the sizes of both networks."""

    images: tuple[int, ...] = (256, 512, 1024)
    growth: tuple[int, ...] = (256, 512, 768, 1024)
    training: int = 256
    batches: tuple[int, ...] = (1, 16)  # on a GPU
    rounds: int = 5
    sizes: dict[str, int] = field(
        default_factory=lambda: dict(hidden_dim=768, mlp_dim=3072, num_heads=12, feature_size=64)
    )


QUICK = Plan(images=(256,), growth=(256, 384), batches=(1,), rounds=2)


def build(kind: str, image: int, plan: Plan) -> nn.Module:
    torch.manual_seed(0)
    if kind == "here":
        return unetr.UNETR(unetr.UNETRConfig(image_size=image, **plan.sizes))
    from monai.networks.nets import UNETR

    sizes = {name.replace("_dim", "_size") if name == "hidden_dim" else name: size for name, size in plan.sizes.items()}
    return UNETR(3, 1, image, norm_name="batch", spatial_dims=2, **sizes)


def alternate(
    sides: dict[str, Callable[[], object]], rounds: int, sync: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Median seconds of each side, after one run of each that does not count."""
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            sync()
            start = time.perf_counter()
            side()
            sync()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def forward(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            model(x)

    return run


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    truth = (x[:, :1] > 0.5).float()

    def run() -> None:
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x), truth).backward()
        optimizer.step()

    return run


def bare_kernels(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """The model's convolutions, linear layers and attentions at their real shapes, with nothing between them."""
    calls: list[Callable[[], Tensor]] = []
    attention, inputs = F.scaled_dot_product_attention, {}

    def tensor(shape: torch.Size) -> Tensor:
        return inputs.setdefault(shape, torch.rand(shape, device=x.device))

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Linear):
            flat = tensor(args[0].flatten(0, -2).shape)
            calls.append(lambda: F.linear(flat, module.weight, module.bias))
            return
        options = dict(stride=module.stride, padding=module.padding)
        run = F.conv_transpose2d if isinstance(module, nn.ConvTranspose2d) else F.conv2d
        sides = {}
        for layout in (torch.channels_last, torch.contiguous_format):
            image = tensor(args[0].shape).contiguous(memory_format=layout)
            weight = module.weight.detach().contiguous(memory_format=layout)
            sides[layout] = lambda i=image, w=weight: run(i, w, module.bias, **options)
        faster = alternate(sides, rounds=2)
        calls.append(sides[min(faster, key=faster.get)])

    def keep_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(lambda: attention(tensor(q.shape), tensor(k.shape), tensor(v.shape)))
        return attention(q, k, v)

    hooks = [
        module.register_forward_pre_hook(keep)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    ]
    F.scaled_dot_product_attention = keep_attention
    try:
        forward(model, x)()
    finally:
        F.scaled_dot_product_attention = attention
        for hook in hooks:
            hook.remove()

    def run() -> None:
        with torch.inference_mode():
            for call in calls:
                call()

    return run


def measure_peak(work: str, kind: str, image: int, plan: Plan) -> float:
    batch = 1 if work == "forward" else 2
    model, x = build(kind, image, plan), torch.rand(batch, 3, image, image)
    if kind == "here":
        model, x = model.to(memory_format=LAYOUT), x.to(memory_format=LAYOUT)
    step = forward(model.eval(), x) if work == "forward" else training_step(model.train(), x)
    step()
    if sys.platform == "linux":  # ru_maxrss there begins at the parent's
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak(*arguments: object) -> float:
    """MiB at the peak, in a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_peak, *arguments).result()


Row = dict[str, object]


def compare(what: str, unit: str, here: float, beside: float, name: str) -> Row:
    return {"what": what, "unit": unit, "here": here, "beside": beside, "name": name, "ratio": here / beside}


def measure(plan: Plan, note: Callable[[str], None]) -> tuple[list[Row], list[Row]]:
    rows, growth = [], []
    for image in plan.images:
        note(f"forward pass, {image} x {image}")
        x = torch.rand(1, 3, image, image)
        ours = build("here", image, plan).eval().to(memory_format=LAYOUT)
        ours_x = x.to(memory_format=LAYOUT)
        sides = {
            "here": forward(ours, ours_x),
            "MONAI": forward(build("MONAI", image, plan).eval(), x),
            "MONAI, channels-last": forward(build("MONAI", image, plan).eval().to(memory_format=LAYOUT), ours_x),
            "bare kernels": bare_kernels(ours, ours_x),
        }
        seconds = alternate(sides, plan.rounds)
        del sides, ours
        rows += [compare(f"forward {image}", "s", seconds["here"], seconds[name], name) for name in [*seconds][1:]]
        note(f"peak memory, {image} x {image}")
        sizes = [peak("forward", kind, image, plan) for kind in ("here", "MONAI")]
        rows.append(compare(f"forward {image}, peak memory", "MiB", *sizes, "MONAI"))

    note(f"training step, {plan.training} x {plan.training}, batch 2")
    x = torch.rand(2, 3, plan.training, plan.training)
    ours, theirs, same = (build(kind, plan.training, plan).train() for kind in ("here", "MONAI", "MONAI"))
    sides = {
        "here": training_step(ours.to(memory_format=LAYOUT), x.to(memory_format=LAYOUT)),
        "MONAI": training_step(theirs, x),
        "MONAI, channels-last": training_step(same.to(memory_format=LAYOUT), x.to(memory_format=LAYOUT)),
    }
    seconds = alternate(sides, plan.rounds)
    del sides, ours, theirs, same
    what = f"training step {plan.training}, batch 2"
    rows += [compare(what, "s", seconds["here"], seconds[name], name) for name in [*seconds][1:]]
    sizes = [peak("training", kind, plan.training, plan) for kind in ("here", "MONAI")]
    rows.append(compare(f"training step {plan.training}, batch 2, peak memory", "MiB", *sizes, "MONAI"))

    model = build("here", plan.growth[0], plan).eval().to(memory_format=LAYOUT)
    for image in plan.growth:
        note(f"growth, {image} x {image}")
        run = forward(model, torch.rand(1, 3, image, image).to(memory_format=LAYOUT))
        seconds = alternate({"here": run}, min(plan.rounds, 3))
        memory = peak("forward", "here", image, plan)
        growth.append({"image": image, "tokens": (image // 16) ** 2, "s": seconds["here"], "MiB": memory})
    del model

    note("the whole command")
    options = [f"--{name.replace('_', '-')}={size}" for name, size in plan.sizes.items()]
    with tempfile.TemporaryDirectory() as folder:

        def call(*words: str) -> Callable[[], object]:
            quiet = dict(cwd=folder, check=True, stdout=subprocess.DEVNULL)
            return lambda: subprocess.run([sys.executable, *words], **quiet)

        sides = {
            "here": call(str(ROOT / "UNETR-2D.py"), "--no-show", *options),
            "imports": call("-c", "import torch, numpy, matplotlib, PIL"),
        }
        seconds = alternate(sides, plan.rounds)
    rows.append(compare("the whole command", "s", seconds["here"], seconds["imports"], "import of its four packages"))
    if torch.cuda.is_available():
        rows += measure_gpu(plan, note)
    return rows, growth


def matrix_rate() -> float:
    """FLOP/s of the card in bf16, by one large product."""
    a = torch.rand(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / alternate({"product": lambda: a @ a}, 20, torch.cuda.synchronize)["product"]


def measure_gpu(plan: Plan, note: Callable[[str], None]) -> list[Row]:
    from torch.utils.flop_counter import FlopCounterMode

    rows, card, rate = [], torch.cuda.get_device_name(), matrix_rate()
    for image in plan.images:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            build("here", image, plan)(torch.empty(1, 3, image, image))
        for batch in plan.batches:
            for bf16 in (False, True):
                for compiled in (False, True):
                    name = f"{card}: forward {image}, batch {batch}, {'bf16' if bf16 else 'float32'}"
                    name += ", compiled" if compiled else ""
                    note(name)
                    sides = {}
                    for kind in ("here", "MONAI"):
                        layout = LAYOUT if kind == "here" else torch.contiguous_format
                        model = build(kind, image, plan).eval().cuda().to(memory_format=layout)
                        x = torch.rand(batch, 3, image, image).cuda().to(memory_format=layout)

                        net = torch.compile(model) if compiled else model

                        def run(model=net, x=x, bf16=bf16) -> None:
                            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                                model(x)

                        sides[kind] = run
                    seconds = alternate(sides, plan.rounds, torch.cuda.synchronize)
                    row = compare(name, "s", seconds["here"], seconds["MONAI"], "MONAI")
                    row["share of the card's bf16 rate"] = counter.get_total_flops() * batch / seconds["here"] / rate
                    rows.append(row)
                    del sides, model, net
                    torch.cuda.empty_cache()
                    torch.compiler.reset()
    return rows


def processor() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def header() -> dict[str, str]:
    from monai import __version__ as monai

    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": str(torch.get_num_threads()),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, MONAI {monai}",
    }


def plot(growth: list[Row], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, unit, title in zip(axes, ("s", "MiB"), ("forward pass, seconds", "peak memory, MiB"), strict=True):
        axis.plot([row["tokens"] for row in growth], [row[unit] for row in growth], "o-")
        axis.set(xlabel="tokens", title=title, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None, plan: Plan | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 x 256 alone, in fewer rounds: under two minutes")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    parser.add_argument("--plot", metavar="FILE", help="draw how time and memory grow with the tokens")
    args = parser.parse_args(argv)
    plan = plan or (QUICK if args.quick else Plan())

    begin = time.perf_counter()

    def note(step: str) -> None:
        print(f"[{time.perf_counter() - begin:5.0f} s] {step}", file=sys.stderr, flush=True)

    about = header()
    for name, text in about.items():
        print(f"{name}: {text}")
    rows, growth = measure(plan, note)
    print("\n| what | here | beside | ratio |\n|---|---|---|---|")
    for row in rows:
        here, beside = (f"{row[side]:.{2 if row['unit'] == 's' else 0}f} {row['unit']}" for side in ("here", "beside"))
        share = row.get("share of the card's bf16 rate")
        print(
            f"| {row['what']}{f', {share:.0%} of the bf16 rate' if share else ''} | {here} | {row['name']}: {beside} | {row['ratio']:.2f} |"
        )
    print("\n| image | tokens | forward | peak memory |\n|---|---|---|---|")
    for row in growth:
        print(f"| {row['image']} x {row['image']} | {row['tokens']} | {row['s']:.2f} s | {row['MiB']:.0f} MiB |")
    if args.json:
        Path(args.json).write_text(json.dumps({**about, "rows": rows, "growth": growth}, indent=1), encoding="utf-8")
    if args.plot:
        plot(growth, args.plot)


if __name__ == "__main__":
    main()
