"""Banks: an update is the same for every number of ranks, and can be held by a CUDA graph."""

import contextlib
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import conftest
from conftest import SOAP_MUON, UPDATES, Unguarded, one_process
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rules
from aurora import Aurora
from harness.graphs import Replayed
from harness.ranks import Place
from rules import Rule, advance_
from train_gpt import GPT, fill, initial_weights, learning_rate_factor, make_banks, override, show, update

CPU = torch.device("cpu")
# 3 blocks: 12 squares, 3 tall and 3 wide matrices; of the tall ones 4 ranks own 1, 1, 1 and none. The rate of every
# step is another
# (32 wide: where the CPU multiplies bf16 in tiles, torch's product of a single 16 x 16 rounds otherwise than a stack's)
SHAPE = ["num_layers=3", "model_dim=32", "head_dim=8", "vocab_size=64", "warmup_steps=10"]
WORDS = {name: [f"matrix_update={text}"] for name, text in UPDATES.items()} | {"soap_muon": SOAP_MUON}
SHARED = "aurora", "normuon", "adamw", "soap_muon"


def gradients(bank, step: int):
    """Four parts, which the ranks share; whole numbers, whose sum is exact in any order."""
    shape = bank.gradients[:bank.shares.count].shape
    return torch.randint(-9, 10, (4, *shape), generator=torch.Generator().manual_seed(step)).float()


def train(words: list[str], saved: list | None = None, first: int = 0, last: int = 3):
    """The weights and the state after steps on gradients that the ranks have parts of."""
    hp, place = override([*SHAPE, *words]), Place(dist.get_rank(), dist.get_world_size(), CPU)
    model = GPT(hp)
    banks = make_banks(model, hp, place)
    fill(banks, initial_weights(model, 0))
    for bank, state in zip(banks, saved or []):
        bank.load(state)
    show(banks, "training", first)
    for step in range(first, last):
        for bank in banks:
            parts = gradients(bank, step).chunk(place.world)[place.rank]
            bank.gradients[:bank.shares.count] = parts.sum(0)
            bank.reduce()
        update(banks, step)

    def weights():
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    trained, views = weights(), {}
    for view in ("val_loss", "val_ema_loss"):
        show(banks, view, last)
        views |= {f"{name}, {view}": p for name, p in weights().items()}
    show(banks, "training", last)
    assert all(torch.equal(p, trained[name]) for name, p in weights().items())
    return trained | views, [{name: x.clone() for name, x in bank.gather_state().items()} for bank in banks]


def share(saved):
    return {name: (*train(WORDS[name]), train(WORDS[name], saved[name], 2)[0]) for name in saved}


