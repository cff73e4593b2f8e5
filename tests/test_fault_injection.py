"""Mistakes that 2D ports of UNETR are known for: once put into the script, a test fails.

The script as it is passes these tests, so it has none of them.
"""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

ENCODER = "test_encoder_agrees_with_monai_at_every_layer"
NETWORK = "test_network_agrees_with_a_second_implementation"
PATCHES = "test_patches_are_row_major_and_flattened_as_channel_row_column"
PARAMETERS = "test_defaults_and_parameters"
GRID = "test_configuration_is_frozen_and_accepts_what_json_gives"
SILENCE = "test_forward_prints_nothing_and_leaves_the_image_unchanged"
PREDICTION = "test_the_forward_pass_is_a_prediction"
COMMAND = "test_it_prints_each_block_and_writes_the_figure_without_a_display"
TAPPED = "round(self.num_layers * i / self.num_stages)"

FAULTS = [  # what is wrong, the text in the script, what replaces it, the test that fails
    ("decoder blocks built inside forward", "self.merge1(x)",
     "OrangeBlock(x.shape[1], x.shape[1] // 2).to(x)(x)", NETWORK),
    ("layers in a plain Python list", "nn.ModuleList(TransformerBlock", "list(TransformerBlock",
     PARAMETERS),
    ("number of heads set to the number of layers", "self.num_heads = config.num_heads",
     "self.num_heads = config.num_layers", ENCODER),
    ("position embedding neither a parameter nor a buffer", "nn.Parameter(torch.zeros(",
     "torch.Tensor(torch.zeros(", PARAMETERS),
    ("patches formed by a reshape without a permutation", "(0, 2, 4, 1, 3, 5)",
     "(0, 1, 2, 3, 4, 5)", PATCHES),
    ("channels and pixels of a patch in the wrong order", "(0, 2, 4, 1, 3, 5)",
     "(0, 2, 4, 3, 5, 1)", PATCHES),
    ("patches in column-major order", "(0, 2, 4, 1, 3, 5)", "(0, 4, 2, 1, 3, 5)", PATCHES),
    ("patch size used as the grid size", "(height // self.patch_size, width // self.patch_size)",
     "(self.patch_size, self.patch_size)", GRID),
    ("tokens reshaped without a transpose", "z.transpose(1, 2).unflatten(2, grid)",
     "z.reshape(len(z), -1, *grid)", NETWORK),
    ("rows and columns of a feature map swapped", "unflatten(2, grid)",
     "unflatten(2, grid[::-1]).mT", NETWORK),
    ("post-norm attention", "z + self.dropout(self.attn(self.norm1(z)))",
     "self.norm1(z + self.dropout(self.attn(z)))", ENCODER),
    ("post-norm MLP", "z + self.dropout(self.mlp(self.norm2(z)))",
     "self.norm2(z + self.dropout(self.mlp(z)))", ENCODER),
    ("layers counted from 0", TAPPED, f"min(1 + {TAPPED}, self.num_layers)", NETWORK),
    ("skip connections in the wrong order", "*reversed(feature_maps)", "*feature_maps", NETWORK),
    ("skip connection concatenated first", "[self.up(x), self.skip(skip_input)]",
     "[self.skip(skip_input), self.up(x)]", NETWORK),
    ("layer norm on z12", "self.encoder(image)  #",
     "self.encoder(image); x = F.layer_norm(x.mT, x.shape[2:3]).mT  #", NETWORK),
    ("dropout active during inference", "model.to(args.device).eval()", "model.to(args.device)",
     PREDICTION),
    ("autograd enabled during inference", "torch.inference_mode()", "torch.enable_grad()",
     PREDICTION),
    ("printing inside forward", "return self.head(x)", "print(x.shape); return self.head(x)",
     SILENCE),
    ("figure saved only if a display is available", "    figure.savefig(",
     "    if plt.get_backend() != 'agg': figure.savefig(", COMMAND),
    ("sample image found from one folder only", 'Path(__file__).resolve().parent / "sample.png"',
     'Path("sample.png")', COMMAND),
]  # fmt: skip


@pytest.mark.parametrize("name, old, new, test", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_each_fault_is_detected(name, old, new, test, tmp_path):
    source = (ROOT / "UNETR-2D.py").read_text(encoding="utf-8")
    if source.count(old) != 1:
        pytest.skip(f"the script was rewritten: find the place of this fault anew ({old})")
    (tmp_path / "UNETR-2D.py").write_text(source.replace(old, new), encoding="utf-8")
    for name in ("sample.png", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(ROOT / "tests/conftest.py", tests)
    for path in (ROOT / "tests").glob("test_*.py"):
        if f"def {test}(" in path.read_text(encoding="utf-8"):
            shutil.copy(path, tests)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-k", test, "-p", "no:cacheprovider"]
    done = subprocess.run([*command, tests], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout  # a test failed; 2 to 5 would be another reason
