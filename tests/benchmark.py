"""Compare this UNETR with MONAI's UNETR and with the bare PyTorch kernels, in time and memory.

python tests/benchmark.py [--device DEVICE] [--quick]

Both networks run in both memory formats, contiguous (PyTorch's default) and channels-last. The bare
kernels are the convolutions, linear layers and attentions of this network in channels-last, with
nothing in between. The whole command, python UNETR-2D.py, is compared with importing its packages.

Each of five rounds runs all sides, first to warm up, then timed. Times are medians over the rounds;
a ratio is the median and the range of the ratios in each round. That of the networks compares the
better format of each. Below 1, this network needs less. Times depend on the machine and its load,
so compare the ratios.

Peak memory is the range over three new processes: of the whole process, with everything that it
imports, on the CPU; of its tensors on another device. The whole command also runs three times.
"""

import argparse
import importlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.benchmark import Timer

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
unetr = importlib.import_module("UNETR-2D")
UNETRConfig = unetr.UNETRConfig


def build_monai(config: UNETRConfig, norm_name: str = "batch") -> nn.Module:
    """MONAI's UNETR of the same sizes."""
    from monai.networks.nets import UNETR  # here, since it counts in the peak memory

    return UNETR(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        img_size=config.image_size,
        feature_size=config.feature_size,
        hidden_size=config.hidden_dim,
        mlp_dim=config.mlp_dim,
        num_heads=config.num_heads,
        norm_name=norm_name,
        spatial_dims=2,
    )


SIDES = {
    "UNETR-2D, contiguous": (unetr.UNETR, torch.contiguous_format),
    "UNETR-2D, channels-last": (unetr.UNETR, torch.channels_last),
    "MONAI, contiguous": (build_monai, torch.contiguous_format),
    "MONAI, channels-last": (build_monai, torch.channels_last),
}
KERNELS = (F.conv2d, F.conv_transpose2d, F.linear, F.scaled_dot_product_attention)
TIME, MEMORY = "time (s)", "peak memory (MiB)"


def prepare(side: str, config: UNETRConfig, training: bool, device: str) -> Callable:
    """A function that runs a forward pass of one image, or a training step of two."""
    torch.manual_seed(0)
    build, memory_format = SIDES[side]
    model = build(config).train(training).to(device, memory_format=memory_format)
    images = torch.rand(2 if training else 1, config.in_channels, *config.image_size)
    images = images.to(device, memory_format=memory_format)

    def predict() -> None:
        with torch.inference_mode():
            model(images)

    if not training:
        return predict
    # Not above: creating an optimizer alone needs 70 MiB, for the modules that it imports.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def train() -> None:
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(images), images[:, :1]).backward()
        optimizer.step()

    return train


class KernelRecorder(TorchFunctionMode):
    """Records the calls of KERNELS."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        call = partial(function, *args, **(kwargs or {}))
        if function in KERNELS:
            self.calls.append(call)
        return call()

    def run(self) -> None:
        """Call them again."""
        with torch.inference_mode():
            for call in self.calls:
                call()


def time_sides(config: UNETRConfig, training: bool, device: str, rounds: int) -> dict[str, list]:
    """Seconds of each side, and of the bare kernels of a forward pass, in each round."""
    runs = {side: prepare(side, config, training, device) for side in SIDES}
    if not training:
        with KernelRecorder() as recorder:
            runs["UNETR-2D, channels-last"]()
        runs["bare kernels"] = recorder.run
    seconds = {side: [] for side in runs}
    for _ in range(rounds):
        for side, run in runs.items():
            # It runs once or more to warm up, and waits for an accelerator to finish.
            timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
            seconds[side].append(timer.blocked_autorange().median)
    return seconds


# On Linux, the peak of a process is at least the memory of the process that started it. This one
# is small.
STARTER = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measure_process(*arguments: str | Path) -> tuple[float, float, list[str]]:
    """Seconds, peak memory in MiB and printed lines of `python *arguments`."""
    command = [sys.executable, "-c", STARTER, sys.executable, *arguments]
    *lines, last = subprocess.check_output(command, cwd=TESTS, text=True).splitlines()
    seconds, peak = last.split()
    units = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, otherwise KiB
    return float(seconds), int(peak) / units, lines


def measure_peak(side: str, config: UNETRConfig, training: bool, device: str) -> float:
    """Peak memory in MiB of one side: of a new process, or of its tensors on an accelerator."""
    code = f"""
