"""Each fault that 2D ports of UNETR are known for is absent; and the check for it fails once the fault is put in.

A fault is a replacement in the script's text. Each check runs on the script as it is and on the script with the fault.
"""

import contextlib
import importlib.util
import io
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL
from torch import nn

SOURCE = (ROOT / "UNETR-2D.py").read_text(encoding="utf-8")
SIZES = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def small(unetr, **sizes):
    torch.manual_seed(0)
    return unetr.UNETR(unetr.UNETRConfig(**{**SMALL, **sizes}))


def module(path):
    spec = importlib.util.spec_from_file_location("unetr_under_test", path)
    unetr = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = unetr  # dataclass looks its module up
    spec.loader.exec_module(unetr)
    return unetr


def without_attention(model):
    """Tokens that do not see each other, so that each place can be followed through the network."""
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
    return model.eval()


def outputs_of(model, names, image):
    seen, hooks = {}, []
    for name in names:
        hook = model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        hooks.append(hook)
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return seen


def changed(difference):
    """The rows and the columns from the first to the last place that differs, and all between."""
    rows, columns = difference.abs().amax(dim=(0, 1)).nonzero().T
    return (rows.min().item(), rows.max().item()), (columns.min().item(), columns.max().item())


def no_module_is_built_in_forward(unetr, path):
    model, built = small(unetr), []
    init = nn.Module.__init__
    nn.Module.__init__ = lambda self, *args, **kwargs: built.append(self) or init(self, *args, **kwargs)
    try:
        model(torch.rand(1, 3, 64, 64))
    finally:
        nn.Module.__init__ = init
    assert not built


def every_layer_is_trained_moved_and_saved(unetr, path):
    model = small(unetr).double()
    assert model(torch.rand(1, 3, 64, 64, dtype=torch.float64)).dtype == torch.float64
    assert {name.split(".")[1] for name in model.state_dict() if name.startswith("blocks.")} == set("01234")


def heads_are_as_many_as_configured(unetr, path):
    shapes, attention = [], nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = lambda q, k, v: shapes.append(q.shape) or attention(q, k, v)
    try:
        small(unetr)(torch.rand(1, 3, 64, 64))  # 3 heads, 5 layers
    finally:
        nn.functional.scaled_dot_product_attention = attention
    assert shapes == [(1, 3, 16, 8)] * 5


def positions_are_a_parameter(unetr, path):
    model = small(unetr)
    assert isinstance(dict(model.named_parameters()).get("pos_embed"), nn.Parameter)
    image = torch.ones(1, 3, 64, 64)
    tokens = outputs_of(model, ["blocks.0"], image)["blocks.0"]
    assert not torch.allclose(tokens[:, 0], tokens[:, 1])


def one_patch_changes_its_token_alone(unetr, path):
    model = without_attention(small(unetr, image_size=(64, 96)))
    image, other = torch.rand(1, 3, 64, 96), None
    other = image.clone()
    other[:, :, 16:32, 48:64] += 1  # row 1 of 4, column 3 of 6: token 9
    for name in ("patch_embed", "blocks.4"):
        difference = outputs_of(model, [name], image)[name] - outputs_of(model, [name], other)[name]
        assert difference.abs().amax(dim=(0, 2)).nonzero().tolist() == [[9]]


