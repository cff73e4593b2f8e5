"""Compare this UNETR with MONAI's UNETR, and with the bare PyTorch kernels, in time and in memory.

python tests/benchmark.py [--quick] [--plot FILE]

This network runs channels-last; MONAI's runs in its default memory format (contiguous), and channels-last. The bare
kernels are this network's convolutions, linear layers, and attentions with nothing in between. The sides alternate in
each round; time and ratio are medians over the rounds, the ratio with its range. Seconds depend on the machine and its
load, so compare the ratios: below 1, this network needs less. Peak memory is that of a process of its own.
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

Config, DEFAULT = unetr.UNETRConfig, unetr.UNETRConfig()
SIDES = ("here", "MONAI", "MONAI, channels-last")
KERNELS = (F.conv2d, F.conv_transpose2d, F.linear, F.scaled_dot_product_attention)
note = partial(print, file=sys.stderr)
METER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@dataclass(frozen=True)
class Plan:
    """What is measured. Training and the command are measured at one size only."""

    images: tuple[int, ...] = (256, 512, 768, 1024)  # for the growth of time and memory
    compared: tuple[int, ...] = (256, 512, 1024)  # those of them for all comparisons
    batches: tuple[int, ...] = (1, 16)  # on a GPU
    rounds: int = 5
    config: Config = DEFAULT


def build(side: str, config: Config, batch: int, device: str = "cpu") -> tuple[nn.Module, Tensor]:
    """A network and a batch of random images, both in that side's memory format."""
    torch.manual_seed(0)
    if side == "here":
        model = unetr.UNETR(config)
    else:
        import monai  # not in the processes of this network, whose peak memory is measured too

        sizes = dict(feature_size=config.feature_size, hidden_size=config.hidden_dim)
        sizes |= dict(mlp_dim=config.mlp_dim, num_heads=config.num_heads)
        model = monai.networks.nets.UNETR(3, 1, config.image_size, norm_name="batch", spatial_dims=2, **sizes)
    memory_format = torch.contiguous_format if side == "MONAI" else torch.channels_last
    x = torch.rand(batch, 3, *config.size)
    return model.to(device, memory_format=memory_format), x.to(device, memory_format=memory_format)


def predict(model: nn.Module, x: Tensor, bf16: bool = False) -> None:
    with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        model(x)


