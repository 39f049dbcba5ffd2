"""bf16 in a kernel, interpreted too; which path tensors take; and the fp32 detour of CPUs that cannot multiply bf16
matrices, against the exact answer rounded once."""

import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import bf16, mlp, norm, qkv
from kernels.cross_entropy import head_loss
from kernels.mlp import relu2_mlp
from kernels.newton_schulz import newton_schulz


@triton.jit
def cast_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


def cast_by_a_kernel(x, dtype):
    y = torch.empty_like(x, dtype=dtype, device=DEVICE)
    cast_kernel[(len(x) // 4096,)](x.to(DEVICE), y, BLOCK=4096)
    return y.cpu()


def test_a_kernel_rounds_to_bf16_as_torch_does():
    """Kills: a cast that cuts off, takes a tie up or away from zero, loses a carry into the exponent, an infinity, a
    NaN or a denormal. All upper halves of an fp32 number, with lower halves around none, a half and one of bf16's unit.
    """
    high = torch.arange(2**16).repeat(6)
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).repeat_interleave(2**16)
    x = (high * 2**16 + low).to(torch.uint32).view(torch.float32)
    ours = cast_by_a_kernel(x, torch.bfloat16)
    nearest = high + ((low > 0x8000) | (low == 0x8000) & (high % 2 == 1))
    number = ~x.isnan()
    assert torch.equal(ours.view(torch.uint16)[number].long(), nearest[number]) and ours[~number].isnan().all()
    assert torch.equal(ours[number], x.bfloat16()[number])


def test_a_kernel_widens_bf16_exactly():
    """Kills: the bits of bf16 taken for an integer, a denormal that is lost."""
    x = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    assert torch.equal(cast_by_a_kernel(x, torch.float32).nan_to_num(7), x.float().nan_to_num(7))


@triton.jit
def dot_kernel(a, b, c):
    i = tl.arange(0, 16)
    here = 16 * i[:, None] + i[None, :]
    tl.store(c + here, tl.dot(tl.load(a + here), tl.load(b + here), tl.load(c + here)))


def test_a_kernel_multiplies_bf16():
    """Kills: a product of the bits, of what was rounded before, a sum in bf16. Operands of few bits: it is exact."""
    a, b, c = torch.randint(-127, 128, (3, 16, 16), generator=torch.Generator().manual_seed(0))
    ours = c.to(DEVICE, torch.float32)
    dot_kernel[(1,)](*((t / 8).to(DEVICE, torch.bfloat16) for t in (a, b)), ours)
    assert torch.equal(ours.cpu().double(), a.double() @ b.double() / 64 + c)


@pytest.fixture(params=[True, False], ids=["native", "detour"])
def cpu(request, monkeypatch):
    monkeypatch.setattr(bf16, "CPU_MULTIPLIES_BF16", request.param)


def test_linear_rounds_its_result_and_gradients_once(cpu):
    """Kills: a detour in unrounded fp32 weights, a result or gradient left in fp32 or rounded twice.

    Sums of 96 products in float64, rounded to bf16, are met but for ties that fp32 sums decide otherwise: 1%.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 96, generator=generator).bfloat16().requires_grad_()
    W = torch.randn(64, 96, generator=generator).requires_grad_()
    b = torch.randn(64, generator=generator).requires_grad_()
    dy = torch.randn(40, 64, generator=generator).bfloat16()
    y = bf16.linear(x, W, b)
    y.backward(dy)
    X, V, c, dY = (t.detach().bfloat16().double() for t in (x, W, b, dy))
    assert (y.dtype, x.grad.dtype, W.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for ours, exact in ((y, X @ V.T + c), (x.grad, dY @ V), (W.grad, dY.T @ X)):
        assert (ours.double() == exact.bfloat16().double()).double().mean() > 0.99


def test_newton_schulz_rounds_alike(cpu):
    """Kills: a product that is not rounded, an iteration that stays in fp32. 5% of ties fall otherwise."""
    X = torch.randn(3, 32, 96, generator=torch.Generator().manual_seed(1)).bfloat16() / 16
    exact = X.double()
    for a, b, c in [(2.0, -1.5, 0.5)] * 2:
        A = (exact @ exact.mT).bfloat16().double()
        B = (b * A + c * A @ A).bfloat16().double()
        exact = (a * exact + B @ exact).bfloat16().double()
    ours = newton_schulz(X, [(2.0, -1.5, 0.5)] * 2)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() == exact).double().mean() > 0.95


class Products(TorchDispatchMode):
    """The dtypes of the matrices that are multiplied in it."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__:
            self.dtypes += [t.dtype for t in args if t.ndim == 2]
        return function(*args, **(kwargs or {}))


def test_the_mlp_and_the_head_take_the_detour(cpu):
    """Kills: a product of theirs, forward or backward, that goes past `linear` to PyTorch's loops."""
    x, W, b, V = (torch.ones(shape, dtype=torch.bfloat16, requires_grad=True)
                  for shape in ((5, 8), (16, 8), (16,), (8, 16)))
    with Products() as products:
        head_loss(relu2_mlp(x, W, b, V), W, b, torch.arange(5)).backward()
    used = torch.bfloat16 if bf16.CPU_MULTIPLIES_BF16 else torch.float32
    assert products.dtypes == [used] * 18  # three products each, and the gradients of their two operands


@pytest.mark.parametrize("capability, kernels", [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
@pytest.mark.parametrize("module, function, inputs", [
    (mlp, "relu2_mlp", 4), (norm, "prenorm", 3), (qkv, "qkv_heads", 6)])
def test_dispatch(module, function, inputs, capability, kernels, monkeypatch):
    """Kills: a GPU that takes the plain path without a word, an older one that is sent to the kernels. Nothing is
    computed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    called = []
    for name in (f"fused_{function}", f"{function}_reference"):
        monkeypatch.setattr(module, name, lambda *operands, name=name: called.append(name))
    dispatcher = getattr(module, function)
    with FakeTensorMode():
        dispatcher(*[torch.empty(2, device="cuda")] * inputs)
    dispatcher(*[torch.empty(2)] * inputs)
    assert called == [f"fused_{function}" if kernels else f"{function}_reference", f"{function}_reference"]
