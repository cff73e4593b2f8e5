"""Checkpoints: a saved network knows its configuration; a timm ViT fills the encoder or is refused.

Nothing that does not fit is loaded in silence.
"""

import dataclasses
import re

import numpy as np
import pytest
import torch
from conftest import largest_difference, resized, small, unetr, vit_checkpoint
from torch import nn

# save_checkpoint, load_checkpoint


def trained(**sizes):
    """A network whose every value differs from that of a new one."""
    model = unetr.UNETR(small(**sizes))
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.rand(tensor.shape) + 1 if tensor.is_floating_point() else tensor + 7)
        assert tensor.any(), name
    return model


@pytest.mark.parametrize(
    "sizes", [{}, dict(image_size=(32, 96), num_heads=6, dropout_rate=0.25, out_channels=4)]
)
def test_a_checkpoint_is_the_same_network_in_eval_mode(tmp_path, sizes):
    model = trained(**sizes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "a.1").write_bytes(b"an older checkpoint")
    unetr.save_checkpoint(model, tmp_path / "a.1")
    assert model.training  # as before
    loaded = unetr.load_checkpoint(str(tmp_path / "a.1"))
    assert loaded.config == model.config
    assert not any(module.training for module in loaded.modules())
    assert loaded.state_dict().keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert torch.equal(model.state_dict()[name], tensor), name
    image = torch.rand(1, 3, *model.config.size)
    assert torch.equal(loaded(image), model.eval()(image))
    loaded(image).mean().backward()  # training can go on


def test_a_checkpoint_is_two_plain_entries(tmp_path):
    sizes = dict(image_size=torch.Size([np.int64(32), 96]), num_heads=np.int64(3))
    model = unetr.UNETR(small(**sizes, dropout_rate=np.float64(0.5)))
    unetr.save_checkpoint(model, tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content.keys() == {"config", "state_dict"}
    values = dataclasses.asdict(small(image_size=(32, 96), dropout_rate=0.5))
    assert content["config"] == {**values, "image_size": content["config"]["image_size"]}
    for value in [*content["config"].values(), *content["config"]["image_size"]]:
        assert type(value) in (int, float, list, tuple)
    assert content["state_dict"].keys() == model.state_dict().keys()
    assert unetr.load_checkpoint(tmp_path / "a.pt").config.size == (32, 96)


def test_a_checkpoint_of_an_accelerator_is_loaded_to_the_cpu(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        unetr.save_checkpoint(unetr.UNETR(small()), tmp_path / "a.pt")
    model = unetr.load_checkpoint(tmp_path / "a.pt")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


def test_weights_of_any_type_are_loaded_as_float32(tmp_path):
    unetr.save_checkpoint(unetr.UNETR(small()).bfloat16(), tmp_path / "a.pt")
    model = unetr.load_checkpoint(tmp_path / "a.pt")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_is_no_unetr_is_not_saved(tmp_path):
    model = unetr.UNETR(small())
    for wrapped in (torch.compile(model), nn.DataParallel(model), model.state_dict()):
        with pytest.raises(TypeError, match=type(wrapped).__name__):
            unetr.save_checkpoint(wrapped, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


class Executed:
    """Creates a file if it is unpickled without care."""

    def __reduce__(self):
        return open, ("executed", "w")


def bad_checkpoints():
    """Contents of files that are refused, with what the message names."""
    config = dataclasses.asdict(small())
    state = unetr.UNETR(small()).state_dict()
    other = unetr.UNETR(small(image_size=(32, 64))).state_dict()
    incomplete = {name: config[name] for name in config if name not in ("num_heads", "image_size")}
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}

    def saved(config=config, state_dict=state):
        return {"config": config, "state_dict": state_dict}

    unreadable = "is not a readable checkpoint"
    entries = "bad.pt must contain config and state_dict, as written by save_checkpoint."
    invalid = "has an invalid configuration: "
    return {
        "empty": (b"", unreadable),
        "text": (b"text" * 99, unreadable),
        "damaged": (b"\x80\x02h\x00.", unreadable),  # not UnpicklingError nor RuntimeError
        "malicious pickle": (Executed(), unreadable),
        "list": ([1], entries),
        "integer": (5, entries),
        "state_dict": (state, entries),
        "no config": ({"state_dict": state, "epoch": 3}, entries),
        "no state_dict": ({"config": config}, entries),
        "config is a list": (saved([1, 2]), invalid),
        "impossible": (saved({**config, "patch_size": 12}), f"{invalid}patch_size must be"),
        "text for a number": (saved({**config, "num_heads": "3"}), invalid),
        "two fields missing": (saved(incomplete), f"{invalid}missing image_size, num_heads"),
        "unknown setting": (saved({**config, "depth": 3}), "'depth'"),
        "another grid": (saved(state_dict=other), "encoder.pos_embed"),
        "wrapped": (saved(state_dict=wrapped), '"encoder.pos_embed"'),
        "extra tensor": (saved(state_dict={**state, "x.y": torch.ones(1)}), '"x.y"'),
        "number": (saved(state_dict={**state, "head.bias": 1}), "head.bias"),
        "state_dict is a list": (saved(state_dict=[1]), "does not match its configuration"),
        "names are numbers": (saved(state_dict={1: torch.ones(1)}), "does not match"),
    }


@pytest.mark.parametrize("kind", bad_checkpoints())
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about pickles
def test_any_other_file_is_refused_with_the_reason_and_not_executed(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, reason = bad_checkpoints()[kind]
    if isinstance(content, bytes):
        (tmp_path / "bad.pt").write_bytes(content)
    else:
        torch.save(content, "bad.pt")
    with pytest.raises(ValueError) as error:
        unetr.load_checkpoint("bad.pt")
    message = f"{error.value}."
    assert message.startswith("bad.pt ")
    assert len(message) < 400
    assert reason in message
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]  # nothing was executed


def test_a_file_that_cannot_be_opened_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        unetr.load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError])
def test_a_mistake_in_the_network_is_no_fault_of_the_file(kind, tmp_path, monkeypatch):
    unetr.save_checkpoint(unetr.UNETR(small()), tmp_path / "a.pt")

    def bug(model):
        raise kind("a bug")

    monkeypatch.setattr(unetr, "initialize", bug)
    with pytest.raises(kind, match=r"^a bug$") as error:
        unetr.load_checkpoint(tmp_path / "a.pt")
    assert not isinstance(error.value, unetr.CheckpointError)


