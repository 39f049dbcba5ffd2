"""A trained model out of a checkpoint is the one that was validated: what it scores, says and exports."""

import json
import sys
import subprocess
import re
import shutil
from pathlib import Path

import local
import pytest
import torch
import torch.nn.functional as F
from conftest import EOT, train, write_shard

from harness.checkpoint import read_checkpoint, write_checkpoint
from tests.drills.kill import checkpoint_of
from trained.__main__ import main
from trained.model import continued, load, log_likelihoods, make_encoding

TEXT = "".join(f"def f{i}(x, y):\n    return x + {i} * y  # é {i % 7}\n\n\n" for i in range(400)).encode()
# its validation sees another point than its last weights, and as its metric an average of points
VIEWS = ["final_update=tail_average(3, 5, 0.5) | lookahead(0.5, 0.1)", "metric=val_ema_loss"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A run of seconds on bytes: 8 sequences of 32 a step, 2 layers of width 32. The validation is one text."""
    folder = tmp_path_factory.mktemp("bytes")
    write_shard(folder / "val.bin", local.encode_bytes(TEXT[:514]))
    write_shard(folder / "train.bin", local.encode_bytes(TEXT[514:]))
    (folder / "manifest.json").write_text('{"encoding": "bytes"}')
    return [f"train_files={folder}/train.bin", f"val_files={folder}/val.bin", "batch_tokens=256", "sequence_length=32",
            "val_tokens=512", "micro_batch=16", "num_layers=2", "model_dim=32", "head_dim=16", "train_steps=12",
            "val_every=12", "val_every_late=12", "target_loss=5", "--checkpoint-last"]


@pytest.fixture(scope="module", params=[[], VIEWS, ["activation=swiglu"]], ids=["record", "views", "swiglu"])
def run(request, words, tmp_path_factory) -> tuple[str, float]:
    """The checkpoint of a run, and the last validation's loss, of the run's metric."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, [*words, *request.param])
    (sidecar,) = folder.glob("logs/*.jsonl")
    losses = [json.loads(line) for line in sidecar.read_text().splitlines() if "val_loss" in line]
    assert request.param != VIEWS or losses[-1]["val_ema_loss"] != losses[-1]["val_loss"]
    return str(checkpoint_of(folder)), losses[-1]["val_ema_loss" if request.param == VIEWS else "val_loss"]


def test_a_text_scores_what_its_validation_did(run):
    """Kills: the last weights where the validation's are others, those of val_loss where val_ema_loss is the metric; a
    token of a text that is scored twice or not at all, windows that begin elsewhere, logits without their cap; sums of
    exponentials whose rounding adds up, as those of F.cross_entropy do on a CPU where most logits are alike.

    The text is the validation's 512 tokens after the first. Both read 16 sequences at a time, and so add fp32 losses of
    the same bf16 activations; the sums differ in their order alone.
    """
    checkpoint, loss = run
    model, hp, _ = load(checkpoint)
    text = make_encoding("bytes", hp.vocab_size).encode_ordinary(TEXT[:514].decode())[:512]
    ((total, greedy),) = log_likelihoods(model, hp.sequence_length, [([EOT], text)])
    assert total / 512 == pytest.approx(-loss, abs=1e-5) and not greedy


def test_scores_do_not_depend_on_their_company(run):
    """Kills: padding that is scored or seen, results in another order than the requests, a context that is cut where
    its last tokens are needed, `likeliest` of other positions than the continuation's.

    One forward pass a token of the continuation is the reference. To 0.02 nats a token: products of another shape round
    to bf16 otherwise.
    """
    model, hp, _ = load(run[0])
    ids = make_encoding("bytes", hp.vocab_size).encode_ordinary(TEXT.decode())
    requests = [(ids[at:at + context], ids[at + context:at + context + count])
                for at, context, count in ((0, 1, 3), (7, 60, 5), (3, 20, 12), (11, 31, 1), (40, 5, 27), (9, 2, 0))]
    found = log_likelihoods(model, hp.sequence_length, requests)
    assert found[-1] == (0, True)
    for (context, continuation), (total, greedy) in zip(requests, found):
        exact, likeliest, seen = 0.0, True, (context + continuation)[-hp.sequence_length - 1:]
        for i in range(len(seen) - len(continuation), len(seen)):
            z = model.head(model.activations(torch.tensor([seen[:i]])))[0, -1].double()
            z = 15 * z / (z * z + 225).sqrt()
            exact += z.log_softmax(0)[seen[i]].item()
            likeliest &= z.argmax().item() == seen[i]
        assert total == pytest.approx(exact, abs=0.02 * len(continuation) + 1e-12)
        assert greedy == likeliest


def test_bytes_are_those_of_the_shards():
    """Kills: another numbering than that of data/local.py, or bytes that merge into one token."""
    encoding = make_encoding("bytes", 50304)
    text = "".join(map(chr, range(300))) + " naïve 日本 😀\r\n"
    ids = encoding.encode_ordinary(text)
    assert [EOT, *ids] == local.encode_bytes(text.encode()).tolist()
    assert b"".join(map(encoding.decode_single_token_bytes, ids)).decode() == text


def said(checkpoint, prompt="def ", count=20, temperature=0.8, top_k=200, seed=0) -> list[str]:
    model, hp, _ = load(checkpoint)
    return list(continued(model, hp.sequence_length, make_encoding("bytes", hp.vocab_size), prompt, count, temperature,
                          top_k, seed))


def test_what_is_said(run, monkeypatch):
    """Kills: a seed without effect, a draw that ignores temperature or top_k; a longer context than in training; a
    character that is cut in two where its bytes come one by one; text after its end; a token of no encoding."""
    checkpoint = run[0]
    assert said(checkpoint) == said(checkpoint) != said(checkpoint, seed=1)
    greedy = said(checkpoint, temperature=0)
    assert greedy == said(checkpoint, temperature=0, seed=1) == said(checkpoint, top_k=1, temperature=5.0)
    assert len({"".join(said(checkpoint, temperature=T)) for T in (0, 0.5, 1, 5)}) == 4
    assert len(said(checkpoint, temperature=1e-300)) == 21  # one of those that are likeliest to the last bit
    prompt = "def f(x, y):\n" * 9  # longer than what the model reads at a time
    assert said(checkpoint, prompt, 9, 0) == said(checkpoint, prompt[-32:], 9, 0)
    queue = [*make_encoding("bytes", 50304).encode_ordinary("é😀"), EOT, 5]
    monkeypatch.setattr(torch.Tensor, "topk", lambda z, k: (z[:1], torch.tensor([min(queue.pop(0), 256)])))
    assert "".join(said(checkpoint)) == "é😀" and queue == [5]


def test_sample(run, capsys):
    """Kills: a prompt of several words that loses one; an encoding that the shards' manifest does not name."""
    main(["sample", run[0], "def", "f1(x", "--tokens", "5", "--temperature", "0"])
    out = capsys.readouterr().out
    assert out == "def f1(x" + "".join(said(run[0], "def f1(x", 5, temperature=0)) + "\n"


def safetensors(path: Path) -> dict[str, torch.Tensor]:
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    assert begin % 8 == 0 and all(x["dtype"] == "BF16" for x in header.values())
    assert max(x["data_offsets"][1] for x in header.values()) == len(raw) - begin
    return {name: torch.frombuffer(bytearray(raw[begin + x["data_offsets"][0]:begin + x["data_offsets"][1]]),
                                   dtype=torch.bfloat16).view(x["shape"]) for name, x in header.items()}


# What a program of its own, with the exported weights, has for a loss
ITS_LOSS = """
import runpy, sys, torch
program, (P, inputs, targets) = runpy.run_path(sys.argv[1]), torch.load(sys.argv[2])
model = program["GPT"](program["Hyperparameters"]())
assert sorted(P) == sorted(name for name, _ in model.named_parameters())
for name, p in model.named_parameters():
    p.data = P[name]
with torch.no_grad():
    print(model(inputs, targets).item())
"""


def test_an_export_is_the_model(run, tmp_path):
    """Kills: tensors under each other's names or transposed; offsets that are off; a config of another model; weights
    that are not the validation's.

    With its own program the loss is the same. Ten lines of plain torch in fp32 differ by what rounding to bf16 does
    to the activations: less than 0.005 nats in the mean over 512 tokens.
    """
    checkpoint, loss = run
    main(["export", checkpoint, str(tmp_path / "out")])
    P = safetensors(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    hp = config["hyperparameters"]
    assert config["parameters"] == sum(x.numel() for x in P.values()) and config["encoding"] == "bytes"
    assert config["step"] == 12 and config["metric"] == hp["metric"]
    tokens = torch.tensor(local.encode_bytes(TEXT[:514]).astype(int))[:513]
    inputs, targets = tokens[:-1].view(-1, 32), tokens[1:]

    # in a process of its own: its kernels have the names of this one's
    torch.save((P, inputs, targets), tmp_path / "P.pt")
    out = subprocess.run([sys.executable, "-c", ITS_LOSS, tmp_path / "out/program.py", tmp_path / "P.pt"], text=True,
                         capture_output=True, check=True).stdout
    assert float(out) / 512 == pytest.approx(loss, abs=1e-6)

    P, K = {name: x.float() for name, x in P.items()}, hp["head_dim"]
    angle = torch.outer(torch.arange(32.0), torch.cat([1024 ** -torch.linspace(0, 1, K // 4), torch.zeros(K // 4)]))
    norm = lambda x: F.rms_norm(x, x.shape[-1:])  # noqa: E731
    lin = lambda x, name: F.linear(x, P[name + ".weight"], P[name + ".bias"])  # noqa: E731
    turn = lambda x: torch.view_as_real(torch.complex(*norm(x).chunk(2, -1)) * torch.polar(  # noqa: E731
        torch.ones_like(angle), -angle)).transpose(-1, -2).flatten(-2)
    x = norm(P["embed.weight"][inputs]) * P["norm1.gains"]
    for b in (f"blocks.{i}." for i in range(hp["num_layers"])):
        q, k, v = lin(norm(x) * P[b + "norm1.gains"], b + "attn.qkv").unflatten(-1, (3, -1, K)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, scale=0.12, is_causal=True)
        x = x + lin(y.transpose(1, 2).flatten(2), b + "attn.proj")
        y = norm(x) * P[b + "norm2.gains"]
        h = lin(y, b + "mlp.fc")
        h = F.silu(lin(y, b + "mlp.gate")) * h if hp["activation"] == "swiglu" else h.relu() ** 2
        x = x + lin(h, b + "mlp.proj")
    z = lin(norm(x) * P["norm2.gains"], "head").flatten(0, 1)
    assert F.cross_entropy(15 * z / (z * z + 225).sqrt(), targets).item() == pytest.approx(loss, abs=0.005)


@pytest.fixture(scope="module")
def record(words, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("record")
    train(folder, words)
    return str(checkpoint_of(folder))


@pytest.fixture
def questions(tmp_path) -> Path:
    """Twenty in HellaSwag's form: how a line of TEXT goes on, and three other endings."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: python -m pip install -r trained/requirements.txt")
    lines = [dict(ind=i, activity_label="Python", ctx_a=f"def f{i}(x, y):", ctx_b="return", ctx="", split="val",
                  endings=["%$#@!" * 5, f"x + {i} * y", "QQQ QQQ QQQ", "zqx" * 20], label="1") for i in range(20)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_lm_eval_scores_a_file_without_a_network(record, questions, capsys, monkeypatch):
    """Kills: an adapter that lm_eval cannot call, log-likelihoods in another order than its requests, scores of another
    task, --limit that is lost, a need of the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main(["evaluate", record, f"hellaswag={questions}", "--limit", "12", "--json"])
    out = json.loads(capsys.readouterr().out)
    assert out["n-samples"]["hellaswag"] == {"original": 20, "effective": 12} and out["step"] == 12
    model, hp, _ = load(record)
    encode, right, normed = make_encoding("bytes", hp.vocab_size).encode_ordinary, 0, 0
    for line in list(map(json.loads, questions.read_text().splitlines()))[:12]:
        endings = [" " + " ".join(ending.split()) for ending in line["endings"]]
        pairs = [(encode(f"Python: {line['ctx_a']} Return"), encode(ending)) for ending in endings]
        p = [x for x, _ in log_likelihoods(model, hp.sequence_length, pairs)]
        right += p.index(max(p)) == 1
        normed += max(range(4), key=lambda i: p[i] / (len(endings[i]) - 1)) == 1
    assert out["results"]["hellaswag"]["acc,none"] == right / 12
    assert out["results"]["hellaswag"]["acc_norm,none"] == normed / 12
    main(["evaluate", record, f"hellaswag={questions}"])
    assert re.search(rf"hellaswag={questions}\s*\|.*acc .*\n.*acc_norm", capsys.readouterr().out)


def test_the_rolling_likelihood_of_lm_eval_is_the_validations(run, questions):
    """Kills: an adapter whose text begins without END_OF_TEXT, or in windows that begin elsewhere. As above."""
    from lm_eval.api.instance import Instance

    from trained.evaluate import Adapter
    model, hp, _ = load(run[0])
    adapter = Adapter(model, hp.sequence_length, make_encoding("bytes", hp.vocab_size))
    text = TEXT[:512].decode()
    (total,) = adapter.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert total / 512 == pytest.approx(-run[1], abs=1e-5)


@pytest.mark.parametrize("typed, line", [
    (["hellaswagg"], "lm_eval has no task 'hellaswagg'; the nearest is 'hellaswag'"),
    (["hellaswag"], r"hellaswag: ConnectionError: .+\. A task's data come from the Hugging Face hub, .+FILE.jsonl"),
    (["hellaswag=none.jsonl"], "hellaswag=none.jsonl: FileNotFoundError: .+"),
    (["winogrande={questions}"], "winogrande=.+: .+"),
    (["none.yaml"], "none.yaml: KeyError: .+"),
])
def test_a_task_that_cannot_be_had_is_one_line(typed, line, record, questions, tmp_path, monkeypatch):
    """Kills: a traceback over a typo, over no network, or over a file of another task's form."""
    import datasets
    import huggingface_hub.constants
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", record, *(word.format(questions=questions) for word in typed)])
    assert re.fullmatch("python -m trained: " + line, end.value.code)


def other_source(folder: Path):
    state = dict(read_checkpoint(folder), source_sha256="0" * 64)
    write_checkpoint(folder, "seed0-step12.pt", state)


@pytest.mark.parametrize("typed, line", [
    (["sample", "{other}", "x"], ".+ is of another version of this program: check out the commit that its log names"),
    (["export", "{other}"], ".+ is of another version of this program: check out the commit that its log names"),
    (["sample", "none.checkpoint"], "there is no none.checkpoint/manifest.json on this machine: .+"),
    (["evaluate", "{record}"], "evaluate needs lm-evaluation-harness: .+ -r trained/requirements.txt"),
    (["sample", "{quick}"], "there is no .+/manifest.json to say how the model's texts were encoded: give --encoding"),
    (["sample", "{quick}", "--encoding", "gpt2"], "token 50256, with which a prompt begins, is outside of the model's "
                                                  "vocabulary of 512: it was trained on another encoding than gpt2"),
    (["sample", "{record}", "x", "--encoding", "gpt2"], r"GPT-2's vocabulary cannot be loaded \(OSError\): .+ bytes"),
    (["sample", "{record}", "x", "--top-k", "0"], r"--top-k is at least 1, and below 2\^63"),
    (["sample", "{record}", "x", "--temperature", "nan"], r"--temperature is at least 0, and below 2\^63"),
])
def test_a_mistake_is_one_line(typed, line, record, quick, tmp_path, monkeypatch):
    """Kills: a traceback, or a model of other weights than it says, over what a person can get wrong."""
    def offline(_):
        raise OSError("no network")
    places = dict(record=record, other=tmp_path / "other.checkpoint", quick="")
    if "{other}" in typed:
        shutil.copytree(record, places["other"])
        other_source(places["other"])
    if "{quick}" in typed:
        train(tmp_path, [*quick, "--checkpoint-last"])
        places["quick"] = checkpoint_of(tmp_path)
    monkeypatch.setattr("tiktoken.get_encoding", offline)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([word.format(**places) for word in typed])
    assert re.fullmatch("python -m trained: " + line, end.value.code)


def test_several_processes_are_one_line(record, monkeypatch):
    """Kills: torchrun's processes that all say the same."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="WORLD_SIZE=2 in the environment: this is one process; start it without"):
        main(["sample", record])
