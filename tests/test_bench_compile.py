"""The kernels, compiled ahead of time for cards that need not be there, against what those cards have."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

KERNELS = "import json; from bench.compile import compiled; print(json.dumps([row._asdict() for row in compiled()]))"
GRAPHS = """
import json
from bench import RULES, roofline
from bench.graph import PROGRAMS, memory_rows, rows, standing, update_rows
from harness.doctor import RESERVE
from train_gpt import override
del PROGRAMS["published"]  # it takes as long again
SOAP = ("nesterov(0.95) | soap(0.9, 0.9) | schatten4_polar | aspect | brake(0.5) | row_floor(0.3825) | step | pin"
        " | cautious_decay(0.025)")
recipes = [override(["micro_batch=16", f"num_layers={layers}"]) for layers in (1, 2)]
swiglu = [override(["@1b", "model_dim=768", "sequence_length=1024", f"num_layers={layers}"]) for layers in (1, 2)]
def bound(hp):  # without what passes in an update, and that
    passing = max(kept.slots * kept.passing for kept in roofline.kept(hp))
    return roofline.memory(hp, 1, hp.micro_batch) - RESERVE - passing, passing
# each stack's compilation takes seconds: all three of the record, and the squares of two other rules
updates = [[], *(["mlp_expansion=1", f"matrix_update={rule}"] for rule in (RULES["normuon"], SOAP))]
print(json.dumps(dict(layers=[(rows(hp), *memory_rows(hp), bound(hp)) for hp in recipes],
                      gated=([rows(hp) for hp in swiglu], *memory_rows(swiglu[0]), bound(swiglu[0])),
                      standing={form: standing(override([f"matrix_update={SOAP}"]), form)
                                for form in ("fused", "published")},
                      updates=[(update_rows(hp), bound(hp)) for hp in map(override, updates)])))
"""
of_pytorch_2_13 = pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="bench.graph is of PyTorch 2.13")


def printed_by(program: str):
    """In a process of its own: in this one Triton may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    """What bench.compile measures."""
    return printed_by(KERNELS)


