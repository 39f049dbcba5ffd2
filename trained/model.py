"""The model that a run has trained, out of its checkpoint; the encoding of its text; its likelihoods, and its text."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from harness.checkpoint import folder_of
from harness.ranks import Place
from harness.run import read_run
from kernels.cross_entropy import softcapped
from train_gpt import EXPERIMENT, GPT, Hyperparameters, make_banks, show

END_OF_TEXT = 50256  # GPT-2's; each document of a shard begins with it
# GPT-2's ids 0 to 255 are the single bytes: first those that print, then the others.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {bytes([b]): i for i, b in enumerate(PRINTABLE + sorted(set(range(256)) - set(PRINTABLE)))}


def encoding_of(hp: Hyperparameters) -> str:
    """What the manifest says that data/'s programs write beside shards. FineWeb's published shards are GPT-2's."""
    manifest = Path(hp.train_files).parent / "manifest.json"
    if not manifest.is_file() and "fineweb" not in hp.train_files:
        raise ValueError(f"there is no {manifest} to say how the model's texts were encoded: give --encoding")
    return json.loads(manifest.read_text(encoding="utf-8")).get("encoding", "gpt2") if manifest.is_file() else "gpt2"


def make_encoding(name: str, vocab_size: int) -> tiktoken.Encoding:
    """ValueError where a model of this vocabulary lacks its tokens, and where GPT-2's are not to be had."""
    if END_OF_TEXT >= vocab_size:
        raise ValueError(f"token {END_OF_TEXT}, with which a prompt begins, is outside of the model's vocabulary of "
                         f"{vocab_size}: it was trained on another encoding than {name}")
    if name == "bytes":
        return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=BYTES, special_tokens={})
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # no network, a bad download: all one here
        raise ValueError(f"GPT-2's vocabulary cannot be loaded ({type(error).__name__}): tiktoken downloads it once, "
                         "where there is a network; a model of bytes needs none: --encoding bytes") from None


def load(checkpoint: str) -> tuple[GPT, Hyperparameters, dict]:
    """The model, its hyperparameters and the checkpoint's state. The weights are those that the run validates, in bf16:
    of val_loss, or of val_ema_loss where that is the metric. ValueError where it is no checkpoint of this program."""
    state, hp = read_run(EXPERIMENT, folder_of(checkpoint))
    model = GPT(hp)
    banks = make_banks(model, hp, Place(0, 1, torch.device("cpu")))
    for bank, whole in zip(banks, state["banks"], strict=True):
        bank.load(whole)
    show(banks, hp.metric, state["step"])
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # as in training
    return model.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu"), hp, state


@torch.no_grad()
def log_likelihoods(model: GPT, length: int, requests: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """For each (context, continuation) of ids, the context not empty: the log-probability of the continuation in nats,
    and whether each of its tokens is the likeliest. The model reads the last `length` tokens before what it predicts. A
    longer continuation is scored in pieces, each after the last token of the one before, as a validation reads."""
    pieces = [(i, (context + continuation[:at + length])[-length - 1:], len(continuation[at:at + length]))
              for i, (context, continuation) in enumerate(requests) for at in range(0, len(continuation), length)]
    pieces.sort(key=lambda piece: -len(piece[1]))  # little padding, and want of memory shows at once
    total, greedy = [0.0] * len(requests), [True] * len(requests)
    for batch in tqdm([pieces[i:i + 16] for i in range(0, len(pieces), 16)], disable=None):
        tokens = pad_sequence([torch.tensor(ids) for _, ids, _ in batch], batch_first=True).to(model.head.weight.device)
        for (i, ids, count), x, targets in zip(batch, model.activations(tokens[:, :-1]), tokens[:, 1:]):
            at = slice(len(ids) - 1 - count, len(ids) - 1)
            z = softcapped(model.head(x[at]))
            total[i] += (z.gather(1, targets[at, None])[:, 0] - z.logsumexp(1)).sum().item()
            greedy[i] &= torch.equal(z.argmax(-1), targets[at])
    return list(zip(total, greedy))


@torch.no_grad()
def continued(model: GPT, length: int, encoding: tiktoken.Encoding, prompt: str, count: int, temperature: float,
              top_k: int, seed: int) -> Iterator[str]:
    """What follows the prompt, as it comes, to the end of the text or `count` tokens: each is drawn from the top_k
    likeliest, by softmax(logits / temperature), or is the likeliest where that is 0, after the last `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    known = torch.tensor([*range(len(encoding.token_byte_values())), END_OF_TEXT])
    tokens = [END_OF_TEXT, *encoding.encode_ordinary(prompt)]
    for _ in range(count):
        window = torch.tensor([tokens[-length:]], device=model.head.weight.device)
        z = softcapped(model.head(model.activations(window)[0, -1])).cpu()[known].double()
        z, order = z.topk(min(top_k if temperature else 1, len(known)))
        p = ((z - z[0]) / (temperature or 1)).softmax(0)
        tokens.append(known[order[torch.multinomial(p, 1, generator=generator)]].item())
        if tokens[-1] == END_OF_TEXT:
            break
        yield decoder.decode(encoding.decode_single_token_bytes(tokens[-1]))
    yield decoder.decode(b"", final=True)
