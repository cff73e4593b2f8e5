"""Known faults of 2D ports of UNETR: each is detected once it is put into the loaded script.

The tests named here pass on the script as it is, so none of the faults is present.
"""

import contextlib
from pathlib import Path

import pytest
import test_agreement
import test_command
import test_network
import torch
from conftest import ROOT, unetr
from torch import nn

# Faults: each replaces a part of the script at run time. `patch` is pytest's monkeypatch.


def change_output(patch, owner, name, change):
    """Replace owner.name by a function that calls it and then returns change(self, output)."""
    original = getattr(owner, name)

    def changed(self, *args):
        return change(self, original(self, *args))

    patch.setattr(owner, name, changed)


def after_init(patch, owner, change):
    """Call change(self) at the end of the constructor."""

    def finish(self, result):
        change(self)

    change_output(patch, owner, "__init__", finish)


def blocks_built_inside_forward(patch):
    original = unetr.DecoderStage.forward

    def forward(self, x, skip_input):
        stage = unetr.DecoderStage(x.shape[1], self.up.out_channels, self.skip)
        return original(stage.to(x.dtype).train(self.training), x, skip_input)

    patch.setattr(unetr.DecoderStage, "forward", forward)


def layers_in_a_list(patch):
    def change(vit):
        blocks = list(vit.blocks)
        del vit.blocks
        vit.blocks = blocks

    after_init(patch, unetr.ViT, change)


def heads_from_layers(patch):
    original = unetr.Attention.__init__

    def init(self, config):
        original(self, config)
        self.num_heads = config.num_layers

    patch.setattr(unetr.Attention, "__init__", init)


def positions_as_a_plain_tensor(patch):
    def change(vit):
        positions = vit.pos_embed.data
        del vit.pos_embed
        vit.pos_embed = positions

    after_init(patch, unetr.ViT, change)


