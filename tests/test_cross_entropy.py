"""Loss and gradients of the head, in row blocks and in kernels, against autograd in float64.

The kernels run where interpreter.py says, in conftest.py's dtypes. A kernel's error is at most twice that of PyTorch in
the same dtype.
"""

import math
import mmap
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, MATMUL_DTYPES, ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.log import flatten
from kernels import cross_entropy
from kernels.cross_entropy import (ROWS, fused_head_loss, head_loss, head_loss_op,
                                   head_loss_reference, losses_of_rows, rows_at_once, softcapped_cross_entropy_,
                                   softcapped_cross_entropy_reference, to_gradient_)


def exact(logits, targets):
    x = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(15 * x / (x.square() + 225).sqrt(), targets, reduction="sum")
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("tokens", [1, ROWS, 3 * ROWS + 5])
def test_loss_and_gradient(tokens):
    """Kills: a last block that is skipped, a softcap whose derivative is dropped, a onehot in the wrong row.

    Logits up to 60 saturate the cap. fp32 sums of 1000 terms: 1e-5 relative.
    """
    generator = torch.Generator().manual_seed(tokens)
    logits = (20 * torch.randn(tokens, 1000, generator=generator)).requires_grad_()
    targets = torch.randint(1000, (tokens,), generator=generator)
    true_loss, true_gradient = exact(logits, targets)
    (3 * softcapped_cross_entropy_reference(logits, targets)).backward()
    torch.testing.assert_close(logits.grad.double(), 3 * true_gradient, rtol=1e-4, atol=1e-6)

    leaf = logits.detach().clone().requires_grad_()
    loss = softcapped_cross_entropy_(leaf * 1, targets)
    (3 * loss).backward()
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(leaf.grad.double(), 3 * true_gradient, rtol=1e-4, atol=1e-6)


def test_bf16_gradient_is_the_exact_one_rounded_once():
    """Kills: an intermediate kept in bf16. One rounding is 2^-9 relative; 2^-8 leaves room for nothing else."""
    generator = torch.Generator().manual_seed(0)
    leaf = (5 * torch.randn(40, 1000, generator=generator)).bfloat16().requires_grad_()
    targets = torch.randint(1000, (40,), generator=generator)
    softcapped_cross_entropy_(leaf * 1, targets).backward()
    torch.testing.assert_close(leaf.grad.double(), exact(leaf, targets)[1], rtol=2**-8, atol=1e-30)


def test_validation_leaves_the_logits_alone():
    """Kills: a gradient written where none is wanted. Equal logits have loss ln(vocabulary)."""
    logits = torch.zeros(20, 64)
    with torch.no_grad():
        loss = softcapped_cross_entropy_(logits, torch.arange(20))
    assert torch.equal(logits, torch.zeros(20, 64))
    assert loss.item() == pytest.approx(20 * math.log(64), rel=1e-6)


