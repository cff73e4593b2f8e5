"""The benchmark runs at toy sizes and prints a row for everything that it promises to measure."""

import benchmark
from torch import nn

CONFIG = benchmark.unetr.UNETRConfig(32, hidden_dim=12, num_heads=2, mlp_dim=12, feature_size=2)


def read_table(printed, first_column):
    """The rows of the Markdown table with this first column, each a list of cells."""
    table = printed.split(f"\n| {first_column} |")[1].split("\n\n")[0]
    _header, _rule, *lines = table.splitlines()
    return [line.strip("| ").split(" | ") for line in lines]


def read_number(cell):
    """'MONAI: 0.98 s' -> 0.98"""
    value, unit = cell.split()[-2:]
    assert unit in ("s", "MiB")
    return float(value)


def test_every_promised_row_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes it starts: faster at toy sizes
    plan = benchmark.Plan(images=(32, 64), compared=(32,), batches=(1,), rounds=1, config=CONFIG)
    benchmark.main(["--plot", str(tmp_path / "growth.png")], plan)
    printed = capsys.readouterr().out

    comparisons = set()
    for what, here, there, _ratio in read_table(printed, "what"):
        comparisons.add((what, there.split(":")[0]))
        assert read_number(here) > 0
        assert read_number(there) > 0
    promised = {
        ("forward 32", "MONAI"),
        ("forward 32", "MONAI, channels-last"),
        ("forward 32", "bare kernels"),
        ("forward 32, peak memory", "MONAI"),
        ("forward 32, peak memory", "MONAI, channels-last"),
        ("training step 32, batch 2", "MONAI"),
        ("training step 32, batch 2", "MONAI, channels-last"),
        ("training step 32, batch 2, peak memory", "MONAI"),
        ("training step 32, batch 2, peak memory", "MONAI, channels-last"),
        ("whole command", "imports"),
        ("whole command, peak memory", "imports"),
    }
    assert promised <= comparisons  # a GPU adds more

    sizes = []
    for image, tokens, *figures in read_table(printed, "image"):
        sizes.append((image, tokens))
        assert len(figures) == 4
        assert all(read_number(figure) > 0 for figure in figures)
    assert sizes == [("32 x 32", "4"), ("64 x 64", "16")]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_bare_kernels_are_those_of_the_network():
    kinds = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
    modules = benchmark.unetr.UNETR(CONFIG).modules()
    layers = [module for module in modules if isinstance(module, kinds)]
    attentions = CONFIG.num_layers
    assert len(benchmark.record_kernels(CONFIG)) == len(layers) + attentions
