"""The benchmark runs at toy sizes and prints a row for everything that it promises to measure."""

import re

import benchmark
from torch import nn

CONFIG = benchmark.UNETRConfig(
    image_size=(32, 32), hidden_dim=12, num_heads=2, mlp_dim=12, feature_size=2
)


def test_every_promised_row_is_printed(capsys):
    benchmark.measure(CONFIG, sizes=(32,), rounds=2, processes=1, device="cpu")
    networks, others = capsys.readouterr().out.split("\n\n")
    rows = [row.strip("| ").split(" | ") for row in networks.splitlines()]
    assert rows[0][3:7] == list(benchmark.SIDES)
    assert [row[:3] for row in rows[2:]] == [
        ["forward 32", "4", "time (s)"],
        ["forward 32", "4", "peak memory (MiB)"],
        ["training step 32, batch 2", "4", "time (s)"],
        ["training step 32, batch 2", "4", "peak memory (MiB)"],
    ]
    assert re.findall(r"^\| (.+? \| .+?) \|.*\| (.+?):", others, flags=re.MULTILINE) == [
        ("forward 32, channels-last | time (s)", "bare kernels"),
        ("whole command | time (s)", "imports"),
        ("whole command | peak memory (MiB)", "imports"),
    ]


def test_bare_kernels_are_those_of_the_network():
    run = benchmark.prepare("UNETR-2D, channels-last", CONFIG, training=False, device="cpu")
    with benchmark.KernelRecorder() as recorder:
        run()
    layers = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
    count = sum(isinstance(module, layers) for module in benchmark.unetr.UNETR(CONFIG).modules())
    assert len(recorder.calls) == count + CONFIG.num_layers  # an attention in each layer
