"""What strangers may hand over: shards, recipes, checkpoints. Each is read, or refused in one line. A fixed seed."""

import json
import os
import shlex
import struct
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest

hypothesis = pytest.importorskip("hypothesis")

import torch  # noqa: E402
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import train_gpt  # noqa: E402
from harness.arguments import complain  # noqa: E402
from harness.checkpoint import file_sha256, read_checkpoint, write_checkpoint  # noqa: E402
from harness.shards import find_shards  # noqa: E402
from sweep import read_variations  # noqa: E402

EXAMPLES = settings(max_examples=500, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


def refusal(read, *arguments) -> str | None:
    """The line that the trainer prints where it is refused; None where it is read."""
    try:
        read(*arguments)
        return None
    except (OSError, ValueError) as error:
        with pytest.raises(SystemExit) as end:
            complain(error)
    assert "\n" not in end.value.code
    return end.value.code


# ---- shards ----

@EXAMPLES
@given(header=st.tuples(st.sampled_from([20240520] * 3 + [0]), st.sampled_from([1, 1, 1, 2])),
       body=st.lists(st.one_of(st.integers(0, 50303), st.integers(0, 65535)), max_size=8),
       claim=st.sampled_from([0] * 4 + [1, -1, -9, 2**31 - 9]), cut=st.sampled_from([0, 0, 1, 2, None]),
       length=st.integers(0, 1100))
def test_shards(tmp_path, header, body, claim, cut, length):
    """Kills: a traceback or an allocation for what a header claims; a damaged shard that is read, a whole one that is
    refused. The oracle reads the same bytes with struct."""
    header = *header, len(body) + claim
    raw = struct.pack(f"<256i{len(body)}H", *header, *[0] * 253, *body)
    raw = raw[:length if cut is None else len(raw) - cut]
    (tmp_path / "a.bin").write_bytes(raw)
    whole = (len(raw) >= 1024 and header[:2] == (20240520, 1) and len(raw) == 1024 + 2 * header[2]
             and all(token < 50304 for token in body[:header[2]]))  # what was cut off does not count
    batches = max(0, (header[2] - 2) // 2)
    found = {}
    line = refusal(lambda: found.update(find_shards(str(tmp_path / "a.bin"), 2, 1, 50304)))
    assert (line is None) == (whole and batches > 0)
    assert line is None or str(tmp_path / "a.bin") in line
    assert found in ({}, {str(tmp_path / "a.bin"): header[2]})


# ---- recipes ----

FIELDS = {f.name: f.type for f in fields(train_gpt.Hyperparameters)}
NUMBERS = {int: st.one_of(st.integers(-1, 9), st.integers(1, 400).map(lambda digits: 10**digits)),
           float: st.one_of(st.floats(), st.sampled_from([1e308, 1e-320, 0, -0.0])), str: st.text(max_size=5)}
typed = st.sampled_from(list(FIELDS)).flatmap(lambda name: NUMBERS[FIELDS[name]].map(lambda value: f"{name}={value}"))
odd = ["@\n", "head_lr\n=1", "head_lr=1\n2", "matrix_update=\n", "head_lr=\ud800", "@" + "a" * 300, "@", "=",
       "head_lr=" + "9" * 5000, "matrix_update=\ud800", "floor.target=\n", "floor.=1", ".=",
       "floor.target=" + "9" * 999]
words = st.one_of(typed, typed, st.sampled_from(odd), st.text(max_size=8), st.text(max_size=8).map("@".__add__))


@EXAMPLES
@given(words=st.lists(words, min_size=1, max_size=3))
@example(words=[f"model_dim={10**400}"])
def test_words(words):
    """Kills: an overflow, a name of several lines, a file name that no system takes, each a traceback."""
    refusal(train_gpt.override, words)


lines = st.lists(words).map(lambda lines: "\n".join(lines).encode("utf-8", "replace"))


@EXAMPLES
@given(content=st.one_of(st.binary(max_size=30), lines))
def test_recipe_files(tmp_path, content):
    """Kills: a recipe that is no text, that takes another recipe, or itself, without end; one that is not named."""
    path = tmp_path / "recipe"
    path.write_bytes(content)
    refusal(train_gpt.override, [f"@{path}"])
    try:
        content.decode()
    except UnicodeDecodeError:
        assert str(path) in refusal(train_gpt.override, [f"@{path}"])


def test_large_recipes(tmp_path):
    """Kills: a file of any size read whole, and the nearest name sought for a name of a megabyte."""
    (tmp_path / "recipe").write_text("a" * 10**6 + "=1\n")
    assert "recipe" in refusal(train_gpt.override, [f"@{tmp_path}/recipe"])[:200]


# ---- checkpoints ----

def write(folder: Path, pickled: bytes):
    """A checkpoint, with the right hash in its manifest, of such a pickle and a storage of 16 bytes."""
    files = {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", "data/0": bytes(16)}
    with zipfile.ZipFile(folder / "a.pt", "w") as file:
        for name, content in files.items():
            file.writestr(f"archive/{name}", content)
    vouch(folder)


def vouch(folder: Path):
    path = folder / "a.pt"
    manifest = dict(file="a.pt", bytes=os.path.getsize(path), sha256=file_sha256(path))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


STORAGE = b"(X\x07\0\0\0storage" + named("torch", "FloatStorage") + b"X\1\0\0\x000X\3\0\0\0cpuK\x04tQ"
TENSOR = named("torch._utils", "_rebuild_tensor_v2") + b"(" + STORAGE + b"K\0K\x04\x85K\1\x85\x89)tR"
NAMES = ["collections.OrderedDict", "collections.Counter", "torch.Size", "torch.Tensor", "torch.device", "os.system",
         "torch.nn.parameter.Parameter", "_codecs.encode", "builtins.set", "torch._utils._rebuild_parameter",
         "torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "torch._tensor._rebuild_from_type_v2"]
INTEGERS = [b"K\x05", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\x7f" * 8, b"\x8b\xff\xff\xff\x7f"]
TEXTS = [b"X\3\0\0\0cpu", b"X\xff\xff\xff\x7fa"]
STACK = [b"}", b"]", b")", b"(", b"t", b"R", b"Q", b"b", b"u", b"s", b"a", b"e", b"\x85", b"\x86", b"N", b"q\0", b"h\0",
         b"h\x07", b".", b"0", b"2"]
PIECES = [STORAGE, TENSOR, *STACK, *INTEGERS, *TEXTS, *(named(*name.rsplit(".", 1)) for name in NAMES)]


@EXAMPLES
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12), end=st.sampled_from([b".", b""]))
def test_pickles(tmp_path, pieces, end):
    """Kills: what a stack machine raises on a pickle that was not made by one."""
    write(tmp_path, b"\x80\x02" + b"".join(pieces) + end)
    refusal(read_checkpoint, tmp_path)


@pytest.mark.parametrize("call", [named("builtins", "bytearray"), named("__builtin__", "bytearray")])
def test_a_number_that_becomes_memory(tmp_path, call):
    """Kills: 200 MB for nine bytes, or any other number: torch's weights_only lets a pickle call bytearray(N)."""
    write(tmp_path, b"\x80\x02" + call + b"J" + struct.pack("<i", 2 * 10**8) + b"\x85R.")
    assert "is no checkpoint" in refusal(read_checkpoint, tmp_path)


@EXAMPLES
@given(at=st.floats(0, 1), data=st.binary(min_size=1, max_size=8), length=st.integers(0, 8))
def test_damaged_files(checkpoint, at, data, length):
    """Kills: what zipfile and torch raise on a file with some bytes replaced, added or lost."""
    folder, raw = checkpoint
    start = int(at * len(raw))
    (folder / "a.pt").write_bytes(raw[:start] + data + raw[start + length:])
    vouch(folder)
    refusal(read_checkpoint, folder)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "run"
    write_checkpoint(folder, "a.pt", {"x": torch.zeros(3), "step": 5, "names": ["a"]})
    return folder, (folder / "a.pt").read_bytes()


anything = st.one_of(st.integers(), st.floats(), st.none(), st.text(max_size=4))
paths = st.sampled_from(["../a.pt", "a.pt", "./a.pt", "/etc/passwd", "b.pt", "\0.pt", "manifest.json"])
manifests = st.one_of(
    st.binary(max_size=20), st.sampled_from([b"[" * 4000, b"[]", b"5", b'{"file": ' + b"9" * 4050]),
    st.fixed_dictionaries(dict(file=st.one_of(paths, paths, anything)), optional=dict(
        bytes=st.one_of(st.just("BYTES"), anything), sha256=st.one_of(st.just("SHA256"), anything))))


@EXAMPLES
@given(manifest=manifests)
def test_manifests(checkpoint, manifest):
    """Kills: a traceback on a manifest of other types; a file outside of the folder read, whole as it is and with its
    right size and hash; one that the manifest does not vouch for."""
    folder, raw = checkpoint
    (folder.parent / "a.pt").write_bytes(raw)
    right = dict(BYTES=len(raw), SHA256=file_sha256(folder / "a.pt"))
    if isinstance(manifest, dict):
        manifest = {name: right.get(value, value) for name, value in manifest.items()}
    (folder / "manifest.json").write_bytes(manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode())
    assert (refusal(read_checkpoint, folder) is None) == (manifest == dict(file="a.pt", bytes=len(raw),
                                                                           sha256=right["SHA256"]))


# ---- files of variations ----

word = st.text(st.characters(categories=("L", "N", "P", "S"), include_characters=" "), max_size=8)
named = st.tuples(st.from_regex(r"[\w.+-]+", fullmatch=True), st.lists(word.map("x={}".format), max_size=3))
variations = st.lists(named, min_size=1, max_size=4, unique_by=lambda line: line[0])
marks = st.text(st.sampled_from("ab=: '\"\\\n#@-\0é"), max_size=60).map(str.encode)


@settings(EXAMPLES, max_examples=150)
@given(lines=variations, comments=st.lists(st.sampled_from(["", " ", "# a: b=1"]), max_size=3))
def test_variations_are_read_as_a_shell_would(tmp_path, lines, comments):
    """Kills: a word that is cut at a space, a quotation mark or a #; a line or a name that is lost."""
    text = [*comments, *(f"{name}: {shlex.join(words)}  # {name}" for name, words in lines)]
    (tmp_path / "v").write_text("\n".join(text), encoding="utf-8")
    assert read_variations(tmp_path / "v") == [(len(comments) + k, *line) for k, line in enumerate(lines, 1)]


@settings(EXAMPLES, max_examples=150)
@given(raw=st.one_of(st.binary(max_size=60), marks))
def test_any_file_of_variations_is_read_or_refused(tmp_path, raw):
    """Kills: a traceback; a refusal that does not name the file; a variation without a name, or two of one name."""
    (tmp_path / "v").write_bytes(raw)
    found = []
    line = refusal(lambda: found.extend(read_variations(tmp_path / "v")))
    assert line and not found and str(tmp_path / "v") in line or len({each.name for each in found}) == len(found) > 0
    assert all(other.number > each.number > 0 for each, other in zip(found, found[1:]))
    assert all("=" in word or word[0] == "@" for each in found for word in each.words)
