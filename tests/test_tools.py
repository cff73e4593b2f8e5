"""PyTorch's own tools work on the network, on the CPU and on an accelerator if available."""

import copy
import functools
import io
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, largest_difference, small, unetr
from torch import nn
from torch.utils.checkpoint import checkpoint


def build(device="cpu"):
    torch.manual_seed(0)
    return unetr.UNETR(small()).to(device)


def image(device="cpu", batch=2, size=(64, 64)):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1)).to(device)


def backward(model, x):
    """The gradients of a training step, by name."""
    model(x).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}


def report(what, ours, theirs, tolerance):
    largest = max(map(largest_difference, ours, theirs))
    print(f"\n{what}: {largest:.1e}")
    assert largest <= tolerance


def test_compiled_prediction_at_two_image_sizes_with_gradients_enabled(device):
    """With gradients enabled: what one gets from torch.compile(model) without further thought."""
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("on the CPU, torch.compile requires a C++ compiler")
    if device.type == "mps":
        pytest.skip("MPS has no double precision, without which rounding can switch a ReLU")
    config = small(patch_size=2, image_size=8, num_layers=1)  # one stage: quicker to compile
    model = unetr.UNETR(config).to(device).double().eval()
    nn.init.normal_(model.encoder.pos_embed)
    compiled = torch.compile(model)
    for size in ((8, 8), (12, 6)):
        x = image(device, size=size).double()
        report(f"compiled, {size}, {device}", [compiled(x)], [model(x)], 1e-11)


def test_export_with_a_dynamic_batch_and_back(device):
    model, buffer = build(device).eval(), io.BytesIO()
    dynamic = {"image": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (image(device),), dynamic_shapes=dynamic)
    torch.export.save(program, buffer)
    buffer.seek(0)
    restored = torch.export.load(buffer).module()
    batches = [image(device, size) for size in (1, 2, 5)]
    report(f"exported and restored, {device}", map(restored, batches), map(model, batches), 1e-5)


@pytest.mark.parametrize("resizable", [False, True])
@pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations
def test_onnx_export_gives_the_same_in_onnxruntime(tmp_path, resizable):
    """With a dynamic batch; and exported at another size than configured, at every size."""
    reason = "onnxruntime has no wheel for Python 3.15"
    onnxruntime = pytest.importorskip("onnxruntime", reason=reason)
    model, file = build().eval(), tmp_path / "unetr.onnx"  # configured for 64 x 64
    nn.init.normal_(model.encoder.pos_embed)
    rows, columns = (torch.export.Dim(name, max=64) for name in ("rows", "columns"))
    dynamic = {2: 16 * rows, 3: 16 * columns} if resizable else {0: torch.export.Dim("batch")}
    x = image(size=(48, 80) if resizable else (64, 64))
    options = dict(dynamo=True, dynamic_shapes={"image": dynamic}, verbose=False)
    torch.onnx.export(model, (x,), file, **options)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    sizes = ((64, 64), (32, 128), (16, 256), (48, 80), (16, 16), (144, 96))
    batches = (
        [image(size=size) for size in sizes] if resizable else [image(batch=1), image(batch=5)]
    )
    logits = [torch.from_numpy(session.run(None, {"image": x.numpy()})[0]) for x in batches]
    what = f"in ONNX Runtime, dynamic {'size' if resizable else 'batch'}"
    report(what, logits, map(model, batches), 1e-5)


def test_autocast_in_bfloat16(device):
    model = build(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = model(image(device))
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    expected = build(device)(image(device))
    assert (logits - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_half_precision(device):
    model = build(device).to(torch.bfloat16).eval()
    assert model(image(device).to(torch.bfloat16)).dtype == torch.bfloat16


def test_meta_device_needs_no_memory():
    with torch.device("meta"):
        model = unetr.UNETR(small())
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1, 64, 64)
    model.load_state_dict(build().state_dict(), assign=True)
    assert torch.equal(model.eval()(image()), build().eval()(image()))


def test_pickle_and_deepcopy():
    model = build().eval()
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(copied(image()), model(image()))
        copied.load_state_dict(model.state_dict())


def train_in_parallel(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = nn.parallel.DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # an unused parameter would be an error in the second step
        optimizer.zero_grad()
        backward(model, image()[rank : rank + 1])
        optimizer.step()
    torch.save(dict(model.module.named_parameters()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_distributed_data_parallel_with_two_processes(tmp_path):
    torch.multiprocessing.spawn(train_in_parallel, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    start = dict(build().named_parameters())
    for name in start:
        assert torch.equal(first[name], second[name]), name
        assert not torch.equal(first[name], start[name]), name


def test_gradient_checkpointing_gives_the_same_gradients(device):
    model, checkpointed = build(device), build(device)
    for block in checkpointed.encoder.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    x = image(device)
    torch.testing.assert_close(backward(checkpointed, x), backward(model, x), atol=1e-6, rtol=1e-5)


PEAK = """
import importlib, re, sys
from pathlib import Path
sys.path.insert(0, {root!r})
unetr = importlib.import_module("UNETR-2D")
import torch
sizes = dict(hidden_dim=32, num_layers=2, num_heads=2, mlp_dim=32, feature_size=1)
model = unetr.UNETR(unetr.UNETRConfig({side}, 2, **sizes))
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
model(torch.rand(1, 3, {side}, {side})).mean().backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_grows_linearly_with_the_tokens():
    def peak(side):
        code = PEAK.format(root=str(ROOT), side=side)
        return float(subprocess.check_output([sys.executable, "-c", code], text=True))

    # 4,096 and 16,384 tokens, whose N x N matrices of two heads would take 2 GiB
    small, large = peak(128), peak(256)
    print(f"\n4096 tokens: {small:.0f} MiB, 16384 tokens: {large:.0f} MiB")
    assert large < 5 * small and large < 512
