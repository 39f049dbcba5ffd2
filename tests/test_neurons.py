"""Neurons: what --neurons writes, and what the desk says of it."""

import gzip
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import one_process, start, train
from matplotlib.figure import Figure

import train_gpt
from harness.log import RunLog
from harness.neurons import owned_neurons, record_neurons
from harness.ranks import Place
from records.__main__ import main
from records.neurons import Look, dead, draw_low, draw_persistent, draw_spread, half, persistent, read, table
from train_gpt import GPT, fill, initial_weights, override


def test_the_result_does_not_change_and_every_matrix_is_written(small, tmp_path):
    """Kills: a diagnostic that moves a weight or a random number, a matrix, step or rank that is left out, the other
    ranks' neurons lost, a gate forgotten. Two processes, each owner of half of the matrices."""
    words = [*small, "activation=swiglu", "train_steps=12", "val_every=3", "mlp_expansion=3", "num_layers=3"]
    losses = []
    for folder, flag in (("off", []), ("on", ["--neurons", "5"])):
        (tmp_path / folder).mkdir()
        run = start([*words, *flag], tmp_path / folder, processes=2)
        assert run.returncode == 0, run.stderr
        (sidecar,) = (tmp_path / folder / "logs").glob("????????-??????-????????.jsonl")
        records = map(json.loads, sidecar.read_text().splitlines())
        losses.append([(r["step"], r.get("loss", r.get("val_loss"))) for r in records])
    assert losses[0] == losses[1] and len(losses[0]) == 12 + 5
    assert not list((tmp_path / "off" / "logs").glob("*.gz"))
    (path,) = (tmp_path / "on" / "logs").glob("*.neurons.jsonl.gz")
    records = [json.loads(line) for line in gzip.open(path, "rt")]
    assert [(r["seed"], r["step"], r["layer"], r["matrix"], r["inputs"]) for r in records] == [
        (0, step, layer, matrix, 32) for step in (5, 10) for layer in range(3) for matrix in ("fc", "gate")]
    for r in records:
        assert [len(r[name]) for name in ("leverage", "momentum", "gradient", "update")] == [96] * 4
        assert sum(r["leverage"]) == pytest.approx(32, rel=1e-3)  # four digits each
        assert min(map(sum, (r["momentum"], r["gradient"], r["update"]))) > 0
    assert path.read_bytes().count(b"\x1f\x8b\x08\x00") + path.read_bytes().count(b"\x1f\x8b\x08\x08") == 2


@pytest.mark.parametrize("rule", ["nesterov(0.95) | polar | aspect | step", "adamw(0.95, 0.95, 1e-10, 0)"])
def test_rows_are_what_they_are_called(small, rule, tmp_path, monkeypatch):
    """Kills: norms of columns, a gradient of another step, an update that is the whole weight or is measured from
    after the step, the scores of the gradient or the weight in place of the momentum's."""
    monkeypatch.chdir(tmp_path)
    hp = override([*small, f"matrix_update={rule}", "num_layers=1"])
    model = GPT(hp)
    place = Place(0, 1, torch.device("cpu"))
    banks = train_gpt.make_banks(model, hp, place)
    log = RunLog("run")
    generator = torch.Generator().manual_seed(0)
    momentum = 0
    ((bank, i),) = owned_neurons(banks).values()
    with one_process():
        fill(banks, initial_weights(model, 0))
        for step in range(3):
            for each in banks:
                each.gradients.copy_(torch.randn(each.gradients.shape, generator=generator))
                each.reduce()
            before = bank.masters[i].clone()
            train_gpt.update(banks, step)
            gradient = bank.gradients[i].clone()
            beta = 0.95  # mu, and of adamw the first beta
            momentum = beta * momentum + (1 - beta) * gradient.double()
            record_neurons(banks, {"blocks.0.mlp.fc.weight": before}, 7, step + 1, place, log)
    look = read("logs/run.txt")[-1]
    assert (look.seed, look.step, look.layer, look.matrix, look.inputs) == (7, 3, 0, "fc", 32)
    M = momentum
    exact = dict(leverage=(M @ torch.linalg.inv(M.T @ M) @ M.T).diagonal(), momentum=M.norm(dim=1),
                 gradient=gradient.norm(dim=1), update=(bank.masters[i] - before).norm(dim=1))
    for name, values in exact.items():
        assert getattr(look, name) == pytest.approx(values.tolist(), rel=6e-4)  # half of the fourth digit, and fp32


def look(step, layer=0, matrix="fc", seed=0, leverage=(0.5,) * 4, gradient=(1,) * 4, update=(1,) * 4, inputs=2):
    return Look(seed, step, layer, matrix, inputs, list(leverage), [1.0] * 4, list(gradient), list(update))


def test_who_is_dead():
    """Kills: one criterion for both, a bound relative to something other than the layer's mean, a neuron that comes
    back called dead, one dead in fc alone where there is a gate, records before the reference step that count."""
    looks = [look(1),
             # means 10: neuron 0 at a tenth, 1 just above, 2 low in one of the two only
             look(2, gradient=(1, 1.1, 1, 36.9), update=(1, 1, 19, 19)),
             look(3, gradient=(1, 1.1, 37.9, 0), update=(1, 1, 19, 19)),
             look(2, matrix="gate", gradient=(1, 1, 1, 37), update=(1, 1, 1, 37)),
             look(3, matrix="gate", gradient=(1, 1, 1, 37), update=(1, 1, 1, 37))]
    assert half(looks) == 2
    low = persistent(looks, since=2)
    assert low[0, 0, "fc"] == dict(leverage=set(), gradient={0}, update={0, 1})
    assert dead(low) == {(0, 0): {0}}
    assert dead(persistent(looks, since=1)) == {(0, 0): set()}
    assert look(1, gradient=(0, 0, 0, 0)).low("gradient", 0.1) == {0, 1, 2, 3}  # nobody is above a mean of zero
    gate_back = [*looks[:-1], replace(looks[-1], gradient=[10.0] * 4)]
    assert dead(persistent(gate_back, since=2)) == {(0, 0): set()}
    assert dead(persistent(looks, since=2, below=0.12)) == {(0, 0): {0, 1}}


