"""What torch.compile makes of the model for an H100 that need not be there: kernels, bytes moved, memory held.

    python -m bench.graph [@RECIPE] [NAME=VALUE ...] [-o FOLDER]

Both programs, train_gpt.py's (fused) and, of relu^2 MLPs, bench/baseline.py's (published), are traced at the recipe's
size, forwards and backwards, and TorchInductor writes its Triton kernels, as in a run; then it stops, before anything
is compiled or allocated. Bytes are Inductor's own count: each kernel reads and writes each of its buffers once, so of
a kernel that reads twice, or keeps something in memory for itself, it is the least. A product and an opaque operator
count their operands and results; the head's, fused, has the logits inside, which no graph shows, and is left out.
Attention stands for any of its backends. Beside it, what bench/roofline.py takes for the same kernels.

Memory is counted by running what Inductor wrote on tensors without data, with kernels that do nothing: it allocates and
frees as it would, and so do the launchers of the opaque operators. What the caching allocator, cuBLAS or attention need
beyond the tensors is not in it.

The tensors are fake and live on the CPU while autograd traces them; then they are said to be on a GPU. What asks for
that GPU is told of an H100. `torch._inductor` is private: this holds for the pinned version.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decomposition_table
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, config, ir
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import joint_graph, reinplace
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import train_gpt
from bench import parse, roofline, run
from bench.baseline import UnfusedGPT
from kernels import bf16, cross_entropy, mlp, newton_schulz, norm, qkv
from results import markdown, publish
from rules import COMPILED, Rule, advance_

CARD = SimpleNamespace(name="NVIDIA H100", type="cuda", index=0, major=9, minor=0, multi_processor_count=132,
                       warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
                       max_threads_per_block=1024, total_memory=80 << 30, L2_cache_size=50 << 20,
                       shared_memory_per_block_optin=227 << 10)
TOLD = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)

COUNTED = 1_000_000_000  # elements of a buffer, at most, in Inductor's count of what a fused kernel moves


class Written(Exception):
    """All kernels are written: nothing is to follow."""


########################################
#        Attention, any backend        #
########################################

@torch.library.custom_op("bench::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@torch.library.custom_op("bench::attention_backward", mutates_args=())
def attention_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor,
                       lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


attention.register_fake(lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)))
attention_backward.register_fake(lambda dy, q, k, v, y, lse: tuple(map(torch.empty_like, (q, k, v))))
attention.register_autograd(lambda ctx, dy, _: attention_backward(dy, *ctx.saved_tensors),
                            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


########################################
#               Tracing                #
########################################

def on_an_h100() -> ExitStack:
    """Whatever asks for the GPU is told of one."""
    stack, always = ExitStack(), lambda value: lambda *_, **__: value
    for target, name, value in [
            (torch.cuda, "is_available", always(True)), (torch.cuda, "_lazy_init", always(None)),
            (torch.cuda, "device_count", always(1)), (torch.cuda, "current_device", always(0)),
            (torch.cuda, "_exchange_device", always(0)), (torch.cuda, "_maybe_exchange_device", always(0)),
            (torch.cuda, "get_device_capability", always((9, 0))), (torch.cuda, "get_device_properties", always(CARD)),
            (torch.cuda, "get_rng_state", always(torch.zeros(16, dtype=torch.uint8))),
            (torch.cuda, "set_rng_state", always(None)), (torch.version, "cuda", "12.9"),
            (CudaInterface, "get_device_properties", always(CARD)), (CudaInterface, "is_available", always(True)),
            (CudaInterface.Worker, "get_device_properties", always(CARD)),
            (CudaInterface, "get_compute_capability", always(90)), (CudaInterface, "is_triton_capable", always(True)),
            (CudaInterface, "raise_if_triton_unavailable", always(None)), (driver, "_active", TOLD),
            (joint_graph, "lazy_init", always(None)),  # patterns of attention, which are traced on the GPU
            (reinplace, "_inplace_generalized_scatter", lambda whole, part, views: whole),  # only a shape is wanted
            (F, "scaled_dot_product_attention", lambda q, k, v, **_: attention(q, k, v)[0]),
            *((module, "runs_kernels", always(True)) for module in (cross_entropy, mlp, newton_schulz, norm, qkv)),
            (bf16, "CPU_MULTIPLIES_BF16", True)]:
        stack.enter_context(mock.patch.object(target, name, value))
    scatter = torch.ops.aten._unsafe_masked_index_put_accumulate.default  # of the embedding's gradient, only a shape
    stack.enter_context(mock.patch.dict(decomposition_table, {scatter: lambda whole, *_: torch.empty_like(whole)}))
    stack.enter_context(config.patch(fx_graph_cache=False, compile_threads=1))
    return stack


def to_gpu(value):
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")


class Pass(NamedTuple):
    """Forwards or backwards, as Inductor writes it."""
    kernels: list[tuple[str, int]]  # what runs each, and its bytes
    source: str
    inputs: list[tuple]  # size, stride, dtype of each


def written(graph: torch.fx.GraphModule, inputs: list, **kwargs) -> Pass:
    """What Inductor writes for a graph of the CPU, as if it were the GPU's."""
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = node.kwargs | {"device": torch.device("cuda:0")}
        node.meta = {name: tree_map(to_gpu, value) for name, value in node.meta.items() if name != "tensor_meta"}
    graph.recompile()
    kernels, sources = [], []

    def count(lowering: GraphLowering):
        sources.append(lowering.codegen()[0].value)
        kernels.extend(map(kernel, lowering.scheduler.nodes))
        raise Written

    with (mock.patch.object(GraphLowering, "compile_to_module", count),
          mock.patch.object(compile_fx, "fake_tensor_prop", lambda *_: detect_fake_mode(inputs))):  # it is done
        try:
            compile_fx.compile_fx_inner(graph, tree_map(to_gpu, inputs), cudagraphs=False, **kwargs)
        except torch._inductor.exc.InductorError as error:
            if not isinstance(error.inner_exception, Written):
                raise
    return Pass([found for found in kernels if found], *sources,
                [(tuple(x.shape), x.stride(), x.dtype) for x in inputs])


