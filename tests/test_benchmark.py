"""The benchmark runs, at toy sizes, and prints what it says. Nothing is asserted of the time that anything takes."""

import json

import benchmark


def test_benchmark_at_toy_sizes(tmp_path, capsys):
    sizes = dict(hidden_dim=12, mlp_dim=12, num_heads=2, feature_size=2)
    toy = benchmark.Plan(images=(32,), growth=(32, 64), training=32, batches=(1,), rounds=1, sizes=sizes)
    benchmark.main(["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")], toy)
    printed, progress = capsys.readouterr()
    result = json.loads((tmp_path / "b.json").read_text())
    assert {"date", "machine", "threads", "versions"} < set(result)
    rows = {(row["what"], row["name"]): row for row in result["rows"]}
    cpu = {
        ("forward 32", "MONAI"),
        ("forward 32", "MONAI, channels-last"),
        ("forward 32", "bare kernels"),
        ("forward 32, peak memory", "MONAI"),
        ("training step 32, batch 2", "MONAI"),
        ("training step 32, batch 2", "MONAI, channels-last"),
        ("training step 32, batch 2, peak memory", "MONAI"),
        ("the whole command", "import of its four packages"),
    }
    assert cpu <= set(rows)
    for (what, name), row in rows.items():
        assert row["here"] > 0 and row["beside"] > 0 and row["ratio"] == row["here"] / row["beside"]
        assert f"| {what}" in printed and f"| {name}: " in printed
    assert [row["tokens"] for row in result["growth"]] == [4, 16]
    assert progress.count("forward pass, 32 x 32") == 1
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_bare_kernels_are_those_of_the_network():
    plan = benchmark.Plan(sizes=dict(hidden_dim=12, mlp_dim=12, num_heads=2, feature_size=2))
    model = benchmark.build("here", 32, plan).eval()
    run = benchmark.bare_kernels(model, benchmark.torch.rand(1, 3, 32, 32))
    calls = run.__closure__[0].cell_contents
    kernels = benchmark.nn.Conv2d | benchmark.nn.ConvTranspose2d | benchmark.nn.Linear
    assert len(calls) == sum(isinstance(module, kernels) for module in model.modules()) + 12
    run()