def test_leverage_is_measured_by_its_expected_mean():
    """Kills: the mean of a matrix of deficient rank in place of n / m, more than 1 for a wide matrix."""
    assert look(1, leverage=(0.05, 0.051, 0.9, 0.9)).low("leverage", 0.1) == {0}  # n / m = 2 / 4
    assert look(1, leverage=(0.1, 0.2, 1, 1), inputs=8).low("leverage", 0.1) == {0}


def test_table():
    """Kills: shares of one seed or one layer given to another, a CV of the first record, an unbiased deviation."""
    looks = [look(step, layer, seed=seed, gradient=(0, 0, 0, 4) if layer == 1 and seed == 3 else (1, 1, 1, 1),
                  update=(0, 1, 1, 2) if step == 2 and layer == 1 else (1, 1, 1, 1), leverage=(0.01, .6, .6, .79))
             for seed in (3, 4) for step in (1, 2) for layer in (0, 1)]
    *_, first, second = table(looks, since=2).splitlines()
    # of layer 1's 8 neurons 3 have a low gradient, 2 a low update, and 1 both; CVs: 3^.5 and 0, .5^.5
    assert first.split() == "0 fc 0.000 0.000 0.000 25.0 0.0 0.0 25.0 0.0 0.0 0.0".split()
    assert second.split() == "1 fc 0.000 0.866 0.707 25.0 37.5 25.0 25.0 37.5 25.0 12.5".split()


def written(path, looks):
    with gzip.open(path, "at") as file:
        file.writelines(json.dumps(vars(each)) + "\n" for each in looks)
    return path.stat().st_size


def test_a_killed_run_can_be_read(tmp_path, capsys):
    """Kills: a traceback at a member that is cut off, whole steps lost before it, a cut that is not mentioned, a step
    before the first gradient taken for one where all neurons are dead."""
    path = tmp_path / "run.neurons.jsonl.gz"
    whole = [replace(look(1), momentum=[0.0] * 4), look(2), look(2, 1)]
    written(path, whole[:1])
    size = written(path, whole[1:])
    written(path, [look(3), look(3, 1)])
    path.write_bytes(path.read_bytes()[:size + 40])
    assert read(str(tmp_path / "run.txt")) == read(str(path)) == whole[1:]
    assert capsys.readouterr().err == f"{path} is cut off after 3 records\n" * 2
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="holds no whole record"):
        read(str(path))


@pytest.mark.parametrize("content, says", [
    (None, "no such file: train_gpt.py --neurons K writes it, every K steps"),
    (b"step:0", "is not what train_gpt.py --neurons writes"),
    (gzip.compress(b'{"step": 1}\n', mtime=0), "is not what train_gpt.py --neurons writes"),
    (gzip.compress(b"step\n", mtime=0), "is not what train_gpt.py --neurons writes"),
])
def test_files_that_cannot_be_read(content, says, tmp_path, capsys):
    """Kills: a traceback, an error that does not say how to come by the file."""
    if content:
        (tmp_path / "run.neurons.jsonl.gz").write_bytes(content)
    assert main(["neurons", str(tmp_path / "run.txt")]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"records: \S+run.neurons.jsonl.gz:? {says}.*\n", error)


def test_picture(tmp_path, capsys):
    """Kills: a half-written file, a verb that draws nothing, layers or steps exchanged, shares that are not of the
    neurons of a layer, a spread of scores that is not relative to their mean."""
    looks = [look(step, layer, matrix, leverage=(0.01, 0.01 if step > 2 else .6, .6, .79))
             for step in (2, 4, 6) for layer in (0, 1) for matrix in ("fc", "gate")]
    looks = [each if each.layer else replace(each, leverage=[.5] * 4) for each in looks]
    written(tmp_path / "run.neurons.jsonl.gz", looks)
    assert main(["neurons", str(tmp_path / "run.txt"), "-o", str(tmp_path / "run.png")]) == 0
    assert "layer matrix" in capsys.readouterr().out
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.neurons.jsonl.gz", "run.png"]
    spread, low, stays = Figure().subplots(1, 3)
    draw_spread(spread, [each for each in looks if each.layer == 0], "fc", 0.1)
    ratios = spread.collections[0].get_array().sum(axis=1)
    assert ratios.argmax() == pytest.approx(48 * np.log(1 / 1e-3) / np.log(2 / 1e-3), abs=1)  # bins of 1e-3 to m / n
    draw_low(low, [each for each in looks if each.matrix == "fc"], "fc", 0.1)
    assert low.collections[0].get_array().tolist() == [[0, 0, 0], [0.25, 0.5, 0.5]]
    draw_persistent(stays, looks, "fc", 2, 0.1)
    assert [list(line.get_ydata()) for line in stays.lines] == [[0, 0.25], [0, 0], [0, 0], [0, 0]]


def test_bad_interval(small, tmp_path):
    """Kills: --neurons -1 that trains first."""
    with pytest.raises(SystemExit) as end:
        train(tmp_path, [*small, "--neurons", "-1"])
    assert str(end.value) == "train_gpt.py: --neurons -1: a number of steps, or 0 for never"