@pytest.mark.parametrize("dtype", MATMUL_DTYPES)
@pytest.mark.parametrize("tokens, vocabulary", [(40, 4500), (1030, 30)])
def test_kernels(tokens, vocabulary, dtype, poisoned):
    """Kills: a last block of rows or columns that is skipped, read beyond its edge or written there, a dropped
    derivative of the softcap, a target in the wrong row, column sums that miss the last rows or take the unrounded
    gradient. Neither size is a multiple of a block; the rows lie in a wider tensor of NaN.
    """
    generator = torch.Generator().manual_seed(tokens)
    values = (20 * torch.randn(tokens, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    true_loss, true_gradient = exact(values, targets)
    torchs = values.clone().requires_grad_()
    softcapped_cross_entropy_reference(torchs, targets).backward()

    wide = torch.full((tokens, vocabulary + 9), math.nan, dtype=dtype, device=DEVICE)
    logits = wide[:, 4:-5]
    logits.copy_(values)
    targets = targets.to(DEVICE)
    losses, totals = losses_of_rows(logits, targets)
    assert torch.equal(logits.cpu(), values)
    sums = to_gradient_(logits, targets, totals)
    torch.testing.assert_close(losses.sum().cpu().double(), true_loss, rtol=1e-6, atol=0)  # fp32 sums
    assert (logits.cpu() - true_gradient).norm() <= 2 * (torchs.grad - true_gradient).norm()
    assert wide[:, :4].isnan().all() and wide[:, -5:].isnan().all()
    assert ((sums - logits.double().sum(0)).abs() <= 1e-6 * logits.double().abs().sum(0)).all()


def test_offsets_beyond_int32():
    """Kills: a row times a stride in int32, in any of the three places: 65,536 x 50,304 is above 2^31.

    Rows lie 2^21 + 2^12 elements apart: row 1023's offset within its block, and that of the block that begins at
    row 1024, are above 2^31. Of the map of 8.6 GB only the rows' pages are ever touched; the wrapped offsets are
    inside it, so what is wrong fails and does not crash.
    """
    tokens, vocabulary, stride = 1026, 24, 2**21 + 2**12
    if DEVICE.type == "cuda":
        memory = torch.empty(2**32 + 2 * stride, dtype=torch.float16, device=DEVICE)
    else:
        MAP_NORESERVE = 0x4000
        bare = mmap.mmap(-1, 2 * (2**32 + 4 * stride), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        memory = torch.frombuffer(bare, dtype=torch.float16)
    logits = memory[2**31:].as_strided((tokens, vocabulary), (stride, 1))
    generator = torch.Generator().manual_seed(0)
    values = (5 * torch.randn(tokens, vocabulary, generator=generator)).half()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    logits.copy_(values)
    losses, totals = losses_of_rows(logits, targets.to(DEVICE))
    to_gradient_(logits, targets.to(DEVICE), totals)
    true_loss, true_gradient = exact(values, targets)
    torch.testing.assert_close(losses.sum().cpu().double(), true_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.cpu().double(), true_gradient, rtol=2**-11, atol=1e-6)


def head(tokens, dim, vocabulary, dtype, device=DEVICE):
    """x, weight and bias, that want gradients, and targets."""
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, dim), (vocabulary, dim), (vocabulary,)
    leaves = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    return leaves, torch.randint(vocabulary, (tokens,), generator=generator).to(device)


def loss_and_gradients(function, leaves, targets):
    """Of 3 times the loss."""
    loss = function(*leaves, targets)
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]


def in_parts(rows):
    return lambda *inputs: fused_head_loss(*inputs, rows)


@pytest.mark.parametrize("dtype", MATMUL_DTYPES)
@pytest.mark.parametrize("function, device", [(in_parts(50), DEVICE), (in_parts(20), DEVICE), (head_loss, "cpu")],
                         ids=["kernels", "kernels, 3 parts", "row blocks"])
def test_head(function, device, dtype, poisoned):
    """Kills: a gradient of the wrong product, part or dtype, one that ignores the incoming gradient, a weight's
    gradient of the last part alone, a bias left out."""
    leaves, targets = head(50, 24, 600, dtype, device)
    true = loss_and_gradients(head_loss_reference, [p.detach().double().requires_grad_() for p in leaves], targets)
    torchs = loss_and_gradients(head_loss_reference, leaves, targets)
    ours = loss_and_gradients(function, leaves, targets)
    assert [t.dtype for t in ours] == [torch.float32, dtype, dtype, dtype]
    assert abs(ours[0] - true[0]) <= 2 * abs(torchs[0] - true[0]) + 1e-6 * true[0]
    for mine, its, exactly in zip(ours[1:], torchs[1:], true[1:]):
        assert (mine - exactly).norm() <= 2 * (its - exactly).norm()


def test_parts_change_nothing_but_rounding():
    """Kills: a part's gradient rounded before it is added to the others': that is off by 2^-9 or so.

    Small integers make the logits the same however they are computed. All gradients are sums in fp32, rounded once,
    and differ where another order of summation decides which way: at one place in a thousand, by 2^-8.
    """
    leaves, targets = head(50, 24, 600, torch.bfloat16)
    leaves = [p.detach().round().requires_grad_() for p in leaves]
    whole, parts = (loss_and_gradients(in_parts(rows), leaves, targets) for rows in (50, 1))
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-6, atol=0)
    for one, other in zip(parts[1:], whole[1:]):
        assert ((one - other).double().norm() <= 2**-12 * other.double().norm())