def one_patch_changes_its_pixels_of_each_skip(unetr, path):
    model = without_attention(small(unetr, image_size=(96, 128), feature_size=8))
    image = torch.rand(1, 3, 96, 128)
    other = image.clone()
    other[:, :, 32:48, 64:80] += 1  # row 2, column 4
    names = [f"skips.{i}" for i in range(4)]
    before, after = outputs_of(model, names, image), outputs_of(model, names, other)
    # 1/8: the patch is 2 x 2 pixels there, and a 3x3 convolution spreads it by one; 1/4 adds one more at double size
    for name, scale, spread in (("skips.0", 8, 1), ("skips.1", 4, 3), ("skips.2", 2, 7), ("skips.3", 1, 2)):
        (top, bottom), (left, right) = changed(before[name] - after[name])
        assert (top, bottom) == (32 // scale - spread, 48 // scale - 1 + spread), name
        assert (left, right) == (64 // scale - spread, 80 // scale - 1 + spread), name


def flipped_patches_are_flipped_tokens(unetr, path):
    model = small(unetr, image_size=(64, 96)).eval()
    with torch.no_grad():
        model.pos_embed.zero_()
    image = torch.rand(1, 3, 64, 96)
    flipped = image.unflatten(3, (6, 16)).flip(3).flatten(3)  # the columns of patches, each patch as it was
    names = ["patch_embed", "blocks.4"]
    straight, turned = outputs_of(model, names, image), outputs_of(model, names, flipped)
    for name in names:
        torch.testing.assert_close(straight[name].unflatten(1, (4, 6)).flip(2).flatten(1, 2), turned[name])


def channels_stay_together_in_a_patch(unetr, path):
    image = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 64, 96)
    patches = unetr.patchify(image, 16)
    assert torch.equal(patches, torch.arange(3.0).repeat_interleave(256).expand(1, 24, 768))


def grid_and_patch_size_are_two_things(unetr, path):
    for size, patch in (((64, 96), 16), ((16, 64), 8), ((64, 64), 32)):
        model = small(unetr, image_size=size, patch_size=patch)
        rows, columns = size[0] // patch, size[1] // patch
        assert model.pos_embed.shape == (1, rows * columns, 24) and model.patch_embed.in_features == 3 * patch**2
        assert model(torch.rand(1, 3, *size)).shape == (1, 1, *size)


def layers_are_pre_norm(unetr, path):
    model = small(unetr).eval()
    z = 100 * torch.randn(2, 16, 24)
    for parameter in model.blocks[0].attn.proj.parameters():
        nn.init.zeros_(parameter)
    for parameter in model.blocks[0].mlp.fc2.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model.blocks[0](z), z)  # the residual path has nothing on it


def skips_are_layers_3_6_9_12(unetr, path):
    model = small(unetr, num_layers=12).eval()
    layers, taken = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, out: layers.append(out))
    for part in (model.ups[0], *model.skips[:3]):
        part.register_forward_pre_hook(lambda m, args: taken.append(args[0]))
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    for z, number in zip(taken, (12, 9, 6, 3), strict=True):
        assert torch.equal(z.flatten(2).mT, layers[number - 1])  # no norm in between either


def predicting_neither_drops_nor_records(unetr, path):
    seen = []
    forward = unetr.UNETR.forward
    unetr.UNETR.forward = lambda self, image: (
        seen.append((self.training, torch.is_grad_enabled())) or forward(self, image)
    )
    with contextlib.redirect_stdout(io.StringIO()):
        assert unetr.main([*SIZES, "--no-show", "--output", str(path.parent / "p.png")]) == 0
    assert seen == [(False, False)]


def forward_prints_nothing(unetr, path):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        small(unetr)(torch.rand(1, 3, 64, 64))
    assert printed.getvalue() == ""


def command(path, folder):
    env = {
        name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    }
    words = [sys.executable, path, *SIZES]
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)


def a_picture_needs_no_screen(unetr, path):
    folder = path.parent / "no-screen"
    folder.mkdir()
    done = command(path, folder)
    assert done.returncode == 0 and (folder / "unetr-2d.png").exists(), done.stderr

    plt = unetr.plt
    kept = plt.get_backend, plt.switch_backend

    def switch_backend(name):  # as pyplot does where the backend's screen is not there
        if name != "agg":
            raise ImportError(f"Cannot load backend {name!r} which requires the 'tk' interactive framework")
        kept[1](name)

    picture = folder / "tk.png"
    plt.get_backend, plt.switch_backend = lambda: "tkagg", switch_backend
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(ImportError):
            unetr.main([*SIZES, "--output", str(picture)])
    finally:
        plt.get_backend, plt.switch_backend = kept
    assert picture.exists()


def the_sample_is_found_from_any_folder(unetr, path):
    folder = path.parent / "elsewhere"
    folder.mkdir()
    done = command(path, folder)
    assert done.returncode == 0 and "sample.png, 296 x 350" in done.stdout, done.stderr


