"""The kernels, compiled ahead of time for cards that need not be there, against what those cards have."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = "import json; from bench.compile import compiled; print(json.dumps([row._asdict() for row in compiled()]))"


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    """What bench.compile measures, in a process of its own: in this one Triton may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


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