def patches_as(patch, order):
    """Replace patchify by one that permutes (B, C, H/P, P, W/P, P) in another order."""

    def patchify(image, P):
        B, C, H, W = image.shape
        patches = image.reshape(B, C, H // P, P, W // P, P).permute(order)
        return patches.reshape(B, H * W // P**2, C * P * P)

    patch.setattr(unetr, "patchify", patchify)


def patches_viewed(patch):
    def patchify(image, P):
        return image.reshape(image.shape[0], -1, image.shape[1] * P * P)

    patch.setattr(unetr, "patchify", patchify)


def channels_mixed_with_positions(patch):
    patches_as(patch, (0, 2, 4, 3, 5, 1))


def patches_in_column_major_order(patch):
    patches_as(patch, (0, 4, 2, 1, 3, 5))


def grid_taken_for_patch_size(patch):
    patch.setattr(
        unetr.UNETRConfig, "grid", property(lambda config: (config.patch_size, config.patch_size))
    )


def change_maps(patch, change):
    change_output(
        patch, unetr.ViT, "forward", lambda vit, maps: [change(feature_map) for feature_map in maps]
    )


def tokens_viewed(patch):
    change_maps(patch, lambda z: z.flatten(2).transpose(1, 2).reshape(z.shape))


def rows_and_columns_exchanged(patch):
    def exchange(z):
        B, K, h, w = z.shape
        return z.reshape(B, K, w, h).transpose(2, 3).contiguous()

    change_maps(patch, exchange)


def post_norm_attention(patch):
    def forward(self, z):
        z = self.norm1(z + self.dropout(self.attn(z)))
        return z + self.dropout(self.mlp(self.norm2(z)))

    patch.setattr(unetr.TransformerBlock, "forward", forward)


def post_norm_mlp(patch):
    def forward(self, z):
        z = z + self.dropout(self.attn(self.norm1(z)))
        return self.norm2(z + self.dropout(self.mlp(z)))

    patch.setattr(unetr.TransformerBlock, "forward", forward)


def layers_counted_from_0(patch):
    right = unetr.UNETRConfig.tapped_layers.fget

    def shifted(config):
        return tuple(min(layer + 1, config.num_layers) for layer in right(config))

    patch.setattr(unetr.UNETRConfig, "tapped_layers", property(shifted))


def skips_in_the_wrong_order(patch):
    change_output(patch, unetr.ViT, "forward", lambda vit, maps: [*reversed(maps[:-1]), maps[-1]])


def norm_on_z12(patch):
    def change(vit, maps):
        normed = nn.functional.layer_norm(maps[-1].movedim(1, -1), maps[-1].shape[1:2])
        return [*maps[:-1], normed.movedim(-1, 1)]

    change_output(patch, unetr.ViT, "forward", change)


def dropout_while_predicting(patch):
    patch.setattr(unetr.UNETR, "eval", lambda model: model)


def gradients_while_predicting(patch):
    def model_eval(model):
        for name in ("inference_mode", "no_grad"):
            patch.setattr(torch, name, contextlib.nullcontext)
        return model.train(False)

    patch.setattr(unetr.UNETR, "eval", model_eval)


def printing_inside_forward(patch):
    def change(model, logits):
        print(logits.shape)
        return logits

    change_output(patch, unetr.UNETR, "forward", change)


def launched(patch, lines):
    """Let the tests start a script that runs these lines."""
    script = Path.cwd().parent / "launch.py"  # not in the folder that the command writes to
    find = f"import importlib, sys\nsys.path.insert(0, {str(ROOT)!r})"
    script.write_text(f"{find}\n{lines}\nunetr.main()\n")
    patch.setattr(test_command, "SCRIPT", script)


def figure_only_with_a_display(patch):
    lines = 'unetr = importlib.import_module("UNETR-2D")\nunetr.plt.switch_backend("tkagg")'
    launched(patch, lines)


def sample_only_in_one_folder(patch):
    """Run the script as if its own path were relative to the current folder."""
    lines = f"""
import types
source = open({str(ROOT / "UNETR-2D.py")!r}, encoding="utf-8").read()
unetr = sys.modules["unetr"] = types.ModuleType("unetr")
unetr.__file__ = "UNETR-2D.py"
exec(source, vars(unetr))
"""
    launched(patch, lines)


# The tests that detect them, and what they are called with

ENCODER = test_agreement.test_encoder_agrees_with_monai_at_every_layer
NETWORK = test_agreement.test_network_agrees_with_an_independent_reimplementation
PATCHES = test_network.test_patches_are_row_major_and_flattened_as_channel_row_column
PARAMETERS = test_network.test_defaults_and_parameters
GRID = test_network.test_configuration_is_frozen_and_accepts_what_json_gives
SILENCE = test_network.test_forward_prints_nothing
PREDICTION = test_command.test_the_forward_pass_is_a_prediction
COMMAND = test_command.test_it_prints_each_stage_and_writes_the_figure_without_a_display
FIXTURES = {
    SILENCE: ["capsys"],
    PREDICTION: ["tmp_path", "monkeypatch"],
    COMMAND: ["tmp_path"],
}
ARGUMENTS = {
    ENCODER: ((32, 80), 16, 1, 36, 4, 3, 100, "conv", torch.float64),
    NETWORK: (16, (96, 32), (96, 32), False, torch.float64),
    PATCHES: (2, 3, 32, 48, 16),
}
FAULTS = [  # what is wrong, how it is put in, the test that detects it
    ("decoder blocks built inside forward", blocks_built_inside_forward, NETWORK),
    ("layers in a plain Python list", layers_in_a_list, PARAMETERS),
    ("number of heads set to the number of layers", heads_from_layers, ENCODER),
    (
        "position embedding neither a parameter nor a buffer",
        positions_as_a_plain_tensor,
        PARAMETERS,
    ),
    ("patches formed by a reshape without a permutation", patches_viewed, PATCHES),
    ("channels and pixels of a patch in the wrong order", channels_mixed_with_positions, PATCHES),
    ("patches in column-major order", patches_in_column_major_order, PATCHES),
    ("patch size used as the grid size", grid_taken_for_patch_size, GRID),
    ("tokens reshaped without a transpose", tokens_viewed, NETWORK),
    ("rows and columns of a feature map swapped", rows_and_columns_exchanged, NETWORK),
    ("post-norm attention", post_norm_attention, ENCODER),
    ("post-norm MLP", post_norm_mlp, ENCODER),
    ("layers counted from 0", layers_counted_from_0, NETWORK),
    ("skip connections in the wrong order", skips_in_the_wrong_order, NETWORK),
    ("layer norm on z12", norm_on_z12, NETWORK),
    ("dropout active during inference", dropout_while_predicting, PREDICTION),
    ("autograd enabled during inference", gradients_while_predicting, PREDICTION),
    ("printing inside forward", printing_inside_forward, SILENCE),
    ("figure saved only if a display is available", figure_only_with_a_display, COMMAND),
    ("sample image found from one folder only", sample_only_in_one_folder, COMMAND),
]


@pytest.mark.parametrize("name, put_in, test", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_each_known_fault_is_detected(name, put_in, test, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    put_in(monkeypatch)
    fixtures = [request.getfixturevalue(fixture) for fixture in FIXTURES.get(test, [])]
    # Any other error would not show that the test sees the fault.
    with pytest.raises(AssertionError):
        test(*fixtures, *ARGUMENTS.get(test, []))
