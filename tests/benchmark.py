"""Compare this UNETR with MONAI's UNETR and with the bare PyTorch kernels, in time and memory.

python tests/benchmark.py [--quick] [--plot FILE]

This network runs channels-last. MONAI's runs in its default memory format, contiguous, and in
channels-last. The bare kernels are the convolutions, linear layers and attentions of this network,
with nothing in between. The whole command, python UNETR-2D.py, is compared with importing its
packages.

Every round runs each side once; a first round, which does not count, warms up. Time and ratio are
medians over the rounds, the ratio with its range. Below 1, this network needs less. Seconds depend
on the machine and its load, so compare the ratios. Peak memory is that of a process of its own,
with everything that it imports. It varies by several percent from process to process.
"""

import argparse
import importlib
import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
unetr = importlib.import_module("UNETR-2D")

HERE = "here"
MONAI = "MONAI"
MONAI_CHANNELS_LAST = "MONAI, channels-last"
SIDES = (HERE, MONAI, MONAI_CHANNELS_LAST)
GROWTH_SIDES = (HERE, MONAI_CHANNELS_LAST)
DEFAULT = unetr.UNETRConfig()
KERNELS = (F.conv2d, F.conv_transpose2d, F.linear, F.scaled_dot_product_attention)

Row = tuple[str, str, str, str]  # what, here, compared with, ratio


@dataclass(frozen=True)
class Plan:
    """What is measured. Training and the command are measured at one size only."""

    images: tuple[int, ...] = (256, 512, 768, 1024)  # for the growth of time and memory
    compared: tuple[int, ...] = (256, 512, 1024)  # those of them for all comparisons
    batches: tuple[int, ...] = (1, 16)  # on a GPU
    rounds: int = 5
    config: unetr.UNETRConfig = DEFAULT


@dataclass(frozen=True)
class Size:
    """Time and peak memory of a forward pass at one image size, for each of GROWTH_SIDES."""

    image: int
    tokens: int
    seconds: dict[str, float]
    memory: dict[str, float]  # in MiB


# What runs


def build(
    side: str, config: unetr.UNETRConfig, batch: int, device: str = "cpu"
) -> tuple[nn.Module, Tensor]:
    """A network and a batch of random images, both in the memory format of that side."""
    torch.manual_seed(0)
    if side == HERE:
        model = unetr.UNETR(config)
    else:
        from monai.networks.nets import UNETR  # here, since it counts in the peak memory

        model = UNETR(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            img_size=config.size,
            feature_size=config.feature_size,
            hidden_size=config.hidden_dim,
            mlp_dim=config.mlp_dim,
            num_heads=config.num_heads,
            norm_name="batch",
            spatial_dims=2,
        )
    images = torch.rand(batch, config.in_channels, *config.size)
    memory_format = torch.contiguous_format if side == MONAI else torch.channels_last
    model = model.to(device, memory_format=memory_format)
    return model, images.to(device, memory_format=memory_format)


def predict(model: nn.Module, images: Tensor, bf16: bool = False) -> None:
    device = images.device.type
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
        model(images)


