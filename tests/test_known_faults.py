"""Known faults of 2D ports of UNETR: none is present, and a test fails once the fault is injected into the script."""

import importlib.util
import sys
from contextlib import nullcontext

import conftest
import pytest
import test_agreement
import test_command
import test_network
import test_patches
import torch

SOURCE = (conftest.ROOT / "UNETR-2D.py").read_text(encoding="utf-8")
FORWARD = "x = stage(x, skips.pop())"
PERMUTE = "patches.permute(0, 2, 4, 1, 3, 5)"
MAPS = "z.transpose(1, 2).unflatten(2, grid)"


TESTS = {  # the arguments: a folder to run in, monkeypatch, capsys
    "encoder": lambda *_: test_agreement.test_encoder_agrees_with_monai_at_every_layer(
        (32, 80), 16, 1, 36, 4, 3, 100, "conv", torch.float64),
    "network": lambda *_: test_agreement.test_network_agrees_with_an_independent_reimplementation(
        16, (96, 32), False, torch.float64),
    "patches": lambda *_: test_patches.test_patches_are_row_major_and_flattened_as_channel_row_column(2, 3, 32, 48, 16),
    "grid": lambda *_: test_network.test_configuration_is_frozen_and_accepts_what_json_gives(),
    "silence": lambda _, __, capsys: test_network.test_forward_prints_nothing(capsys),
    "inference": lambda folder, patch, _: test_command.test_the_forward_pass_is_in_inference_mode(folder, patch),
    "command": lambda folder, *_: test_command.test_it_prints_each_stage_and_writes_the_figure_without_a_display(
        folder, [], {"MPLBACKEND": ""}),
}  # fmt: skip
FAULTS = {  # name: the test that detects it, the text of the script, its replacement
    "decoder blocks built inside forward": ("network", FORWARD, "x = DecoderStage(x.shape[1], stage.up.out_channels, stage.skip)(x, skips.pop())"),
    "layers in a plain list": ("encoder", "nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))",
                               "[TransformerBlock(config) for _ in range(config.num_layers)]"),
    "heads taken from the number of layers": ("encoder", "self.num_heads = config.num_heads", "self.num_heads = config.num_layers"),
    "positions neither parameter nor buffer": ("encoder", "nn.Parameter(torch.zeros(1, math.prod(config.grid), config.hidden_dim))",
                                               "torch.zeros(1, math.prod(config.grid), config.hidden_dim)"),
    "patches reshaped with a view": ("patches", PERMUTE, "patches.permute(0, 3, 5, 1, 2, 4)"),
    "channels mixed with positions": ("patches", PERMUTE, "patches.permute(0, 2, 4, 3, 5, 1)"),
    "patches in column-major order": ("patches", PERMUTE, "patches.permute(0, 4, 2, 1, 3, 5)"),
    "patch grid taken for the patch size": ("grid", "size[0] // self.patch_size, self.size[1] // self.patch_size", "patch_size, self.patch_size"),
    "tokens reshaped with a view": ("network", MAPS, "z.reshape(z.shape[0], z.shape[2], *grid)"),
    "rows and columns exchanged": ("network", MAPS, "z.transpose(1, 2).reshape(-1, z.shape[2], *grid[::-1]).mT"),
    "post-norm attention": ("encoder", "z + self.dropout(self.attn(self.norm1(z)))", "self.norm1(z + self.dropout(self.attn(z)))"),
    "post-norm MLP": ("encoder", "z + self.dropout(self.mlp(self.norm2(z)))", "self.norm2(z + self.dropout(self.mlp(z)))"),
    "layers counted from 0": ("network", "enumerate(self.blocks, start=1)", "enumerate(self.blocks)"),
    "skips in the wrong order": ("network", FORWARD, "x = stage(x, skips.pop(-1 if len(skips) != 3 else 1))"),
    "a norm on z12": ("network", "z = block(z)\n", "z = block(z) if layer < 12 else nn.functional.layer_norm(block(z), z.shape[2:])\n"),
    "dropout on while predicting": ("inference", "model.eval().to(", "model.to("),
    "gradients on while predicting": ("inference", "with torch.inference_mode():", "if True:"),
    "printing inside forward": ("silence", FORWARD, "print(x.shape); " + FORWARD),
    "a figure only where there is a display": ("command", "    save(draw(", "    plt.switch_backend('tkagg'); save(draw("),
    "a sample path that holds in one folder only": ("command", 'Path(__file__).resolve().parent / "sample.png"', 'Path("sample.png")'),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("injected", [False, True])
def test_no_known_fault_is_present_and_each_is_detected_when_injected(fault, injected, tmp_path, monkeypatch, capsys):
    test, right, wrong = FAULTS[fault]
    assert SOURCE.count(right) == 1
    script, elsewhere = tmp_path / "script", tmp_path / "elsewhere"
    script.mkdir()
    elsewhere.mkdir()
    (script / "UNETR-2D.py").write_text(SOURCE.replace(right, wrong if injected else right), encoding="utf-8")
    (script / "sample.png").symlink_to(conftest.ROOT / "sample.png")
    spec = importlib.util.spec_from_file_location("unetr_under_test", script / "UNETR-2D.py")
    monkeypatch.setitem(sys.modules, spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules[spec.name])
    for module in (conftest, test_agreement, test_command, test_network, test_patches):
        monkeypatch.setattr(module, "unetr", sys.modules[spec.name])
    monkeypatch.setattr(test_command, "ROOT", script)
    with pytest.raises((AssertionError, RuntimeError)) if injected else nullcontext():
        TESTS[test](elsewhere, monkeypatch, capsys)
