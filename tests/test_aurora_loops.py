"""class Aurora in other people's loops: what a rank owns and assumes, copies, contexts, arguments, frameworks."""

import contextlib
import copy
import pickle
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, UPDATES, start

from aurora import Aurora

SHAPES = [(6, 4)] * 4 + [(8, 8)] * 2


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(seed=0):
    params = [torch.nn.Parameter(draw(*s, seed=seed + i)) for i, s in enumerate(SHAPES)]
    for i, p in enumerate(params):
        p.grad = draw(*p.shape, seed=100 + i)
    return params


def weights(params):
    return [p.detach().clone() for p in params]


def refusal(act) -> str:
    try:
        act()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def on_two_ranks(rank: int, folder: str):
    """All that needs two processes, in one pair of them: starting is what takes the time."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
                            timeout=timedelta(seconds=30))  # a rank that is left waiting fails
    seen = {}

    # a gradient on one rank alone: where it is not owned, and where it is
    for name, without in {"not owned": {0: [2, 3, 5], 1: [0, 1, 4]}, "owned": {0: [0]}, "stack": {1: [4, 5]}}.items():
        params = parameters()
        optimizer = Aurora(params, lr=0.1)
        for later in ("first", "later"):
            for i, p in enumerate(params):
                p.grad = None if later == "later" and i in without.get(rank, []) else draw(*p.shape, seed=i)
            seen[name] = refusal(optimizer.step)
        seen[f"{name}: weights"] = weights(params)

    # weights of a rank's own, and the group that says so
    params = parameters(seed=rank)
    before = weights(params)
    seen["own weights"] = refusal(Aurora(params).step)
    seen["own weights kept"] = all(map(torch.equal, before, weights(params)))
    alone = dist.new_group([rank], use_local_synchronization=True)
    optimizer = Aurora(params, process_group=alone)
    copy.deepcopy(optimizer).step()
    optimizer.step()
    other = parameters(seed=rank)
    Aurora(other, process_group=alone).step()
    seen["alone"] = len(optimizer.state_dict()["state"]) == 6 and all(map(torch.equal, weights(params), weights(other)))
    seen["other number"] = refusal(Aurora(parameters()[rank:]).step)

    # a group, or a state, that one rank alone has
    params, more = parameters(), torch.nn.Parameter(draw(5, 3))
    more.grad = draw(5, 3, seed=1)
    optimizer = Aurora(params)
    optimizer.step()
    if rank == 0:
        optimizer.add_param_group({"params": [more]})
    seen["group on one rank"] = refusal(optimizer.step)
    if rank == 1:
        optimizer.add_param_group({"params": [more]})
    seen["group on both"] = refusal(optimizer.step)
    seen["group on both: weights"] = weights([*params, more])
    if rank == 0:
        optimizer.load_state_dict(Aurora([dict(params=params), dict(params=[more])]).state_dict())
    seen["state on one rank"] = refusal(optimizer.step)

    # state
    params = parameters()
    optimizer = Aurora(params)
    optimizer.step()
    if rank == 0:  # as frameworks do: the other rank is elsewhere
        seen["not consolidated"] = refusal(optimizer.state_dict)
    optimizer.consolidate_state_dict()
    if rank == 0:
        seen["state"] = copy.deepcopy(optimizer.state_dict())
    else:
        seen["part"] = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    seen["after"] = weights(params)
    seen["stale"] = refusal(optimizer.state_dict)
    from torch.distributed.tensor import DeviceMesh, distribute_tensor
    pieces = distribute_tensor(torch.ones(4, 4), DeviceMesh("cpu", [0, 1]))
    seen["DTensor"] = refusal(lambda: Aurora([torch.nn.Parameter(pieces)]))
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_two_ranks, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_a_gradient_on_some_ranks_alone(ranks):
    """Kills: replicas that differ from then on, all-gathers that no longer match, an error on one rank that leaves the
    other waiting."""
    for name in ("not owned", "owned", "stack"):
        first, second = (rank[name] for rank in ranks)
        assert first == second
        assert all(map(torch.equal, *(rank[f"{name}: weights"] for rank in ranks)))
    assert ranks[0]["not owned"] == "accepted"
    words = "parameter 0 of group 0, of shape (6, 4), has a gradient on another rank and none on rank 0"
    assert words in ranks[1]["owned"]


def test_ranks_with_weights_of_their_own(ranks):
    """Kills: one rank's weights put in place of the other's, without a word; a group that cannot be given, or is lost
    in a copy; a different number of parameters, which hangs."""
    for rank in ranks:
        assert "has other weights on rank 1 than on rank 0" in rank["own weights"] and rank["own weights kept"]
        assert rank["alone"]
        assert "rank 1 gave Aurora 5 matrices and rank 0 6" in rank["other number"]
        assert rank["DTensor"].startswith("ValueError: Aurora updates whole matrices, got a DTensor")


def test_what_one_rank_alone_adds(ranks):
    """Kills: collectives of other sizes on the ranks after add_param_group() or load_state_dict() on one of them, which
    hang or fail inside gloo; a group that all have by now, refused or not updated."""
    for rank in ranks:
        assert "rank 1 gave Aurora 6 matrices and rank 0 7" in rank["group on one rank"]
        assert rank["group on both"] == "accepted"
        assert "parameter 0 of group 0, of shape (6, 4), has other steps on rank 1" in rank["state on one rank"]
    assert all(map(torch.equal, *(rank["group on both: weights"] for rank in ranks)))


def test_state_of_one_rank(ranks):
    """Kills: state_dict() as a collective, which hangs where one rank saves; half a state that is saved, or loaded, as
    if it were whole; a consolidated state that outlives its step."""
    assert "the state of 3 of 6 matrices is on other ranks" in ranks[0]["not consolidated"] == ranks[0]["stale"]
    params = parameters()
    Aurora(params).step()
    optimizer = Aurora(params)
    with pytest.raises(ValueError, match="has no nesterov.momentum in that state"):
        optimizer.load_state_dict(ranks[1]["part"])
    assert not optimizer.state
    optimizer.load_state_dict(ranks[0]["state"])
    optimizer.step()
    assert all(map(torch.equal, weights(params), ranks[0]["after"]))
    assert all(map(torch.equal, weights(params), ranks[1]["after"]))


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_step_as_the_original(twin):
    """Kills: an attribute that torch's __getstate__ does not know, without which a copy's first step fails."""
    optimizer = Aurora(parameters())
    optimizer.step()
    other = twin(optimizer)
    for one in (other, optimizer) if twin is not copy.copy else (other,):  # a shallow copy has the same parameters
        for i, p in enumerate(one.param_groups[0]["params"]):
            p.grad = draw(*p.shape, seed=i)
        one.step()
    assert all(map(torch.equal, *(weights(x.param_groups[0]["params"]) for x in (optimizer, other))))


@contextlib.contextmanager
def doubles():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("update", sorted(UPDATES))
def test_no_context_changes_a_step(update):
    """Kills: fp32 products in bf16 under autocast, numbers made in another default dtype or on another device."""
    results = []
    for context in (contextlib.nullcontext(), torch.autocast("cpu"), torch.device("meta"), doubles()):
        params = parameters()
        optimizer = Aurora(params, update=UPDATES[update])
        with context:
            optimizer.step()
            optimizer.step()
        results.append(weights(params))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_arguments_are_checked_first():
    """Kills: a negative, infinite or NaN rate, or a text, that is noticed at the first step or never; a complex matrix;
    a sparse gradient that ends somewhere in a kernel; a refused group that stays."""
    def matrix(*shape, **kind):
        p = torch.nn.Parameter(torch.ones(*shape, **kind))
        p.grad = torch.ones_like(p)
        return p
    for lr in (-1.0, float("nan"), float("inf"), "0.02", None, torch.ones(2)):
        assert refusal(lambda: Aurora([matrix(2, 3)], lr=lr)).startswith("ValueError: lr is a number, finite")
    assert "update is a text" in refusal(lambda: Aurora([matrix(2, 3)], update=0.3))
    assert "torch.complex64" in refusal(lambda: Aurora([matrix(2, 3, dtype=torch.complex64)]))
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    assert "has a sparse gradient" in refusal(Aurora([embedding.weight]).step)
    optimizer = Aurora([matrix(2, 3), matrix(0, 6), matrix(6, 0)], lr=torch.tensor(0.02))
    for settings in (dict(params=[matrix(4)]), dict(lr=-1), dict(update="x")):
        group = dict(params=[matrix(2, 3)]) | settings
        assert refusal(lambda: optimizer.add_param_group(group)).startswith("ValueError")
    assert len(optimizer.param_groups) == 1
    optimizer.step()
    other = Aurora([matrix(2, 3)], lr=0.02)
    other.step()
    assert torch.equal(*(x.param_groups[0]["params"][0] for x in (optimizer, other)))


def test_state_by_names_and_hooks():
    """Kills: keys of a state taken for places in a list, a dictionary of a pre-hook that is ignored, another
    optimizer's or another shape's state that is loaded and fails at the next step."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    models = [torch.nn.Linear(8, 4, bias=False) for _ in range(2)]
    first, second = (Aurora(model.parameters()) for model in models)
    models[0](draw(2, 8)).square().mean().backward()
    first.step()
    set_optimizer_state_dict(models[1], second, get_optimizer_state_dict(models[0], first))
    assert torch.equal(*(x.state[m.weight]["nesterov.momentum"] for x, m in zip((first, second), models)))
    state = first.state_dict()
    hook = second.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": {}})
    second.load_state_dict(state)
    assert not second.state
    hook.remove()
    muon = torch.optim.Muon(models[1].parameters())
    assert "no state of Aurora's" in refusal(lambda: second.load_state_dict(muon.state_dict()))
    other = Aurora(torch.nn.Linear(8, 5, bias=False).parameters())
    assert "of shape (4, 8)" in refusal(lambda: other.load_state_dict(state))