def train(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.binary_cross_entropy_with_logits(model(images), images[:, :1]).backward()
    optimizer.step()


def forward_pass(side: str, config: unetr.UNETRConfig) -> Callable:
    """A function that runs one forward pass."""
    model, images = build(side, config, batch=1)
    return partial(predict, model.eval(), images)


def training_step(side: str, config: unetr.UNETRConfig) -> Callable:
    """A function that runs one training step."""
    model, images = build(side, config, batch=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return partial(train, model.train(), images, optimizer)


class KernelRecorder(TorchFunctionMode):
    """Records the calls of KERNELS. Inputs of the same shape share one tensor, to save memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable] = []
        self.inputs: dict[tuple, Tensor] = {}

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if function in KERNELS:
            x, *others = args
            x = self.inputs.setdefault((x.shape, x.stride()), x)
            self.calls.append(partial(function, x, *others, **kwargs))
        return function(*args, **kwargs)


def record_kernels(config: unetr.UNETRConfig) -> list[Callable]:
    """The calls of KERNELS in a forward pass of this network."""
    run = forward_pass(HERE, config)
    with KernelRecorder() as recorder:
        run()
    return recorder.calls


def run_kernels(calls: list[Callable]) -> None:
    with torch.inference_mode():
        for call in calls:
            call()


# How it is measured


def alternate(measurements: dict[str, Callable], rounds: int) -> dict[str, list]:
    """What the measurement of each side returns in each round, after a round to warm up."""
    results = {side: [] for side in measurements}
    for _ in range(1 + rounds):
        for side, measure in measurements.items():
            results[side].append(measure())
    return {side: values[1:] for side, values in results.items()}


def time_run(run: Callable) -> float:
    """Seconds that run() takes, on the GPU until it has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_runs(runs: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round."""
    return alternate({side: partial(time_run, run) for side, run in runs.items()}, rounds)


# On Linux, the peak of a process is at least the memory of the process that started it. This one
# is small.
STARTER = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measure_process(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory in MiB of `python *arguments`."""
    command = [sys.executable, "-c", STARTER, sys.executable, *arguments]
    seconds, peak = subprocess.check_output(command, cwd=TESTS).split()
    units = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, otherwise KiB
    return float(seconds), int(peak) / units


def measure_peaks(
    prepare: Callable, sides: tuple[str, ...], config: unetr.UNETRConfig, repeats: int = 1
) -> dict[str, list[float]]:
    """MiB at the peak of a process that calls prepare(side, config)() repeatedly, by side."""
    peaks = {}
    for side in sides:
        code = f"""
import benchmark
run = benchmark.{prepare.__name__}({side!r}, benchmark.unetr.{config})
for _ in range({repeats}):
    run()
"""
        _, peak = measure_process("-c", code)
        peaks[side] = [peak]
    return peaks


# What is measured


def note(text: str) -> None:
    """Show what is being measured, on standard error."""
    print(text, file=sys.stderr, flush=True)


def show(value: float, unit: str) -> str:
    return f"{value:.0f} MiB" if unit == "MiB" else f"{value:.3g} s"


def compare(what: str, unit: str, measured: dict[str, list[float]]) -> list[Row]:
    """The rows that compare this network with each of the other sides."""
    rows = []
    here = measured[HERE]
    for side, there in measured.items():
        if side == HERE:
            continue
        ratios = [a / b for a, b in zip(here, there, strict=True)]
        ratio = f"{median(ratios):.2f}"
        if len(ratios) > 1:
            ratio += f" ({min(ratios):.2f}-{max(ratios):.2f})"
        compared_with = f"{side}: {show(median(there), unit)}"
        rows.append((what, show(median(here), unit), compared_with, ratio))
    return rows


def measure_forward(plan: Plan) -> tuple[list[Row], list[Size]]:
    """Forward passes: the rows of the comparisons, and the growth with the image size."""
    rows, growth = [], []
    for image in plan.images:
        what = f"forward {image}"
        note(what)
        config = replace(plan.config, image_size=image)
        compared = image in plan.compared
        sides = SIDES if compared else GROWTH_SIDES
        runs = {side: forward_pass(side, config) for side in sides}
        if compared:
            runs["bare kernels"] = partial(run_kernels, record_kernels(config))
        seconds = time_runs(runs, plan.rounds)
        runs.clear()  # frees the memory for the processes that follow
        memory = measure_peaks(forward_pass, sides, config)
        if compared:
            rows += compare(what, "s", seconds)
            rows += compare(f"{what}, peak memory", "MiB", memory)

        size = Size(
            image=image,
            tokens=(image // config.patch_size) ** 2,
            seconds={side: median(seconds[side]) for side in GROWTH_SIDES},
            memory={side: median(memory[side]) for side in GROWTH_SIDES},
        )
        growth.append(size)
    return rows, growth


def measure_training(plan: Plan) -> list[Row]:
    config = replace(plan.config, image_size=plan.images[0])
    what = f"training step {config.image_size}, batch 2"
    note(what)
    runs = {side: training_step(side, config) for side in SIDES}
    seconds = time_runs(runs, plan.rounds)
    runs.clear()  # frees the memory for the processes that follow
    # Two steps: AdamW allocates its state at the end of the first.
    memory = measure_peaks(training_step, SIDES, config, repeats=2)
    return compare(what, "s", seconds) + compare(f"{what}, peak memory", "MiB", memory)


def measure_command(plan: Plan) -> list[Row]:
    what = "whole command"
    note(what)
    height, width = plan.config.size
    settings = asdict(plan.config) | {"image_size": f"{height}x{width}"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    script = str(TESTS.parent / "UNETR-2D.py")
    with tempfile.TemporaryDirectory() as folder:
        output = f"--output={folder}/figure.png"
        command = [script, output, "--no-show", "--device=cpu", *options]
        sides = {
            HERE: partial(measure_process, *command),
            "imports": partial(measure_process, "-c", "import torch, numpy, matplotlib, PIL"),
        }
        measured = alternate(sides, plan.rounds)
    seconds, memory = {}, {}
    for side, pairs in measured.items():
        seconds[side] = [pair[0] for pair in pairs]
        memory[side] = [pair[1] for pair in pairs]
    return compare(what, "s", seconds) + compare(f"{what}, peak memory", "MiB", memory)


def measure_bf16_rate() -> float:
    """FLOP/s of the GPU in a product of two large matrices."""
    side = 8192
    a = torch.rand(side, side, device="cuda", dtype=torch.bfloat16)
    seconds = time_runs({"product": partial(torch.matmul, a, a)}, rounds=20)
    return 2 * side**3 / median(seconds["product"])


def count_flop(config: unetr.UNETRConfig, batch: int) -> int:
    """Floating-point operations of a forward pass of this network."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unetr.UNETR(config)(torch.empty(batch, config.in_channels, *config.size))
    return counter.get_total_flops()


def time_on_gpu(
    config: unetr.UNETRConfig, batch: int, bf16: bool, compiled: bool, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a forward pass on the GPU in each round."""
    torch.compiler.reset()
    runs = {}
    for side in (HERE, MONAI):
        model, images = build(side, config, batch, device="cuda")
        model.eval()
        if compiled:
            model = torch.compile(model)
        runs[side] = partial(predict, model, images, bf16)
    return time_runs(runs, rounds)


def measure_gpu(plan: Plan) -> list[Row]:
    """Forward passes on the GPU, in two precisions, eager and compiled."""
    rows = []
    rate = measure_bf16_rate()
    cases = itertools.product(plan.compared, plan.batches, (False, True), (False, True))
    for image, batch, bf16, compiled in cases:
        precision = "bf16" if bf16 else "float32"
        what = f"{torch.cuda.get_device_name()}: forward {image}, batch {batch}, {precision}"
        if compiled:
            what += ", compiled"
        note(what)
        config = replace(plan.config, image_size=image)
        try:
            seconds = time_on_gpu(config, batch, bf16, compiled, plan.rounds)
        except torch.OutOfMemoryError:
            rows.append((what, "", "out of memory", ""))
        else:
            share = count_flop(config, batch) / median(seconds[HERE]) / rate
            rows += compare(f"{what}, {share:.0%} of the bf16 rate", "s", seconds)
    return rows


# How it is reported


def print_machine() -> None:
    """Print what the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, platform.processor() does not name the model
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(r"model name\s*:\s*(.+)", text)
    processor = match[1] if match else platform.processor()
    print(f"date: {time.strftime('%Y-%m-%d')}")
    print(f"machine: {processor}, {os.cpu_count()} cores, {platform.system()}")
    print(f"threads: {torch.get_num_threads()}")
    print(f"versions: Python {platform.python_version()}", end="")
    print(f", torch {torch.__version__}, MONAI {version('monai')}")


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a Markdown table."""
    print(f"\n| {' | '.join(header)} |")
    print("|---" * len(header) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def print_growth(growth: list[Size]) -> None:
    rows = []
    for size in growth:
        seconds = [show(size.seconds[side], "s") for side in GROWTH_SIDES]
        memory = [show(size.memory[side], "MiB") for side in GROWTH_SIDES]
        rows.append((f"{size.image} x {size.image}", str(size.tokens), *seconds, *memory))
    times = [f"time {side}" for side in GROWTH_SIDES]
    memories = [f"memory {side}" for side in GROWTH_SIDES]
    print_table(("image", "tokens", *times, *memories), rows)


def plot(growth: list[Size], path: str) -> None:
    """Plot time and peak memory of a forward pass against the number of tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    tokens = [size.tokens for size in growth]
    lines = ((HERE, "this network", "o-"), (MONAI_CHANNELS_LAST, MONAI_CHANNELS_LAST, "s-"))
    for side, label, style in lines:
        left.loglog(tokens, [size.seconds[side] for size in growth], style, label=label)
        right.loglog(tokens, [size.memory[side] for size in growth], style, label=label)
    per_token = growth[0].seconds[HERE] / growth[0].tokens
    guide = [per_token * count for count in tokens]
    left.loglog(tokens, guide, "k:", label="proportional to tokens")

    left.set(title="Time of a forward pass", ylabel="time (s)")
    right.set(title="Peak memory of a forward pass", ylabel="peak memory (MiB)")
    for axis in (left, right):
        axis.set(xlabel="number of tokens", xticks=tokens, xticklabels=tokens)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main(argv: list[str] | None = None, plan: Plan | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="256 x 256 only, in two rounds")
    parser.add_argument("--plot", metavar="FILE", help="plot the growth of time and memory")
    args = parser.parse_args(argv)
    if plan is None:
        plan = Plan()
        if args.quick:
            plan = Plan(images=(256,), compared=(256,), batches=(1,), rounds=2)

    print_machine()
    rows, growth = measure_forward(plan)
    rows += measure_training(plan)
    rows += measure_command(plan)
    if torch.cuda.is_available():
        rows += measure_gpu(plan)
    print_table(("what", "here", "compared with", "ratio"), rows)
    print_growth(growth)
    if args.plot:
        plot(growth, args.plot)


if __name__ == "__main__":
    main()
