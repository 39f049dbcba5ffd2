"""What a run with --checkpoint-every N or --checkpoint-last has trained; CHECKPOINT is its logs/NAME.checkpoint.

    python -m trained sample CHECKPOINT [PROMPT]      text that follows the prompt
    python -m trained evaluate CHECKPOINT [TASK ...]  scores of lm-evaluation-harness, by default `paper`: seven tasks
    python -m trained export CHECKPOINT [FOLDER]      weights for other programs, by default in logs/NAME.export
"""

import argparse
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import torch

from harness.checkpoint import folder_of, replacing
from harness.log import source_of_run
from harness.run import standing
from train_gpt import EXPERIMENT
from trained.model import END_OF_TEXT, continued, encoding_of, load, make_encoding

NUMBERS = [("tokens", 200, 1, "of text"), ("temperature", 0.8, 0, "0 takes the likeliest token"),
           ("top-k", 200, 1, "tokens of which one is drawn"), ("seed", 0, 0, "of what is drawn"),
           ("shots", -1, -1, "-1: the task's own"), ("limit", 0, 0, "questions; 0: all")]  # name, default, least


def sample(options: argparse.Namespace):
    model, hp, _ = load(options.checkpoint)
    encoding, prompt = make_encoding(options.encoding or encoding_of(hp), hp.vocab_size), " ".join(options.words)
    said = continued(model, hp.sequence_length, encoding, prompt, options.tokens, options.temperature, options.top_k,
                     options.seed)
    for text in itertools.chain([prompt], said, "\n"):
        print(text, end="", flush=True)


def evaluate(options: argparse.Namespace):
    if not importlib.util.find_spec("lm_eval"):
        raise ValueError("evaluate needs lm-evaluation-harness: python -m pip install -r trained/requirements.txt")
    from trained.evaluate import Adapter, scores, table
    model, hp, state = load(options.checkpoint)
    adapter = Adapter(model, hp.sequence_length, make_encoding(options.encoding or encoding_of(hp), hp.vocab_size))
    found = scores(adapter, options.words or ["paper"], options.shots, options.limit)
    found |= dict(checkpoint=options.checkpoint, metric=hp.metric, step=state["step"], seed=state["seed"])
    print(json.dumps(found, indent=1, default=str) if options.json else table(found))


def export(options: argparse.Namespace):
    """The format is that of github.com/huggingface/safetensors: the header's length, the header, the numbers."""
    model, hp, state = load(options.checkpoint)
    header, end = {}, 0
    for name, x in model.named_parameters():
        begin, end = end, end + 2 * x.numel()
        header[name] = dict(dtype="BF16", shape=list(x.shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    folder = Path(*options.words or [folder_of(options.checkpoint).with_suffix(".export")])
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.safetensors") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in model.parameters():
            file.write(x.cpu().flatten().view(torch.uint8).numpy())
    about = dict(model="GPT(Hyperparameters()) of program.py", parameters=end // 2, sha256=file.sha256.hexdigest(),
                 encoding=options.encoding or encoding_of(hp), end_of_text=END_OF_TEXT, metric=hp.metric,
                 step=state["step"], seed=state["seed"], source_sha256=state["source_sha256"], hyperparameters=vars(hp))
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (folder / "program.py").write_text(source_of_run(EXPERIMENT.script, hp), encoding="utf-8")


def main(words: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m trained", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = {verb.__name__: verb for verb in (sample, evaluate, export)}
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("words", nargs="*", metavar="PROMPT | TASK | FOLDER")
    parser.add_argument("--encoding", choices=("gpt2", "bytes"), help="default: by the manifest beside the shards")
    parser.add_argument("--json", action="store_true", help="scores for machines")
    for name, default, least, meaning in NUMBERS:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{meaning} ({default})")
    options = parser.parse_intermixed_args(words)
    try:
        if (world := standing()[2]) > 1:
            raise ValueError(f"WORLD_SIZE={world} in the environment: this is one process; start it without torchrun")
        for name, _, least, _ in NUMBERS:
            if not least <= getattr(options, name.replace("-", "_")) < 2**63:
                raise ValueError(f"--{name} is at least {least}, and below 2^63")
        verbs[options.verb](options)
    except (OSError, ValueError, KeyboardInterrupt) as error:
        sys.exit(f"python -m trained: {' '.join(str(error).split()) or 'interrupted'}")


if __name__ == "__main__":
    main()