def test_a_plain_state_dict_loads_as_in_any_module():
    model, same = trained(), unetr.UNETR(small())
    same.load_state_dict(model.state_dict())
    assert torch.equal(same.encoder.pos_embed, model.encoder.pos_embed)
    with pytest.raises(RuntimeError, match=r"size mismatch for encoder\.pos_embed"):
        unetr.UNETR(small(image_size=(32, 128))).load_state_dict(model.state_dict())  # as many


# load_vit

CLASS, DISTILLED = [("cls_token", 1)], [("cls_token", 1), ("dist_token", 1)]
REGISTERS = [("cls_token", 1), ("reg_token", 4)]


@pytest.mark.parametrize(
    "side, prefix, tokens, size",
    [
        pytest.param(24, 1, CLASS, (288, 512), id="384 pixels, into as many tokens"),
        pytest.param(14, 0, CLASS, 224, id="DeiT III: no position for the class token"),
        pytest.param(14, 2, DISTILLED, 224, id="distilled DeiT"),
        pytest.param(14, 5, REGISTERS, 224, id="registers"),
        pytest.param(14, 0, REGISTERS, (224, 256), id="registers without positions"),
        pytest.param(4, 0, [], (64, 96), id="no class token"),
        pytest.param(3, 1, CLASS, (32, 80), id="as many positions as tokens, one of the class"),
    ],
)
def test_a_timm_vit_fills_the_encoder(side, prefix, tokens, size):
    vit = vit_checkpoint(side**2 + prefix, tokens)
    for name in ("fc_norm.weight", "head_dist.bias", "attn_pool.latent"):  # after the last layer
        vit[name] = torch.rand(5)
    before = {name: tensor.clone() for name, tensor in vit.items()}
    encoder = unetr.UNETR(small(image_size=size, num_layers=4)).encoder
    unetr.load_vit(encoder, vit)
    positions = before["pos_embed"][:, prefix:].unflatten(1, (side, side))
    torch.testing.assert_close(encoder.pos_embed.data, resized(positions, encoder.config.grid))
    loaded = encoder.state_dict()
    for name in loaded.keys() - {"pos_embed", "patch_embed.proj.weight"}:
        assert torch.equal(loaded[name], before[name]), name
        assert loaded[name].data_ptr() != vit[name].data_ptr(), name  # a copy
    assert vit.keys() == before.keys()
    for name, tensor in before.items():  # the caller's tensors are unchanged
        assert torch.equal(vit[name], tensor), name
    image = torch.rand(2, 3, 32, 48)
    weight, bias = vit["patch_embed.proj.weight"], vit["patch_embed.proj.bias"]
    expected = torch.nn.functional.conv2d(image, weight, bias, stride=16).flatten(2).mT
    assert largest_difference(encoder.patch_embed(image), expected) <= 1e-5