ELSEWHERE = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import kernels  # another package's
import torch
from optimizer import Aurora
p = torch.nn.Parameter(torch.ones(4, 6))
p.grad = torch.ones(4, 6)
Aurora([p]).step()
"""


def test_carried_elsewhere_as_one_file(tmp_path):
    """Kills: an optimizer that needs Triton where no kernel can run, or that finds another package of the name kernels.
    As README says: the file and what it imports, as one."""
    command, = [line for line in (ROOT / "README.md").read_text().splitlines() if "harness.log import flatten" in line]
    program = command.split('"')[1]
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    (tmp_path / "optimizer.py").write_text(run.stdout)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    (tmp_path / "main.py").write_text(ELSEWHERE)
    subprocess.run([sys.executable, "main.py"], cwd=tmp_path, check=True)


# Frameworks: two processes train 4 steps, save after 2, and a second run from there ends with the same weights

FRAMEWORK = """
import sys
import torch
from torch.utils.data import DataLoader
sys.path.insert(0, sys.argv[1])
from aurora import Aurora
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.ReLU(), torch.nn.Linear(16, 8, bias=False))
def same(first, second):
    assert all(map(torch.equal, first, second)), "resumed otherwise"
    torch.distributed.barrier()  # a process that ends while gloo's threads run may abort
    torch.distributed.destroy_process_group()