def kernel(node) -> tuple[str, int] | None:
    """Of a node of Inductor's schedule: what runs it, and its bytes; None where nothing does."""
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return None
    if not node.is_extern():
        return "Inductor", node.get_read_write_buffers_sizes()
    runs = node.node.python_kernel_name.removeprefix("torch.ops.").removesuffix(".default")
    results = node.node.outputs if isinstance(node.node, ir.FallbackKernel) else [node.node]
    if runs.endswith("_"):  # in place, by PyTorch's convention
        results = [*results, node.node.inputs[0]]
    return runs, sum(int(x.get_numel()) * x.get_dtype().itemsize for x in (*node.node.inputs, *results))


PROGRAMS = {"fused": (train_gpt.GPT, torch.bfloat16), "published": (UnfusedGPT, torch.float32)}


def programs(hp: train_gpt.Hyperparameters) -> list[str]:
    """Those that have the recipe's MLP: the published one has relu^2 alone."""
    return [name for name in PROGRAMS if name == "fused" or hp.activation == "relu2"]


@cache
def trace(form: str, hp: train_gpt.Hyperparameters) -> dict[str, Pass]:
    """{"forward": its pass, "backward": its pass} of a program, named as in bench/roofline.py."""
    make, dtype = PROGRAMS[form]  # of the parameters; the embedding has its own
    with torch.device("meta"):
        model = make(hp)
        inputs = [torch.empty(hp.micro_batch, hp.sequence_length, dtype=kind) for kind in (torch.int32, torch.int64)]
    parameters, buffers, passes = dict(model.named_parameters()), dict(model.named_buffers()), {}
    mode = FakeTensorMode()

    def compiler(graph, inputs, name):
        results = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]  # of the CPU still
        passes[name] = written(graph, inputs, is_backward=name == "backward")
        return make_boxed_func(lambda *_: [x if x is None else torch.empty_like(x) for x in results])

    def partition(graph, inputs, **kwargs):
        joint_graph.joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **kwargs)

    def loss(*values):
        return functional_call(model, dict(zip([*parameters, *buffers], values)), values[-2:])

    with on_an_h100(), mode, tracing(TracingContext(mode)):
        values = [torch.empty(p.shape, dtype=p.dtype if name == "embed.weight" else dtype, requires_grad=True)
                  for name, p in parameters.items()]
        values += [torch.empty(x.shape, dtype=x.dtype) for x in (*buffers.values(), *inputs)]
        aot_function(loss, partial(compiler, name="forward"), partial(compiler, name="backward"), partition,
                     select_decomp_table())(*values).backward()
    return passes