def test_each_kernel_is_compiled_for_each_card(kernels):
    """Kills: a kernel that has no entry in LAUNCHES, or that its entry launches for some cards only."""
    written = {name for path in (ROOT / "kernels").glob("*.py")
               for name in re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert "symmetric_product_kernel" in written
    for card in (80, 89, 90, 100, 120):
        assert {row["kernel"] for row in kernels if row["card"] == card} == written


def test_no_register_spills(kernels):
    """Kills: a tile or an epilogue that no longer fits into registers: it would be slow, and still right."""
    assert [row for row in kernels if row["spilled"]] == []


def test_shared_memory_fits_the_card(kernels):
    """Kills: a tile or a number of stages with which a launch fails on a smaller card."""
    assert [row for row in kernels if row["shared"] > row["limit"]] == []


def test_products_use_the_matrix_units(kernels):
    """Kills: a layout or an input_precision from which Triton makes another instruction, several times as slow."""
    units = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
    products = [row for row in kernels if row["multiplies"]]
    assert len(products) >= 2 * len(units)
    assert [row for row in products if row["unit"] != units[row["card"]]] == []


@pytest.fixture(scope="module")
def graphs() -> dict:
    """What bench.graph counts, of one layer and of two, and of the updates of all."""
    return printed_by(GRAPHS)


UNIT = 2 * 16 * 1024 * 768  # bytes of a tensor of tokens x model_dim


@of_pytorch_2_13
def test_bytes_of_a_layer(graphs):
    """Kills: an activation that is written in fp32 or read once more, for the gradient of a bias or by a pass that does
    not fuse; q and k copied, not overwritten; a product too many; weights that are cast; a bench.roofline that counts
    what does not happen.

    What a second layer adds: 4 norms of 4 tensors, q and k's of 4 forwards and 8 backwards. 1% is for statistics and
    weights."""
    (one, *_), (two, *_) = graphs["layers"]
    added = {row["part"]: {name: row[name] - before[name] for name in ("kernels", "bytes", "roofline")}
             for before, row in zip(one, two, strict=True)}
    assert added["elementwise"]["bytes"] / UNIT == pytest.approx(28, rel=0.01)
    assert added["elementwise"]["roofline"] / UNIT == pytest.approx(28)
    assert added["elementwise"]["kernels"] == 6
    assert added["products"]["bytes"] == pytest.approx(added["products"]["roofline"], rel=0.01)
    assert added["products"]["kernels"] == 12


@of_pytorch_2_13
def test_memory_of_a_layer(graphs):
    """Kills: a tensor kept for the backward pass beside one that it follows from, as q and k before the rotation; more
    than the head's logits, 1 more in 10, while they exist; a count that does not see what is freed.

    A second layer keeps x and its norm, twice, qkv, attention's result and the MLP's post, 4 as large. 1% is for
    statistics. The backward pass frees what is kept as it goes: at no time it needs 4 tensors more, a dpost's."""
    (_, one, _), (_, two, _) = graphs["layers"]
    kept = [row["kept for the backward pass"] for row in (one, two)]
    assert (kept[1] - kept[0]) / UNIT == pytest.approx(12, rel=0.01)
    logits = 2 * 16 * 1024 * 50304
    for row, each in zip((one, two), kept, strict=True):
        assert logits < row["forward, at most"] - each < 1.12 * logits
        assert each < row["backward, at most"] < each + 4 * UNIT


@of_pytorch_2_13
def test_the_doctor_knows_what_a_step_takes(graphs):
    """Kills: a doctor with a model of the memory that the program has outgrown; a gate that it does not know."""
    for _, row, (bound, _) in (*graphs["layers"], graphs["gated"]):
        assert row["in all"] < bound < 1.1 * row["in all"]
    for rows, (_, passing) in graphs["updates"]:
        assert max(row["held, GB"] for row in rows) < passing / 1e9


@of_pytorch_2_13
def test_bytes_of_a_layer_with_a_gate(graphs):
    """Kills: a published program that is traced with an MLP that it does not have; an activation of the gate that is
    written in fp32, or read once more; a gate that the roofline leaves out.

    Of the 2.75 as wide MLP a second layer reads or writes 3 tensors forwards, 5 backwards, and 2 for the biases; 3 of
    model_dim are the sum of what gate and fc hand back."""
    (one, two), *_ = graphs["gated"]
    assert [row["program"] for row in one] == ["fused"] * 3
    added = {row["part"]: {name: row[name] - before[name] for name in ("bytes", "roofline")}
             for before, row in zip(one, two, strict=True)}
    assert added["elementwise"]["bytes"] / UNIT == pytest.approx(31 + 10 * 2.75, rel=0.01)
    assert added["elementwise"]["roofline"] / UNIT == pytest.approx(31 + 10 * 2.75)
    assert added["products"]["bytes"] == pytest.approx(added["products"]["roofline"], rel=0.01)


@of_pytorch_2_13
def test_what_stands_beside_a_step(graphs):
    """Kills: a momentum counted for all that a rule keeps; a master in fp32 for the embedding, or in the published
    program. By hand, of SOAP: a weight has two moments, each side a covariance and a basis."""
    m, n, table, vectors = 3072, 768, 50304 * 768, 153216
    matrices = 24 * m * n + 48 * n * n
    kept = 4 * (2 * matrices + 24 * 2 * (m * m + n * n) + 48 * 4 * n * n) + (8 + 4) * table + 8 * vectors
    assert graphs["standing"] == {"fused": kept + 10 * (matrices + table + vectors) + 8 * table,
                                  "published": kept + 8 * (matrices + table + vectors) + 4 * table}


@of_pytorch_2_13
def test_passes_of_an_update(graphs):
    """Kills: an update that is not compiled into one program, or whose momentum is read in two parts, each time; a
    bench.roofline that takes a pass for free."""
    for row in (row for rows, _ in graphs["updates"] for row in rows):
        assert 0.9 * row["the roofline's"] < row["passes"] <= row["the roofline's"]
        assert 0.85 * row["roofline's"] < row["kernels"] <= row["roofline's"]