class Held(TorchDispatchMode):
    """The most bytes that the tensors made in the head's operator hold at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = weakref.WeakValueDictionary(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.kernels.head_loss.default:  # look inside
            with self:
                return head_loss_op._init_fn(*args)
        made = function(*args, **(kwargs or {}))
        self.alive.update((id(t), t) for t in tree_leaves(made) if isinstance(t, torch.Tensor))
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in list(self.alive.values()))}
        self.peak = max(self.peak, sum(storages.values()))
        return made


@pytest.mark.parametrize("rows", [128, 64])
def test_the_head_holds_one_part_of_the_logits(rows):
    """Kills: a gradient beside the logits, two parts' logits at a time, buffers for gradients in validation.

    The width is 1: what else there is are at most 8 columns of as many numbers as the vocabulary has, the weights,
    the gradients' sums and products; in validation the weights alone. With 65,536 rows of width 768 that is 7%.
    """
    leaves, targets = head(128, 1, 4000, torch.float32)
    column = 4000 * 4
    with Held() as training:
        fused_head_loss(*leaves, targets, rows)
    with Held() as validation, torch.no_grad():
        loss = fused_head_loss(*leaves, targets, rows)
    assert rows * column < training.peak < (rows + 8) * column
    assert rows * column < validation.peak < (rows + 2) * column
    assert not loss.requires_grad
    torch.testing.assert_close(loss, head_loss_reference(*leaves, targets).detach(), rtol=1e-6, atol=0)


def test_one_graph(monkeypatch):
    """Kills: an operator that breaks the graph, a shape or dtype that its fake gets wrong, a mutation that the
    compiler does not see, a property of the device that it cannot trace."""
    leaves, targets = head(50, 24, 600, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 * 20 * 1200))

    def doubled(x, weight, bias, targets):
        return 2 * fused_head_loss(2 * x, weight, bias, targets, rows_at_once(x.device, len(weight) * x.element_size()))

    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True, dynamic=False)
    for ours, eager in zip(*(loss_and_gradients(f, leaves, targets) for f in (compiled, doubled)), strict=True):
        assert torch.equal(ours, eager)
    with torch.no_grad():
        assert torch.equal(compiled(*leaves, targets), doubled(*leaves, targets))
    torch.library.opcheck(head_loss_op, (*(p.detach() for p in leaves), targets, 20, True),
                          test_utils=("test_schema", "test_faketensor"))


def test_a_logged_script_alone(tmp_path):
    """Kills: an operator that only the module can register. The script runs in a process of its own: torch frees an
    operator when another of its name is registered, so one process cannot hold both."""
    inputs = *head(5, 8, 60, torch.float32)[0], torch.arange(5, device=DEVICE)
    torch.save(inputs, tmp_path / "inputs.pt")
    script = tmp_path / "script.py"
    script.write_text(flatten(ROOT / "kernels" / "cross_entropy.py", ROOT) + f"""
inputs = torch.load("inputs.pt", map_location={str(DEVICE)!r})
torch.save(fused_head_loss(*inputs, 5), "loss.pt")
""")
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "loss.pt", map_location=DEVICE), fused_head_loss(*inputs, 5))


@pytest.mark.parametrize("capability, kernels", [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_dispatch(capability, kernels, monkeypatch):
    """Kills: a GPU that takes the plain path without a word, an older one that is sent to the kernels. Nothing is
    computed: the tensors are fake."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    called = []
    monkeypatch.setattr(cross_entropy, "fused_head_loss", lambda *inputs: called.append(inputs[-1]))
    with FakeTensorMode():
        shapes = (8, 4), (50304, 4), (50304,)
        leaves = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        head_loss(*leaves, torch.empty(8, dtype=torch.int64, device="cuda"))
    assert bool(called) == kernels
    # an eighth of 80 GB holds the logits of a micro-batch, of 24 GB half of them
    assert not kernels or 65536 < called[0] == 10 * 2**30 // (2 * 50304)