def train(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.binary_cross_entropy_with_logits(model(x), x[:, :1]).backward()
    optimizer.step()


def forward_pass(side: str, config: Config) -> Callable:
    model, x = build(side, config, batch=1)
    return partial(predict, model.eval(), x)


def training_step(side: str, config: Config) -> Callable:
    model, x = build(side, config, batch=2)
    return partial(train, model.train(), x, torch.optim.AdamW(model.parameters(), lr=1e-4))


class KernelRecorder(TorchFunctionMode):
    """Records the calls of KERNELS. Inputs of the same shape share one tensor, to save memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.inputs = [], {}

    def __torch_function__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        if function in KERNELS:
            x = self.inputs.setdefault((args[0].shape, args[0].stride()), args[0])
            self.calls.append(partial(function, x, *args[1:], **(kwargs or {})))
        return function(*args, **(kwargs or {}))


def bare_kernels(config: Config) -> list[Callable]:
    with KernelRecorder() as recorder:
        forward_pass("here", config)()
    return recorder.calls


def run_all(calls: list[Callable]) -> None:
    with torch.inference_mode():
        for call in calls:
            call()


def alternate(runs: dict[str, Callable], rounds: int, sync: Callable = lambda: None) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one round to warm up."""
    seconds = {side: [] for side in runs}
    for _ in range(rounds + 1):
        for side, run in runs.items():
            sync()
            start = time.perf_counter()
            run()
            sync()
            seconds[side].append(time.perf_counter() - start)
    return {side: values[1:] for side, values in seconds.items()}


def peak(*words: str) -> float:
    """MiB at the peak of `python *words`. A small process starts it, since Linux counts the starting process as well."""
    printed = subprocess.check_output([sys.executable, "-c", METER, sys.executable, *words], cwd=TESTS)
    return int(printed) / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB on Linux


def peaks(prepare: Callable, sides: tuple[str, ...], config: Config) -> dict[str, list[float]]:
    """MiB at the peak of prepare(side, config)() for each side."""
    code = f"import benchmark; benchmark.{prepare.__name__}({{!r}}, benchmark.unetr.{config})()"
    return {side: [peak("-c", code.format(side))] for side in sides}


def show(value: float, unit: str) -> str:
    return f"{value:.0f} MiB" if unit == "MiB" else f"{value:.3g} s"


def compare(what: str, unit: str, measured: dict[str, list[float]]) -> list[tuple]:
    """The rows that compare the first side with each of the others."""
    rows, ((_, here), *others) = [], measured.items()
    for side, values in others:
        ratios = [a / b for a, b in zip(here, values, strict=True)]
        spread = f" ({min(ratios):.2f}-{max(ratios):.2f})" if len(ratios) > 1 else ""
        shown = [show(median(seen), unit) for seen in (here, values)]
        rows.append((what, shown[0], f"{side}: {shown[1]}", f"{median(ratios):.2f}{spread}"))
    return rows


def measure_forward(plan: Plan) -> tuple[list[tuple], list[tuple]]:
    """The rows of the comparisons, and of the growth: image, tokens, two times, two peaks."""
    rows, growth = [], []
    for image in plan.images:
        note(f"forward pass, {image} x {image}")
        config, compared = replace(plan.config, image_size=image), image in plan.compared
        sides = SIDES if compared else SIDES[::2]
        runs = {side: forward_pass(side, config) for side in sides}
        if compared:
            runs["bare kernels"] = partial(run_all, bare_kernels(config))
        seconds = alternate(runs, plan.rounds)
        del runs
        memory = peaks(forward_pass, sides, config)
        if compared:
            rows += compare(f"forward {image}", "s", seconds)
            rows += compare(f"forward {image}, peak memory", "MiB", {side: memory[side] for side in SIDES[:2]})
        both = [median(measured[side]) for measured in (seconds, memory) for side in SIDES[::2]]
        growth.append((image, (image // config.patch_size) ** 2, *both))
    return rows, growth


def measure_training(plan: Plan) -> list[tuple]:
    config = replace(plan.config, image_size=plan.images[0])
    what = f"training step {config.image_size}, batch 2"
    note(what)
    seconds = alternate({side: training_step(side, config) for side in SIDES}, plan.rounds)
    memory = peaks(training_step, SIDES[:2], config)
    return compare(what, "s", seconds) + compare(f"{what}, peak memory", "MiB", memory)


def measure_command(plan: Plan) -> list[tuple]:
    note("whole command")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(plan.config).items()]
    with tempfile.TemporaryDirectory() as folder:
        command = [f"{TESTS.parent}/UNETR-2D.py", "--no-show", f"--output={folder}/figure.png", *options]
        sides = {"here": command, "imports": ["-c", "import torch, numpy, matplotlib, PIL"]}
        start = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
        runs = {side: partial(start, [sys.executable, *words]) for side, words in sides.items()}
        rows = compare("whole command", "s", alternate(runs, plan.rounds))
        return [*rows, ("whole command, peak memory", show(peak(*command), "MiB"), "", "")]


def measure_gpu(plan: Plan) -> list[tuple]:
    rows, card, modes = [], torch.cuda.get_device_name(), (False, True)
    a = torch.rand(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = alternate({"bf16": lambda: a @ a}, 20, torch.cuda.synchronize)
    rate = 2 * 8192**3 / median(product["bf16"])  # FLOP/s of the card
    for image, batch, bf16, compiled in itertools.product(plan.compared, plan.batches, modes, modes):
        what = f"{card}: forward {image}, batch {batch}, {'bf16' if bf16 else 'float32'}{', compiled' * compiled}"
        note(what)
        torch.compiler.reset()
        config, runs = replace(plan.config, image_size=image), {}
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            unetr.UNETR(config)(torch.empty(batch, 3, image, image))
        for side in SIDES[:2]:
            model, x = build(side, config, batch, "cuda")
            runs[side] = partial(predict, torch.compile(model.eval()) if compiled else model.eval(), x, bf16)
        try:
            seconds = alternate(runs, plan.rounds, torch.cuda.synchronize)
        except torch.OutOfMemoryError:
            rows.append((what, "", "out of memory", ""))
        else:
            share = counter.get_total_flops() / median(seconds["here"]) / rate
            rows += compare(f"{what}, {share:.0%} of the bf16 rate", "s", seconds)
    return rows


def plot(growth: list[tuple], path: str) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.8), layout="constrained")
    _, tokens, *columns = zip(*growth, strict=True)
    titles = ("forward pass: time in seconds", "forward pass: peak memory in MiB")
    for axis, title, here, theirs in zip(axes, titles, columns[::2], columns[1::2], strict=True):
        axis.loglog(tokens, here, "o-", label="this network")
        axis.loglog(tokens, theirs, "s-", label=SIDES[2])
        axis.loglog(tokens, [here[0] * n / tokens[0] for n in tokens], "k:", label="slope 1 (proportional)")
        axis.set(title=title, xlabel="tokens", xticks=tokens, xticklabels=tokens)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main(argv: list[str] | None = None, plan: Plan | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 x 256 only, in two rounds: less than two minutes")
    parser.add_argument("--plot", metavar="FILE", help="plot time and memory against the number of tokens")
    args = parser.parse_args(argv)
    plan = plan or (Plan((256,), (256,), batches=(1,), rounds=2) if args.quick else Plan())
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, platform.processor() does not name the model
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    print(f"date: {time.strftime('%Y-%m-%d')}")
    print(f"machine: {model[1] if model else platform.processor()}, {platform.system()}, {os.cpu_count()} cores")
    print(f"threads: {torch.get_num_threads()}")
    print(f"versions: Python {platform.python_version()}, torch {torch.__version__}, MONAI {version('monai')}")
    rows, growth = measure_forward(plan)
    rows += measure_training(plan) + measure_command(plan)
    if torch.cuda.is_available():
        rows += measure_gpu(plan)
    print("\n| what | here | compared with | ratio |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print("\n| image | tokens | time here | time MONAI | memory here | memory MONAI |\n|---|---|---|---|---|---|")
    for image, tokens, *values in growth:
        print(f"| {image} x {image} | {tokens} | {' | '.join(map(show, values, ('s', 's', 'MiB', 'MiB')))} |")
    if args.plot:
        plot(growth, args.plot)


if __name__ == "__main__":
    main()