UP = "x = up(x)"
FAULTS = {
    "decoder blocks built inside forward": (no_module_is_built_in_forward, UP, "GreenBlock(2, 2); x = up(x)"),
    "layers in a plain list": (
        every_layer_is_trained_moved_and_saved,
        "self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))",
        "self.blocks = [TransformerBlock(config) for _ in range(config.num_layers)]",
    ),
    "heads taken from the layers": (
        heads_are_as_many_as_configured, "self.num_heads = config.num_heads", "self.num_heads = config.num_layers",
    ),
    "positions no parameter": (
        positions_are_a_parameter, "self.pos_embed = nn.Parameter(torch.empty(1, math.prod(config.grid), hidden))",
        "self.pos_embed = torch.empty(1, math.prod(config.grid), hidden)",
    ),
    "patches reshaped with a view": (
        one_patch_changes_its_token_alone, "patches.permute(0, 2, 4, 1, 3, 5)", "patches.permute(0, 3, 5, 1, 2, 4)",
    ),
    "channels mixed with places": (
        channels_stay_together_in_a_patch, "patches.permute(0, 2, 4, 1, 3, 5)", "patches.permute(0, 2, 4, 3, 5, 1)",
    ),
    "patch grid taken for the patch size": (
        grid_and_patch_size_are_two_things,
        "size[0] // self.patch_size, self.size[1] // self.patch_size", "patch_size, self.patch_size",
    ),
    "patches in columns first": (
        flipped_patches_are_flipped_tokens, "patches.permute(0, 2, 4, 1, 3, 5)", "patches.permute(0, 4, 2, 1, 3, 5)",
    ),
    "tokens reshaped with a view": (
        one_patch_changes_its_pixels_of_each_skip,
        "z.transpose(1, 2).unflatten(2, grid)", "z.reshape(z.shape[0], z.shape[2], *grid)",
    ),
    "rows and columns exchanged": (
        one_patch_changes_its_pixels_of_each_skip,
        "z.transpose(1, 2).unflatten(2, grid)", "z.transpose(1, 2).reshape(-1, z.shape[2], *grid[::-1]).mT",
    ),
    "post-norm attention": (
        layers_are_pre_norm, "z + self.dropout(self.attn(self.norm1(z)))", "self.norm1(z + self.dropout(self.attn(z)))",
    ),
    "post-norm MLP": (
        layers_are_pre_norm, "z + self.dropout(self.mlp(self.norm2(z)))", "self.norm2(z + self.dropout(self.mlp(z)))",
    ),
    "layers counted from 0": (skips_are_layers_3_6_9_12, "enumerate(self.blocks, start=1)", "enumerate(self.blocks)"),
    "skips in the wrong order": (skips_are_layers_3_6_9_12, "skip(features.pop())", "skip(features.pop(-1 if len(features) < 3 else 1))"),
    "a norm on z12": (
        skips_are_layers_3_6_9_12, "z = block(z)\n", "z = block(z) if layer < 12 else F.layer_norm(block(z), z.shape[2:])\n",
    ),
    "dropout left on": (predicting_neither_drops_nor_records, "UNETR(config).eval()", "UNETR(config)"),
    "gradients recorded": (predicting_neither_drops_nor_records, "with torch.inference_mode():", "if True:"),
    "printing inside forward": (forward_prints_nothing, UP, "print(x.shape); x = up(x)"),
    "a picture only where there is a screen": (
        a_picture_needs_no_screen, "except ImportError:  #", "except ZeroDivisionError:  #",
    ),
    "a sample path of one folder": (
        the_sample_is_found_from_any_folder, 'Path(__file__).resolve().parent / "sample.png"', 'Path("sample.png")',
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_the_script_passes_and_each_fault_is_caught(fault, tmp_path):
    path = tmp_path / "UNETR-2D.py"
    (tmp_path / "sample.png").symlink_to(ROOT / "sample.png")
    if fault is None:
        path.write_text(SOURCE, encoding="utf-8")
        for check in {check for check, _, _ in FAULTS.values()}:
            check(module(path), path)
        return
    check, right, wrong = FAULTS[fault]
    assert SOURCE.count(right) == 1
    path.write_text(SOURCE.replace(right, wrong), encoding="utf-8")
    with pytest.raises((AssertionError, RuntimeError)):
        check(module(path), path)