def one_of_several(rank: int, world: int, folder: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(share(torch.load(f"{folder}/saved.pt", weights_only=True)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone():
    """What one process has after 3 steps, and after 2. On one thread as the others: MKL's QR, of 128 rows and more,
    rounds otherwise on two. How many matrices are in a stack changes nothing."""
    with one_process():
        saved = {name: train(WORDS[name], last=2)[1] for name in SHARED}
        return saved, share(saved)


def test_four_ranks_give_the_bits_of_one(alone, tmp_path):
    """Kills: a rank that owns nothing and waits, a slot owned twice or by nobody, padding that reaches a parameter, a
    master that another rank needs, a gradient that is not summed or summed twice, weights that are not gathered, a
    state that lacks a rank's share or that only the same number of ranks can load, q and k updated as one matrix; a
    knob by name that is another rank's, a view that a rank does not send, training weights that a validation has
    changed."""
    saved, one = alone
    torch.save(saved, tmp_path / "saved.pt")
    mp.spawn(one_of_several, (4, str(tmp_path)), nprocs=4)
    for rank in range(4):
        several = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for rule, (weights, states, resumed) in one.items():
            for a, b in ((weights, several[rule][0]), (resumed, several[rule][2])):
                assert all(torch.equal(a[name], b[name]) for name in weights)
            for state, other in zip(states if rank == 0 else [], several[rule][1]):
                assert state.keys() == other.keys()
                assert all(torch.equal(x, other[name]) for name, x in state.items()), rule


def test_a_state_goes_on_to_the_same_bits(alone):
    """Kills: a master or a moment that a state lacks, a count of steps that begins anew; views that are all one."""
    for rule, (weights, _, resumed) in alone[1].items():
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)
        for name in filter(lambda name: "," not in name, weights):
            training, val, val_ema = (weights[name + view] for view in ("", ", val_loss", ", val_ema_loss"))
            assert torch.equal(training, val) == (rule != "soap_muon")
            assert torch.equal(val, val_ema) == (rule != "soap_muon" or name == "embed.weight"), name


def test_a_step_is_that_of_the_plain_optimizers():
    """Kills: a parameter in the wrong place of its bank, masters in bf16, an embedding whose master is not, a rate
    that is not scaled, q, k and v not three matrices.

    The same optimizers on the parameters one by one. Aurora's batches of other sizes round alike.
    """
    hp = override(SHAPE)
    with one_process():
        weights, states = train([])
        model = GPT(hp)
        layout = make_banks(model, hp, Place(0, 1, CPU))
        values = initial_weights(model, 0)
        params = {name: nn.Parameter(v.bfloat16() if name == "embed.weight" else v) for name, v in values.items()}
        thirds = {name: list(map(nn.Parameter, p.detach().chunk(3))) for name, p in params.items() if "qkv.w" in name}
        matrices = [q for name in params if name in thirds for q in thirds[name]]
        matrices += [p for name, p in params.items() if "blocks" in name and p.ndim == 2 and name not in thirds]
        adamw = dict(betas=(0.8, 0.95), eps=1e-10, weight_decay=0, fused=True)
        vectors = [p for p in params.values() if p.ndim == 1]
        rates = hp.matrix_lr, 0.3, 1 / 320, 0.01
        optimizers = [Aurora(matrices), *(torch.optim.AdamW(group, lr=torch.tensor(0.0), **adamw) for group in (
            [params["embed.weight"]], [params["head.weight"]], vectors))]
        for step in range(3):
            for optimizer, rate in zip(optimizers, rates):
                lr = rate * learning_rate_factor(step, hp)
                optimizer.param_groups[0]["lr"] = lr if isinstance(optimizer, Aurora) else torch.tensor(lr)
            for bank in layout:
                parts = gradients(bank, step)
                bank.gradients[:bank.shares.count] = parts.sum(0)
                for name, g in zip(bank.params, bank.views(bank.gradients)):
                    for p, part in zip(thirds.get(name, [params[name]]), g.chunk(3 if name in thirds else 1)):
                        p.grad = part.to(p.dtype).clone()
            for optimizer in optimizers:
                optimizer.step()
    for name, p in params.items():
        expected = torch.cat(thirds[name]) if name in thirds else p
        assert torch.equal(weights[name], expected.detach().bfloat16()), name


def test_sums_of_vectors_fit_their_bank(alone):
    """Kills: a view of a bank that is a copy: what the model reads must be what is gathered."""
    hp = override(SHAPE)
    with one_process():
        model = GPT(hp)
        for bank in make_banks(model, hp, Place(0, 1, CPU)):
            bank.weights.fill_(7)
    assert all((p == 7).all() for p in model.parameters())


def test_a_validation_changes_no_training(quick, tmp_path):
    """Kills: training that goes on from what a validation has shown, a raw loss that depends on an average. A run with
    an average and four validations, and one without it and with two: every loss that both have, to the last bit."""
    ahead, seen = "lookahead(between(0.3, 1, 6))", []
    for folder, words in (("a", ["val_every=2", f"final_update=tail_average(3, 2) | {ahead}"]),
                          ("b", ["val_every=8", f"final_update={ahead}"])):
        conftest.train(tmp_path / folder, [*quick, *SOAP_MUON[:-1], *words])
        (sidecar,) = (tmp_path / folder / "logs").glob("*.jsonl")
        rows = [json.loads(line) for line in sidecar.read_text().splitlines()]
        seen.append({(name, row["step"]): row[name] for row in rows for name in ("loss", "val_loss") if name in row})
    often, rarely = seen
    assert len(rarely) == 8 + 2 and len(often) == 8 + 5
    assert rarely == {key: often[key] for key in rarely}


class Graph:
    """A CUDA graph's part in what Replayed does: what is recorded does not run until it is replayed."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


def test_replayed_runs_once_and_then_replays(monkeypatch):
    """Kills: a first step that is captured before its state exists, a captured step that is not also run, a capture at
    every call, a private pool of memory for every graph."""
    graphs, pools, calls = [], [], []

    @contextlib.contextmanager
    def capture(graph, pool, capture_error_mode):
        graphs.append(graph)
        pools.append(pool)
        yield
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    run = Replayed("pool")
    for _ in range(4):
        run(lambda: calls.append(len(graphs)))
    assert calls == [0, 1] and [g.replays for g in graphs] == [3] and pools == ["pool"]


def written(function, args, kwargs) -> list[torch.Tensor]:
    """The tensors that an operator writes to, of its schema."""
    given = {x.name: value for x, value in zip(function._schema.arguments, args)} | kwargs
    return [t for x in function._schema.arguments if x.alias_info and x.alias_info.is_write
            for t in tree_leaves(given.get(x.name)) if isinstance(t, torch.Tensor)]


class Capture(TorchDispatchMode):
    """Records operators with their tensors; at the end it takes back what they wrote, as in a capture nothing runs."""

    def __init__(self, graph, pool, capture_error_mode):
        super().__init__()
        self.calls, self.before = graph.calls, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function is not torch.ops.aten._local_scalar_dense.default, "a capture cannot wait for a number"
        self.before += [(t, t.clone()) for t in written(function, args, kwargs)]
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        return out

    @torch.no_grad()
    def __exit__(self, *error):
        super().__exit__(*error)
        for t, value in reversed(self.before):
            t.copy_(value)


class SoftGraph:
    """A CUDA graph in software: what was captured runs again, on the same memory."""

    def __init__(self):
        self.calls = []

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, out in self.calls:
            for mine, anew in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(mine, torch.Tensor) and mine.data_ptr() != anew.data_ptr():  # neither a view nor in place
                    mine.copy_(anew)


@pytest.fixture
def in_graphs(monkeypatch):
    """Has banks update as on a GPU, by CUDA graphs in software."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SoftGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)

    def use(banks):
        for bank in banks:
            bank.run = Replayed("pool")
    return use


def all_tensors(banks) -> list[torch.Tensor]:
    return [t for bank in banks for t in (bank.weights, bank.masters, *bank.state.values())]


@pytest.mark.parametrize("rule", WORDS)
def test_a_graph_gives_the_bits_of_eager_updates(rule, in_graphs):
    """Kills: a rate, a decay, a knob's schedule or a count of steps that is a constant of the graph, state that is born
    in the capture and so anew at each replay, a number that is read meanwhile, a gather_state() that lacks what replays
    did, or that a graph of fresh banks does not go on from.

    Six steps at six rates; with graphs, a state goes into fresh banks after the third.
    """
    words = dict(word.split("=", 1) for word in ["adam_update=adamw(0.8, 0.95, 1e-10, 0.1)", *WORDS[rule]])
    text = words["matrix_update"].replace("nesterov(0.95)", "nesterov(ramp(0.85, 0.95, 1, 5))")
    words["matrix_update"] = text.replace("| step", "| decay(0.1) | step")
    hp = override([*SHAPE, *(f"{name}={text}" for name, text in words.items())])

    def fresh():
        model = GPT(hp)
        banks = make_banks(model, hp, Place(0, 1, CPU))
        fill(banks, initial_weights(model, 0))
        return banks

    def advance(banks, step: int):
        for bank in banks:
            bank.gradients[:bank.shares.count] = gradients(bank, step).sum(0)
        update(banks, step)

    with one_process():
        eager, graphed = fresh(), fresh()
        in_graphs(graphed)
        for step in range(6):
            if step == 3:
                states = [bank.gather_state() for bank in graphed]
                graphed = fresh()
                in_graphs(graphed)
                for bank, state in zip(graphed, states, strict=True):
                    bank.load(state)
                show(graphed, "training", step)
            advance(eager, step)
            advance(graphed, step)
            assert all(torch.equal(a, b) for a, b in zip(all_tensors(eager), all_tensors(graphed), strict=True))
            if step % 3 == 0:
                addresses = [t.data_ptr() for t in all_tensors(graphed)]
            assert addresses == [t.data_ptr() for t in all_tensors(graphed)]


@pytest.mark.parametrize("rule", WORDS)
def test_an_update_can_be_in_a_cuda_graph(rule, monkeypatch):
    """Kills: a number read from the GPU, a tensor that is built on the CPU and sent, AdamW with a rate or a count of
    steps on the CPU, a bank on a GPU whose update is in no graph, a parameter or gradient that vector instructions
    cannot read.

    Of the record's shapes, on fake tensors of a GPU: what needs a value is an error there. The compiled update's
    operators are those of the function that is compiled.
    """
    hp = override([*WORDS[rule], "num_layers=2"])
    place = Place(0, 1, torch.device("cuda", 0))
    graphs, steps_of_adamw = [], []

    def graph():
        graphs.append(SimpleNamespace(calls=[], replay=lambda: None))
        return graphs[-1]

    def fused_adamw(*tensors, lr, **numbers):
        steps_of_adamw.append([lr, *tree_leaves(tensors)])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: torch.cuda.Stream(0))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "_fused_adamw_", fused_adamw)  # it has no fake
    monkeypatch.setattr(rules, "compiled_rule", lambda text: partial(advance_, Rule.of(text)))
    with FakeTensorMode(), Unguarded():
        model = GPT(hp)
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(p, device=place.device)))
        banks = make_banks(model, hp, place)
        for step in range(2):
            for bank in banks:
                bank.reduce()
            update(banks, step)
        for bank in banks:
            assert all(t.storage_offset() * t.element_size() % 16 == 0
                       for slots in (bank.weights, bank.gradients) for t in bank.views(slots))
    assert len(steps_of_adamw) == 2 * sum(bank.rule.in_place for bank in banks)
    assert all(isinstance(t, torch.Tensor) for tensors in steps_of_adamw for t in tensors)
    captured = [graph.calls for graph in graphs]
    assert len(captured) == len(banks) and all(captured)
    seen = tree_leaves([captured, steps_of_adamw])
    assert {t.device for t in seen if isinstance(t, torch.Tensor)} == {place.device}