import torch
from benchmark import UNETRConfig, prepare
run = prepare({side!r}, {config}, {training}, {device!r})
for _ in range({2 if training else 1}):  # AdamW allocates its state at the end of the first step
    run()
if {device!r} != "cpu":
    print(torch.accelerator.max_memory_allocated() / 2**20)
"""
    _, peak, lines = measure_process("-c", code)
    return peak if device == "cpu" else float(lines[-1])


def print_machine(device: str = "cpu") -> None:
    """Print what the measurements depend on."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, platform.processor() does not name the model
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    print(f"date: {time.strftime('%Y-%m-%d')}")
    print(f"processor: {name[1] if name else platform.processor()}, {os.cpu_count()} cores", end="")
    print(f", {torch.get_num_threads()} threads, AVX-512: {'yes' if 'avx512f' in text else 'no'}")
    if device != "cpu":
        print(f"device: {torch.get_device_module(device).get_device_name()}")
    packages = f"torch {torch.__version__}, MONAI {version('monai')}"
    print(f"versions: Python {platform.python_version()}, {packages}\n")


def print_row(*cells: object) -> None:
    """Print a row of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def show(quantity: str, values: list[float]) -> str:
    """The median of times, or the range of peak memories."""
    if quantity == TIME:
        return f"{median(values):.3g}"
    return f"{min(values):.0f}-{max(values):.0f}"


def show_ratio(ours: list[float], theirs: list[float]) -> str:
    """The median and the range of the ratios in each round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def measure(config: UNETRConfig, sizes: tuple, rounds: int, processes: int, device: str) -> None:
    """Measure everything, and print a table of the networks and one of the other comparisons."""
    print_row("case", "tokens", "quantity", *SIDES, "ratio")
    print_row(*["---"] * 8)
    comparisons = []
    for size, training in [*((size, False) for size in sizes), (sizes[0], True)]:
        case = f"training step {size}, batch 2" if training else f"forward {size}"
        sized = replace(config, image_size=(size, size))
        seconds = time_sides(sized, training, device, rounds)
        if not training:
            pair = [seconds["UNETR-2D, channels-last"], seconds.pop("bare kernels")]
            comparisons.append((f"{case}, channels-last", TIME, "bare kernels", *pair))
        peaks = {side: [] for side in SIDES}
        for side in [*SIDES] * processes:
            peaks[side].append(measure_peak(side, sized, training, device))
        for quantity, measured in [(TIME, seconds), (MEMORY, peaks)]:
            values = list(measured.values())  # in the order of SIDES
            cells = [show(quantity, x) for x in values]
            ratio = show_ratio(min(values[:2], key=median), min(values[2:], key=median))
            print_row(case, (size // config.patch_size) ** 2, quantity, *cells, ratio)

    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--output={folder}/figure.png", "--no-show", "--device=cpu"]
        for _ in range(processes):
            ours.append(measure_process(TESTS.parent / "UNETR-2D.py", *options))
            theirs.append(measure_process("-c", "import torch, numpy, matplotlib, PIL"))
    for i, quantity in enumerate([TIME, MEMORY]):
        pair = [run[i] for run in ours], [run[i] for run in theirs]
        comparisons.append(("whole command", quantity, "imports", *pair))

    print()
    print_row("case", "quantity", "UNETR-2D", "compared with", "ratio")
    print_row(*["---"] * 5)
    for case, quantity, name, here, there in comparisons:
        cells = (show(quantity, here), f"{name}: {show(quantity, there)}", show_ratio(here, there))
        print_row(case, quantity, *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="where to run, such as cuda (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="256 x 256 only, in two rounds")
    args = parser.parse_args()

    print_machine(args.device)
    sizes, rounds = ((256,), 2) if args.quick else ((256, 512, 768, 1024), 5)
    measure(UNETRConfig(), sizes, rounds, processes=3, device=args.device)


if __name__ == "__main__":
    main()