@pytest.mark.parametrize("prefix", [[], CLASS, REGISTERS, [*DISTILLED, ("reg_token", 7)]])
def test_positions_are_the_last_that_form_a_square_or_refused_if_none_or_two_do(prefix):
    prefix_tokens = sum(number for _, number in prefix)
    for positions in range(60):
        encoder, vit = unetr.ViT(small(num_layers=4)), vit_checkpoint(positions, prefix)
        sides = [n for n in range(1, 9) if 0 <= positions - n**2 <= prefix_tokens]
        if len(sides) == 1:
            unetr.load_vit(encoder, vit)
            square = vit["pos_embed"][:, positions - sides[0] ** 2 :].unflatten(1, sides * 2)
            torch.testing.assert_close(encoder.pos_embed.data, resized(square, (4, 4)))
        else:
            rule = f"one square grid after at most {prefix_tokens} prefix tokens"
            with pytest.raises(ValueError, match=f"^pos_embed .*{rule}, got {positions} positions"):
                unetr.load_vit(encoder, vit)


def test_a_grid_of_positions_is_taken_as_it_is():
    vit = vit_checkpoint(16)
    vit["pos_embed"] = torch.rand(1, 2, 8, 24)
    encoder = unetr.ViT(small(image_size=(32, 128), num_layers=4))
    unetr.load_vit(encoder, vit)
    assert torch.equal(encoder.pos_embed, vit["pos_embed"])
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        unetr.load_vit(unetr.ViT(small(num_layers=4)), vit)


LACKING = """
blocks.0.ls1.gamma blocks.0.attn.q_norm.weight blocks.0.attn.k_norm.bias norm_pre.weight
blocks.1.attn.norm.weight blocks.0.attn.rel_pos_h rope.freqs neck.0.weight headroom.weight normal
cls_token_2 blocks.4.norm1.weight blocks.0.mlp.fc1_g.weight
"""
REQUIRED = """
pos_embed patch_embed.proj.weight patch_embed.proj.bias blocks.0.attn.qkv.bias blocks.3.norm1.weight
"""


@pytest.mark.parametrize("name", LACKING.split())
def test_a_parameter_that_the_encoder_lacks_is_refused(name):
    vit = {**vit_checkpoint(16), name: torch.ones(24)}
    with pytest.raises(RuntimeError, match=f'Unexpected.*"{re.escape(name)}"'):
        unetr.load_vit(unetr.ViT(small(num_layers=4)), vit)


@pytest.mark.parametrize("name", REQUIRED.split())
def test_a_missing_parameter_is_refused(name):
    vit = vit_checkpoint(16)
    del vit[name]
    with pytest.raises(RuntimeError, match=f'Missing.*"{re.escape(name)}"'):
        unetr.load_vit(unetr.ViT(small(num_layers=4)), vit)


def test_a_wrapped_vit_is_refused():
    vit = vit_checkpoint(16)
    for wrapped in ({"model": vit}, {f"module.{name}": vit[name] for name in vit}):
        with pytest.raises(RuntimeError, match=r'Missing.*"patch_embed\.proj\.weight"'):
            unetr.load_vit(unetr.ViT(small(num_layers=4)), wrapped)


@pytest.mark.parametrize(
    "name, shape, sizes",
    [
        ("patch_embed.proj.weight", (24, 3, 16, 16), dict(in_channels=12, patch_size=8)),  # as many
        ("patch_embed.proj.weight", (24, 1, 16, 16), {}),
        ("patch_embed.proj.weight", (24, 3, 16, 14), {}),
        ("pos_embed", (1, 16, 48), {}),
        ("pos_embed", (16, 24), {}),
        ("pos_embed", (1, 4, 4, 1, 24), {}),
        ("blocks.0.mlp.fc1.weight", (41, 24), {}),
    ],
)
def test_a_parameter_of_another_shape_is_refused(name, shape, sizes):
    vit = {**vit_checkpoint(16), name: torch.zeros(shape)}
    with pytest.raises(RuntimeError, match=f"size mismatch for {re.escape(name)}"):
        unetr.load_vit(unetr.ViT(small(num_layers=4, **sizes)), vit)