def trace_update(bank: train_gpt.Bank) -> Pass:
    """The update of a stack of matrices."""
    mode, passes = FakeTensorMode(), []

    def update(*tensors):
        advance_(bank.rule, *tensors)
        return ()

    def compiler(graph, inputs):
        passes.append(written(graph, inputs))
        return make_boxed_func(lambda *_: [])

    with on_an_h100(), config.patch(COMPILED), mode, tracing(TracingContext(mode)), torch.no_grad():
        W, G = torch.empty(bank.masters.shape), torch.empty(bank.masters.shape)
        knobs = {name: torch.empty(knob.shape) for name, knob in bank.knobs.items()}
        aot_function(update, compiler, decompositions=select_decomp_table(), inference_compiler=compiler,
                     keep_inference_input_mutations=True)(W, G, bank.rule.state(W), knobs)
    return passes[0]


########################################
#                Memory                #
########################################

OPERATORS = {op._opoverload: op._init_fn for op in (cross_entropy.head_loss_op, mlp.relu2_up, mlp.relu2_dpre,
                                                    norm.dprenorm_op, qkv.norm_and_rotate_op, qkv.dqkv_op,
                                                    newton_schulz.newton_schulz_op)}


def without_data(size: tuple, stride: tuple, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


class Memory(TorchDispatchMode):
    """Bytes of the tensors that were made in it and still exist; `most`, since the last look, at once."""

    def __init__(self):
        super().__init__()
        self.tensors, self.most = {}, 0

    def held(self) -> int:
        self.tensors = {storage: size for storage, size in self.tensors.items() if not storage.expired()}
        return sum(self.tensors.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with self if function in OPERATORS else nullcontext():  # what a launcher allocates counts
            result = OPERATORS.get(function, function)(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.tensors[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        self.most = max(self.most, self.held())
        return result


def program(source: str) -> Callable[[list[Tensor]], tuple]:
    """A pass that allocates and frees, and computes nothing."""
    idle = SimpleNamespace(run=lambda *_, **__: None)
    names = {"__name__": "written"}
    with (mock.patch.object(AsyncCompile, "triton", lambda *_, **__: idle),
          mock.patch.object(AsyncCompile, "wait", lambda *_: None),
          mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True)):
        exec(source, names)
    names |= {"empty_strided_cuda": without_data, "assert_alignment": lambda *_: None,
              "copy_if_misaligned": lambda x: x}
    return names["call"]


@contextmanager
def idle_gpu() -> Iterator[Memory]:
    """The memory of what runs inside, where kernels do nothing."""
    product = "_fp32_product", lambda A, B: A.new_empty(len(A), B.size(1), dtype=torch.float32)
    with (mock.patch.object(JITFunction, "run", lambda *_, **__: None), mock.patch.object(cross_entropy, *product),
          mock.patch.object(torch.cuda, "_DeviceGuard", lambda _: nullcontext()),
          mock.patch.object(torch.cuda, "device_of", lambda _: nullcontext()),
          mock.patch.object(torch.cuda, "set_device", lambda _: None), Memory() as count):
        yield count


def memory(passes: dict[str, Pass]) -> dict[str, int]:
    """Bytes beside the parameters: kept from the forward pass for the backward pass, and the most in each of them."""
    forward, backward = (program(each.source) for each in passes.values())
    parameters, (*_, loss_gradient) = ([without_data(*x) for x in each.inputs] for each in passes.values())
    with idle_gpu() as count:
        _, *kept = forward(parameters)
        found = {"kept": count.held(), "forward": count.most}
        count.most = 0
        kept.append(loss_gradient)
        backward(kept)
        return found | {"backward": count.most}


def memory_of_update(update: Pass) -> int:
    """Bytes beside weights, gradients and states, at most."""
    run, inputs = program(update.source), [without_data(*x) for x in update.inputs]
    with idle_gpu() as count:
        run(inputs)
        return count.most


########################################
#                Table                 #
########################################

PARTS = "products", "elementwise", "attention"  # named as in bench/roofline.py


def part(runs: str) -> str:
    """What a kernel does, by what runs it."""
    if runs.startswith("bench."):
        return "attention"
    elementwise = "Inductor", "kernels.dprenorm", "kernels.norm_and_rotate_", "kernels.dqkv"
    return "elementwise" if runs in elementwise else "head" if runs == "kernels.head_loss" else "products"


def budget(hp: train_gpt.Hyperparameters, form: str) -> dict[str, float]:
    """Bytes of what a graph shows: of the head's operator not what is inside, of the gradients' sums nothing."""
    parts = roofline.model_kernels(hp, hp.micro_batch, form)
    parts["elementwise"].append(parts["embedding, casts, gradient sums"][0])
    if form == "published":
        parts["elementwise"] += parts["softcap and loss"]
    else:
        parts["products"] = parts["products"][:-3]  # the head's
    return {name: sum(k.count * k.bytes for k in parts[name]) for name in PARTS}


def rows(hp: train_gpt.Hyperparameters) -> list[dict]:
    found = []
    for form in programs(hp):
        moved, launched = Counter(), Counter()
        for name, each in trace(form, hp).items():
            for runs, size in each.kernels:
                moved[name, part(runs)] += size
                launched[part(runs)] += 1
        for name, allowed in budget(hp, form).items():
            forward, backward = (moved[each, name] for each in ("forward", "backward"))
            found.append({"program": form, "part": name, "kernels": launched[name], "forward": forward,
                          "backward": backward, "bytes": forward + backward, "roofline": allowed})
    return found


def update_rows(hp: train_gpt.Hyperparameters) -> list[dict]:
    """Of each stack that one GPU updates by a rule with stages: what Inductor writes, so not the products."""
    found = []
    for bank in roofline.made_banks(hp):
        if bank.rule.in_place or bank.masters.ndim < 3:
            continue
        count, m, n = bank.masters.shape
        update = trace_update(bank)
        tail = [size for runs, size in update.kernels if runs == "Inductor"]
        passes, kernels = roofline.tail(m, n, bank.rule, "fused")
        found.append({"stack": f"{count} x {m} x {n}", "its first": next(iter(bank.params)), "kernels": len(tail),
                      "roofline's": kernels, "passes": sum(tail) / (4 * count * m * n), "the roofline's": passes,
                      "held, GB": memory_of_update(update) / 1e9})
    return found


def standing(hp: train_gpt.Hyperparameters, form: str) -> int:
    """Bytes of weights, gradients and what the update rules keep on one GPU; fused, of the fp32 masters too."""
    banks = roofline.made_banks(hp)
    kept = sum(x.nbytes for bank in banks for x in bank.state.values())
    if form == "fused":
        return kept + sum(x.nbytes for bank in banks for x in (bank.weights, bank.gradients, bank.masters))
    return kept + sum(2 * shape.numel() * (2 if name == "embed.weight" else 4)
                      for name, shape in roofline.parameters(hp).items())


def memory_rows(hp: train_gpt.Hyperparameters) -> list[dict]:
    found = []
    for form in programs(hp):
        counted, stands = memory(trace(form, hp)), standing(hp, form)
        most = max(counted["forward"], counted["backward"])
        found.append({"program": form, "kept for the backward pass": counted["kept"],
                      "forward, at most": counted["forward"], "backward, at most": counted["backward"],
                      "weights, gradients, states": stands, "in all": most + stands})
    return found


def in_gb(rows: list[dict]) -> str:
    return markdown([{name: x if name == "kernels" or isinstance(x, str) else f"{x / 1e9:.1f}"
                      for name, x in row.items()} for row in rows])


def main(words: list[str]):
    words, out = parse("graph", __doc__, words)
    hp = train_gpt.override(words)
    few = hp.micro_batch
    while few * hp.sequence_length * hp.vocab_size > COUNTED and few > 1:
        few //= 2
    held = memory_rows(hp)
    shares = [f"The fused program holds {held[0]['in all'] / other['in all']:.2f} of what the published one does "
              "(aim: 0.5)." for other in held[1:]]
    stacks = update_rows(hp)
    rules = f"`{hp.matrix_update}`" + f", of MLPs `{hp.mlp_update}`" * bool(hp.mlp_update)
    updates = ["## The update of a stack, beside Newton-Schulz", rules, markdown(stacks),
               "A pass is a read or a write of a stack in fp32. Those in which a cubic of CANS-12 scales its squares "
               "are among the counted ones; bench/roofline.py has them with Newton-Schulz."] if stacks else []
    publish("bench.graph", words, out, "In GB. Written for sm_90, not compiled, not run.",
            f"## Moved by a micro-batch of {few} x {hp.sequence_length} tokens",
            in_gb(rows(replace(hp, micro_batch=few))),
            f"## Held by a micro-batch of {hp.micro_batch} x {hp.sequence_length} tokens", in_gb(held), *shares,
            *updates)


if __name__ == "__main__":
    run("graph", main)