"""
PROGRAMS = {
    "transformers": """
import transformers
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()
    def forward(self, x, labels=None):
        return dict(loss=(self.net(x) - x).square().mean())
class Consolidate(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, optimizer, **others):
        if control.should_save:
            optimizer.optimizer.consolidate_state_dict()
    on_epoch_end = on_step_end
def train(resume):
    model = Model()
    settings = transformers.TrainingArguments("out", per_device_train_batch_size=4, max_steps=4, save_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, ddp_timeout=60, lr_scheduler_type="constant")
    transformers.Trainer(model=model, args=settings, train_dataset=[dict(x=x, labels=x) for x in X],
        optimizers=(Aurora(model.parameters(), lr=0.02), None), callbacks=[Consolidate()]).train(resume)
    return list(model.parameters())
same(train(None), train("out/checkpoint-2"))
""",
    "accelerate": """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
def train(resume):
    model = network()
    optimizer = Aurora(model.parameters(), lr=0.02)
    model, prepared, loader = accelerator.prepare(model, optimizer, DataLoader(X, 8))
    if resume:
        accelerator.load_state("out")
    for step, x in enumerate(loader):
        if 2 * resume <= step < 4:
            accelerator.backward((model(x) - x).square().mean())
            prepared.step()
            prepared.zero_grad()
        if step == 1 and not resume:
            optimizer.consolidate_state_dict()
            accelerator.save_state("out")
    result = [p.detach().clone() for p in model.parameters()]
    accelerator.free_memory()
    return result
same(train(False), train(True))
""",
    "lightning": """
import lightning
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
    def training_step(self, x):
        return (self.net(x) - x).square().mean()
    def configure_optimizers(self):
        return Aurora(self.net.parameters(), lr=0.02)
def train(steps, resume=None):
    module = Module()
    # each rank has one batch: after a resume Lightning reads others than without
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False)
    trainer.fit(module, DataLoader(X[trainer.global_rank:16:2], 8), ckpt_path=resume)
    trainer.save_checkpoint(f"{steps}.ckpt")
    return list(module.net.parameters())
whole = train(4)
train(2)
same(whole, train(4, "2.ckpt"))
"""}


@pytest.mark.parametrize("framework", PROGRAMS)
def test_a_framework_saves_and_resumes(framework, tmp_path):
    """Kills: a checkpoint at which a framework hangs, or that lacks what other ranks own."""
    pytest.importorskip(framework)
    (tmp_path / "program.py").write_text(FRAMEWORK + PROGRAMS[framework])
    run = start([str(ROOT)], tmp_path, tmp_path / "program.py", processes=2, HF_HUB_OFFLINE="1")
    assert run.returncode == 0, run.stderr
