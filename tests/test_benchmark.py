"""The benchmark runs at toy sizes and prints a row for everything that it promises to measure."""

import re

import benchmark
from torch import nn

CONFIG = benchmark.unetr.UNETRConfig(32, hidden_dim=12, num_heads=2, mlp_dim=12, feature_size=2)


def test_every_promised_row_is_printed(tmp_path, capsys):
    plan = benchmark.Plan(images=(32, 64), compared=(32,), batches=(1,), rounds=2, config=CONFIG)
    benchmark.main(["--plot", str(tmp_path / "growth.png")], plan)
    printed = capsys.readouterr().out.splitlines()
    rows = [line[2:-2].split(" | ") for line in printed if line.startswith("| ")]
    assert {
        ("forward 32", "MONAI"),
        ("forward 32", "MONAI, channels-last"),
        ("forward 32", "bare kernels"),
        ("forward 32, peak memory", "MONAI"),
        ("training step 32, batch 2", "MONAI"),
        ("training step 32, batch 2", "MONAI, channels-last"),
        ("training step 32, batch 2, peak memory", "MONAI"),
        ("whole command", "imports"),
        ("whole command, peak memory", ""),
        ("32 x 32", "4"),
        ("64 x 64", "16"),
    } <= {(row[0], row[2 if len(row) == 4 else 1].split(":")[0]) for row in rows}
    figures = [float(figure) for line in printed for figure in re.findall(r"([\d.e-]+) (?:s|MiB) ", line)]
    assert len(figures) >= 8 * 2 + 1 + 2 * 4 and min(figures) > 0
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_bare_kernels_are_those_of_the_network():
    model = benchmark.unetr.UNETR(CONFIG)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    assert len(benchmark.bare_kernels(CONFIG)) == len(layers) + CONFIG.num_layers  # one attention in each layer
