"""The programs of data/ against independent readers: numpy's for the format, tiktoken's decoder for the ids."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cached_fineweb10B
import cached_fineweb100B
import fineweb
import local
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import shards
import tiktoken

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
EOT = 50256
ODD_TEXTS = ["plain", "", "\0 a NUL \0", "<|endoftext|> is text", "lone \ud83d surrogate",
             "naïve 日本 😀\r\n", " " * 999]


@pytest.fixture
def gpt2(monkeypatch):
    if not (SHARED / "tiktoken_cache").is_dir():
        pytest.skip("GPT-2's vocabulary is not beside the repository")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    return tiktoken.get_encoding("gpt2")


@pytest.fixture
def texts(tmp_path):
    """A folder of 40 texts of some 70 bytes, copies, binaries and hidden files; and the texts that shards may hold."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    wanted = {f"é {hashlib.sha256(bytes([number])).hexdigest()}\r\n".encode() for number in range(40)}
    for number, raw in enumerate(sorted(wanted)):
        (folder / ("deep" if number % 2 else ".") / f"{number}.txt").write_bytes(raw)
        (folder / f"copy {number}.md").write_bytes(raw)
    unwanted = {"a.bin": b"a\0b", "late.bin": b"a" * 9000 + b"\0", "latin.txt": b"\xe9t\xe9", "empty.py": b""}
    for name, raw in {**unwanted, ".hidden/x": b"hidden", ".y": b"hidden too"}.items():
        (folder / name).write_bytes(raw)
    (folder / "dangling").symlink_to(folder / "nowhere")
    return folder, wanted


def read(folder: Path, part: str = "*") -> np.ndarray:
    """The tokens of a folder's shards, validation first."""
    paths = sorted(folder.glob(f"*_{part}_*.bin"), key=lambda path: path.name.split("_")[-1])
    return np.concatenate([np.fromfile(path, "<u2")[512:] for path in paths])


def opened(documents) -> list[int]:
    return [token for tokens in documents for token in (EOT, *tokens)]


def split_documents(tokens: np.ndarray) -> list[list[int]]:
    assert tokens[0] == EOT
    return [part[1:].tolist() for part in np.split(tokens, np.flatnonzero(tokens == EOT)[1:])]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(program: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, f"data/{program}", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


# ---- shards.py ----


def test_a_shard_is_256_int32_and_its_tokens(tmp_path):
    """Catches another header length, field order or byte order, and a sha256 of something else than the file."""
    path, tokens = tmp_path / "x.bin", np.array([0, 1, 258, EOT, 65535], np.uint16)
    sha256 = shards.write_shard(path, tokens)
    raw = path.read_bytes()
    assert np.frombuffer(raw[:1024], "<i4").tolist() == [20240520, 1, 5] + [0] * 253
    assert raw[1024:] == b"\0\0\1\0\2\1" + EOT.to_bytes(2, "little") + b"\xff\xff"
    assert shards.check_shard(path) == 5
    assert sha256 == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda raw: None, "no such shard"),
        (lambda raw: b"", "0 bytes"),
        (lambda raw: raw[:1000], "1000 bytes end within the header"),
        (lambda raw: b"\1" + raw[1:], "magic"),
        (lambda raw: raw[:4] + b"\2" + raw[5:], "version 2"),
        (lambda raw: raw[:-1], "1,043 bytes where the 10 tokens"),
        (lambda raw: raw + b"\0\0", "1,046 bytes where the 10 tokens"),
        (lambda raw: raw[:8] + b"\x0b" + raw[9:], "11 tokens of its header need 1,046"),
    ],
)
def test_a_damaged_shard_is_named_with_fault_and_remedy(tmp_path, damage, fault):
    """Catches each check of check_shard that is left out, and an error that does not say what to do."""
    path = tmp_path / "x.bin"
    shards.write_shard(path, np.arange(10, dtype=np.uint16))
    raw = damage(path.read_bytes())
    path.unlink() if raw is None else path.write_bytes(raw)
    with pytest.raises(ValueError, match=fault) as caught:
        shards.check_shard(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "make or download it" in message and "\n" not in message


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    """Catches writing in place, and a temporary file that stays."""
    path = tmp_path / "x.bin"
    shards.write_shard(path, np.arange(10, dtype=np.uint16))
    before = contents(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shards.write_shard(path, np.arange(20, dtype=np.uint16))
    assert contents(tmp_path) == before != {}


@pytest.mark.parametrize("lengths", [[7], [3, 2, 5], [5, 5], [1] * 12, [0, 23, 0, 4], [5, 0]])
def test_cutting_loses_and_adds_nothing(lengths):
    """Catches tokens dropped where a document spans shards, a buffer used twice, and an empty last shard."""
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    pieces = list(shards.cut(np.split(tokens, np.cumsum(lengths)[:-1]), 5))
    assert np.concatenate(pieces).tolist() == tokens.tolist()
    assert all(len(piece) == 5 for piece in pieces[:-1]) and 1 <= len(pieces[-1]) <= 5


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_old_shards_stay_until_the_new_are_complete(tmp_path, error):
    """Catches removing or replacing old shards before the last new one is there, and stale ones that outlive it."""
    make = [np.full(4, number, np.uint16) for number in range(5)]
    shards.make_shards(tmp_path, "x", make[:4], {})
    (tmp_path / "notes.bin").write_text("somebody's")
    before = contents(tmp_path)

    def fails():
        yield from make[:2]
        raise error

    with pytest.raises(error):
        shards.make_shards(tmp_path, "x", fails(), {})
    with pytest.raises(ValueError, match="ends within the validation shard"):
        shards.make_shards(tmp_path, "x", make[:1], {})
    assert contents(tmp_path) == before
    shards.make_shards(tmp_path, "x", make[3:], {"made": "again"})
    assert read(tmp_path).tolist() == [3] * 4 + [4] * 4
    assert set(contents(tmp_path)) == {"x_val_000000.bin", "x_train_000001.bin", "manifest.json", "notes.bin"}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    sha256 = hashlib.sha256((tmp_path / "x_train_000001.bin").read_bytes()).hexdigest()
    assert manifest["made"] == "again"
    assert manifest["shards"]["x_train_000001.bin"] == {"tokens": 4, "documents": 0, "sha256": sha256}


# ---- local.py ----


def test_byte_ids_are_gpt2s(gpt2):
    """Catches a byte used as its own id, and another order of the 68 bytes that do not print."""
    raw = bytes(range(256))
    first, *ids = local.encode_bytes(raw).tolist()
    assert first == EOT
    assert [gpt2.decode_single_token_bytes(token) for token in ids] == [bytes([byte]) for byte in raw]


@pytest.mark.parametrize("encoding", ["bytes", "gpt2"])
def test_local_shards_hold_each_text_once(texts, tmp_path, gpt2, encoding):
    """Catches a text lost, cut at the split, or on both its sides; a copy, binary, hidden or empty file taken in."""
    folder, wanted = texts
    out = folder / "out"  # within the source: a second making must not eat the first one's manifest
    local.main([str(folder), "--out", str(out), "--encoding", encoding, "--val-tokens", "300", "--shard-tokens", "500"])
    (out / "manifest.json").touch()
    local.main([str(folder), "--out", str(out), "--encoding", encoding, "--val-tokens", "350", "--shard-tokens", "500"])
    validation, training = (split_documents(read(out, part)) for part in ("val", "train"))
    found = [gpt2.decode_bytes(tokens) for tokens in validation + training]
    assert sorted(found) == sorted(wanted)
    held = len(opened(validation))
    assert held - len(opened(validation[-1:])) <= 350 < held
    assert len(list(out.glob("local_train_*.bin"))) == -(-len(opened(training)) // 500)


def test_the_same_texts_give_the_same_shards(texts, tmp_path, monkeypatch):
    """Catches an unseeded shuffle, an order taken from the file system, and a path of this machine in the manifest."""
    folder, _ = texts
    arguments = ["--encoding", "bytes", "--val-tokens", "300"]
    local.main([str(folder), "--out", str(tmp_path / "a"), *arguments])
    walk = os.walk

    def walk_backwards(top):
        for root, folders, names in walk(top):
            folders.reverse()
            yield root, folders, names[::-1]

    monkeypatch.setattr(os, "walk", walk_backwards)
    moved = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, moved, symlinks=True)
    local.main([str(moved), "--out", str(tmp_path / "b"), *arguments])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert str(tmp_path) not in (tmp_path / "a" / "manifest.json").read_text()


def test_texts_are_shuffled(texts, tmp_path):
    """Catches a split in the order of the folder, where validation would be another distribution than training."""
    folder, wanted = texts
    local.main([str(folder), "--out", str(tmp_path / "a"), "--encoding", "bytes", "--val-tokens", "1000"])
    by_bytes = {tuple(local.encode_bytes(raw)[1:].tolist()): number for number, raw in enumerate(sorted(wanted))}
    order = [by_bytes[tuple(tokens)] for tokens in split_documents(read(tmp_path / "a"))]
    assert sum(later > earlier for earlier, later in zip(order, order[1:])) < 30


def test_whole_shards_of_the_same_making_are_kept(texts, tmp_path, monkeypatch, capsys):
    """Catches making again what is there, and keeping what is damaged, of other texts or of other arguments."""
    folder, _ = texts
    out, makings = tmp_path / "a", []
    monkeypatch.setattr(local, "make_shards", lambda *rest: makings.append(rest) or shards.make_shards(*rest))

    def made_again(*arguments) -> bool:
        before = len(makings)
        local.main([str(folder), "--out", str(out), "--encoding", "bytes", "--val-tokens", "300", *arguments])
        return len(makings) > before

    assert made_again() and not made_again()
    assert capsys.readouterr().out.endswith(f"{out}: whole shards of these files are here already\n")
    assert made_again("--shard-tokens", "700") and made_again()
    (folder / "0.txt").write_text("changed")
    assert made_again()
    shards.write_shard(out / "local_train_000001.bin", np.arange(10, dtype=np.uint16))
    assert made_again()
    (out / "local_val_000000.bin").unlink()
    assert made_again() and not made_again()


def test_no_vocabulary_falls_back_to_bytes(texts, tmp_path, monkeypatch, capsys):
    """Catches a download that hangs the program or ends it, a silent fallback, and one that nobody asked for."""
    folder, wanted = texts
    end, ended = threading.Event(), []
    hang, fail = (lambda name: ended.append(end.wait(30))), (lambda name: 1 / 0)
    for get_encoding, seconds, reason in ((hang, 0.1, "it takes too long"), (fail, 15, "ZeroDivisionError")):
        monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
        monkeypatch.setattr(local, "VOCABULARY_SECONDS", seconds)
        out = tmp_path / reason
        local.main([str(folder), "--out", str(out), "--val-tokens", "300"])
        assert not ended  # the download that hangs was not waited for
        line = capsys.readouterr().out.splitlines()[0]
        assert line == f"encoding: bytes (GPT-2's vocabulary cannot be loaded: {reason})"
        assert len(read(out)) == sum(len(raw) + 1 for raw in wanted)
        with pytest.raises(OSError, match="check the network, or leave --encoding out"):
            local.main([str(folder), "--out", str(tmp_path / "forced"), "--encoding", "gpt2"])
    end.set()
    assert not (tmp_path / "forced").exists()


def test_the_standard_library_is_the_default(tmp_path, gpt2):
    """Catches a program that starts only under pytest, and tests, packages or other files among its texts."""
    first, second = (run("local.py", "--encoding", "bytes", "--out", tmp_path / "a") for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "") and "already" in second.stdout
    found = {gpt2.decode_bytes(tokens) for tokens in split_documents(read(tmp_path / "a"))}
    assert {Path(module.__file__).read_bytes() for module in (json, subprocess, shutil)} <= found
    listed = [Path(name) for name, _, _ in local.list_files(local.STDLIB, tmp_path).values()]
    assert all(path.suffix == ".py" for path in listed)
    assert not any(set(path.parts) & {"test", "tests", "site-packages"} for path in listed)
    assert len(found) > 400


# ---- cached_fineweb10B.py, cached_fineweb100B.py ----


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose files are 10 tokens; `calls` are its downloads, `broken` the next ones that arrive damaged."""
    hub = SimpleNamespace(folder=tmp_path / "fineweb10B", dataset="kjj0/fineweb10B-gpt2", calls=[], broken=0, asked=0,
                          entries=[])
    whole = tmp_path / "whole"
    sha256 = shards.write_shard(whole, np.arange(10, dtype=np.uint16))
    for number in range(1031):
        name = f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"
        hub.entries.append(SimpleNamespace(path=name, size=1044, lfs=SimpleNamespace(sha256=sha256)))

    class Api:
        def dataset_info(self, repository):
            hub.asked += 1
            return SimpleNamespace(sha="abc")

        def list_repo_tree(self, repository, folder, *, repo_type, revision):
            assert (repository, folder, repo_type, revision) == (hub.dataset, None, "dataset", "abc")
            return iter([SimpleNamespace(path=".gitattributes"), *hub.entries])

    def download(repository, name, *, repo_type, revision, local_dir, force_download):
        assert (repository, repo_type, revision) == (hub.dataset, "dataset", "abc")
        hub.calls.append(name)
        if force_download or not (local_dir / name).exists():  # as the real one: what exists is not looked at
            hub.broken -= 1
            (local_dir / name).write_bytes(b"half" if hub.broken >= 0 else whole.read_bytes())

    monkeypatch.setattr(cached_fineweb10B, "DATA", tmp_path)
    monkeypatch.setattr(cached_fineweb10B, "HfApi", Api)
    monkeypatch.setattr(cached_fineweb10B, "hf_hub_download", download)
    hub.download = download
    return hub


def test_download_fetches_what_is_not_whole(hub, capsys):
    """Catches a damaged shard taken for whole, one byte of it among them; a whole one fetched again; a hub asked again
    for what the manifest says; N counted from another number; a damaged shard replaced without a word."""
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    cached_fineweb10B.main(["2"])
    assert hub.calls == names and sorted(contents(hub.folder)) == sorted([*names, "manifest.json"])
    manifest = json.loads((hub.folder / "manifest.json").read_text())
    assert (manifest["dataset"], manifest["revision"]) == ("kjj0/fineweb10B-gpt2", "abc")
    sha256 = hashlib.sha256((hub.folder / names[0]).read_bytes()).hexdigest()
    assert len(manifest["shards"]) == 1031 and manifest["shards"][names[0]] == {"tokens": 10, "sha256": sha256}
    cached_fineweb10B.main(["2"])
    assert hub.calls == names and hub.asked == 1
    path = hub.folder / names[1]
    for raw, fault in ((path.read_bytes()[:-2], "1,042 bytes where the 10 tokens of its header need 1,044"),
                       (path.read_bytes()[:-1] + b"x", "its sha256 is another than the one on record")):
        path.write_bytes(raw)
        capsys.readouterr()
        before = len(hub.calls)
        cached_fineweb10B.main(["2"])
        assert hub.calls[before:] == names[1:2] and hub.asked == 1
        assert capsys.readouterr().out.splitlines()[0] == f"{names[1]} (1 of 1): {fault}; fetching it again"
        assert shards.check_shard(path, sha256) == 10


def test_ten_times_as_many(hub, monkeypatch):
    """Catches the first dataset's name, folder, number of shards or program in the second one's download."""
    hub.dataset = "kjj0/fineweb100B-gpt2"
    with pytest.raises(ValueError, match="ask for 1 to 1030"):
        cached_fineweb10B.main(["1031"], cached_fineweb100B.FINEWEB_100B)
    cached_fineweb10B.main(["104"], cached_fineweb100B.FINEWEB_100B)
    folder = hub.folder.parent / "fineweb100B"
    assert len(hub.calls) == 105 and {*hub.calls, "manifest.json"} == contents(folder).keys()
    assert not list(hub.folder.glob("*"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["program"] == "data/cached_fineweb100B.py" and (REPOSITORY / manifest["program"]).exists()


def test_what_was_found_right_is_not_read_again(hub, monkeypatch):
    """Catches 206 GB that are hashed at every start; a download that was interrupted hashed from its beginning; a
    change after the hash, that keeps size and time of modification, taken for whole."""
    read, file_sha256 = [], shards.file_sha256
    monkeypatch.setattr(shards, "file_sha256", lambda file: read.append(Path(file.name).name) or file_sha256(file))
    with monkeypatch.context() as patch:
        patch.setattr(cached_fineweb10B, "hf_hub_download", lambda dataset, name, **rest:
                      1 / 0 if "2" in name else original(dataset, name, **rest))
        original = hub.download
        with pytest.raises(OSError, match="000002.bin cannot be fetched"):
            cached_fineweb10B.main(["3"])
    read.clear()
    cached_fineweb10B.main(["3"])
    assert read == ["fineweb_train_000002.bin", "fineweb_train_000003.bin"]
    cached_fineweb10B.main(["3"])
    assert len(read) == 2
    path = hub.folder / "fineweb_train_000001.bin"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    cached_fineweb10B.main(["3"])
    assert hub.calls[-1] == path.name and read[2:] == [path.name] * 2
    for text in ("[1]", "3", "{}"):
        manifest = json.loads((hub.folder / "manifest.json").read_text()) | {"found_right": json.loads(text)}
        (hub.folder / "manifest.json").write_text(json.dumps(manifest))
        cached_fineweb10B.main(["3"])
    assert len(hub.calls) == 5


def test_shards_that_were_copied_here(hub, monkeypatch):
    """Catches whole shards without a manifest that are useless without a network; a missing one passed over there."""
    cached_fineweb10B.main(["2"])
    (hub.folder / "manifest.json").unlink()
    monkeypatch.setattr(cached_fineweb10B, "HfApi", lambda: 1 / 0)
    cached_fineweb10B.main(["2"])
    with pytest.raises(OSError, match=r"kjj0/fineweb10B-gpt2 cannot be fetched \(division by zero\)"):
        cached_fineweb10B.main(["3"])


def test_a_manifest_is_believed_only_if_it_tells_the_hashes(hub):
    """Catches a traceback on what stands in manifest.json, and shards whose hash it does not tell taken on trust."""
    cached_fineweb10B.main(["1"])
    good = (hub.folder / "manifest.json").read_text()
    for number, text in enumerate(["[", "[]", "{}", good.replace("revision", ""), good.replace("sha256", "")], 2):
        (hub.folder / "manifest.json").write_text(text)
        (hub.folder / "fineweb_val_000000.bin").unlink()
        cached_fineweb10B.main(["1"])
        assert hub.asked == number and len(hub.calls) == number + 1


def test_a_second_damaged_download_is_an_error(hub):
    """Catches one damaged transfer that ends the program, and two that pass or go on for ever."""
    hub.broken = 1
    cached_fineweb10B.main(["1"])
    assert len(hub.calls) == 3
    (hub.folder / "fineweb_train_000001.bin").unlink()
    hub.broken = 2
    with pytest.raises(ValueError, match="fineweb_train_000001.bin: its 4 bytes"):
        cached_fineweb10B.main(["1"])
    assert len(hub.calls) == 5


def test_download_needs_room_and_a_network(hub, monkeypatch):
    """Catches a disk that fills up half-way, also with what a killed download left; an error of the hub client that
    escapes; an N without meaning."""
    with pytest.raises(ValueError, match="ask for 1 to 103"):
        cached_fineweb10B.main(["104"])
    left = hub.folder / ".cache" / "huggingface" / "download" / "x.1a2b3c4d.incomplete"
    left.parent.mkdir(parents=True)
    left.touch()
    for entry in hub.entries:
        entry.size = 200_001_024
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 200_001_024 - 1 + left.exists()))
        with pytest.raises(ValueError, match="3 shards need 0.6 GB"):
            cached_fineweb10B.main(["2"])
        assert hub.calls == []
    monkeypatch.setattr(cached_fineweb10B, "hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises(OSError, match=r"fineweb_val_000000.bin cannot be fetched \(division by zero\)"):
        cached_fineweb10B.main(["3"])


# ---- fineweb.py ----


def write_texts(folder: Path) -> tuple[list[Path], list[str]]:
    """The odd texts in each kind of file, and the texts in their order. Only JSON can hold a lone surrogate."""
    storable = [text.replace("\ud83d", "?") for text in ODD_TEXTS]
    paths = [folder / name for name in ("a.jsonl", "b.parquet", "c.txt")]
    paths[0].write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in ODD_TEXTS))
    table = pyarrow.table({"id": range(len(storable)), "text": storable})
    pyarrow.parquet.write_table(table, paths[1], row_group_size=3)
    paths[2].write_bytes(storable[5].encode())
    return paths, ODD_TEXTS + storable + [storable[5]]


def test_odd_text_survives_in_order(tmp_path, gpt2, monkeypatch):
    """Catches lost or reordered documents, special tokens made from text, translated newlines, a crash on odd text."""
    monkeypatch.setattr(fineweb, "BATCH_CHARACTERS", 10)
    paths, texts = write_texts(tmp_path)
    fineweb.main([*map(str, paths), "--out", str(tmp_path / "out"), "--shard-tokens", "1000"])
    tokens = read(tmp_path / "out")
    found = [gpt2.decode_bytes(document) for document in split_documents(tokens)]
    assert found == [text.replace("\ud83d", "\ufffd").encode() for text in texts]
    assert tokens.tolist() == opened(gpt2.encode(text, disallowed_special=()) for text in texts)
    assert shards.check_shard(tmp_path / "out" / "fineweb_val_000000.bin") == 1000
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["files"] == ["a.jsonl", "b.parquet", "c.txt"]
    assert manifest["versions"]["tiktoken"] == tiktoken.__version__


def test_fineweb_comes_from_one_revision_in_order(tmp_path, gpt2, monkeypatch):
    """Catches files taken in the order of the listing, from a revision that may move, or from another folder."""
    for name in ("000", "001"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [f"file {name}"]}), tmp_path / f"{name}.parquet")
    entries = [SimpleNamespace(path=f"sample/10BT/{name}.parquet", size=9) for name in ("001", "000")]

    class Api:
        def dataset_info(self, repository):
            return SimpleNamespace(sha="abc")

        def list_repo_tree(self, repository, folder, *, repo_type, revision):
            assert (repository, folder, repo_type, revision) == (
                "HuggingFaceFW/fineweb", "sample/10BT", "dataset", "abc")  # fmt: skip
            return iter(entries)

    def download(repository, name, *, repo_type, revision):
        assert (repository, repo_type, revision) == ("HuggingFaceFW/fineweb", "dataset", "abc")
        return str(tmp_path / Path(name).name)

    monkeypatch.setattr(cached_fineweb10B, "HfApi", Api)
    monkeypatch.setattr(fineweb, "hf_hub_download", download)
    fineweb.main(["--out", str(tmp_path / "out"), "--shard-tokens", "3"])
    assert read(tmp_path / "out").tolist() == opened(gpt2.encode(f"file {name}") for name in ("000", "001"))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["revision"] == "abc"


def test_fineweb_sample_decodes_to_itself(tmp_path, gpt2, monkeypatch):
    """Catches batches that are lost, doubled or reordered between the workers, on real text of 500 batches."""
    monkeypatch.setattr(fineweb, "BATCH_CHARACTERS", 2000)
    sample = SHARED / "fineweb_sample" / "fineweb_sample.txt"
    if not sample.exists():
        pytest.skip("the FineWeb sample is not beside the repository")
    lines = sample.read_bytes().decode().splitlines(keepends=True)
    source = tmp_path / "lines.jsonl"
    source.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    fineweb.main([str(source), "--out", str(tmp_path / "out"), "--shard-tokens", "100000"])
    tokens = read(tmp_path / "out")
    assert gpt2.decode(tokens[tokens != EOT]) == "".join(lines)
    assert np.count_nonzero(tokens == EOT) == len(lines)


def test_a_document_of_50_mb(tmp_path, gpt2):
    """Catches a tokenizer, a batch or a shard that gives way under one long document; a shard that loses a part."""
    text = (" understanding government responsibility information" * 10 + "<|endoftext|>\0") * 94_000
    (tmp_path / "long.txt").write_text(text)
    fineweb.main([str(tmp_path / "long.txt"), "--out", str(tmp_path / "out"), "--shard-tokens", "3000000"])
    tokens = read(tmp_path / "out")
    assert len(text) > 50e6 and np.flatnonzero(tokens == EOT).tolist() == [0] and gpt2.decode(tokens[1:]) == text


# ---- all of them ----


# A program that waits after each file in its folder; and, of the hub, a client that does as the real one: it takes a
# lock on the file, deletes what another process has fetched meanwhile, and fetches it.
SLOW = """
import fcntl, os, sys, time
from types import SimpleNamespace
import numpy as np
import shards
import {module} as program

def slow(source, target, replace=os.replace):
    replace(source, target)
    time.sleep(float(os.environ["PAUSE"]) * (str(target.parent) == "{out}"))

def download(repository, name, *, local_dir, **_):
    with open(local_dir.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (local_dir / name).unlink(missing_ok=True)
        with open(local_dir.parent / "calls", "a") as calls:
            calls.write(name + "\\n")
        shards.write_shard(local_dir / name, np.arange(10, dtype=np.uint16))

class Api:
    def dataset_info(self, repository):
        return SimpleNamespace(sha="abc")

    def list_repo_tree(self, *_, **__):
        sha256 = "{sha256}"
        names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{{n:06d}}.bin" for n in range(1, 104)]
        return [SimpleNamespace(path=name, size=1044, lfs=SimpleNamespace(sha256=sha256)) for name in names]

if __name__ == "__main__":
    os.replace = slow
    if program.__name__ == "cached_fineweb10B":
        program.DATA, program.HfApi, program.hf_hub_download = shards.Path("{out}").parent, Api, download
    with shards.one_line_errors("x"):
        program.main(sys.argv[1:])
"""


@pytest.mark.parametrize("module, first, second", [
    ("local", ["{texts}", "--out", "{out}", "--encoding", "bytes", "--val-tokens", "300", "--shard-tokens", "200"],
     ["{texts}", "--out", "{out}", "--encoding", "bytes", "--val-tokens", "300", "--shard-tokens", "210"]),
    ("fineweb", ["{texts}/0.txt", "{texts}/deep/1.txt", "--out", "{out}", "--shard-tokens", "6"],
     ["{texts}/0.txt", "{texts}/deep/1.txt", "--out", "{out}", "--shard-tokens", "7"]),
    ("cached_fineweb10B", ["12"], ["13"]),
])
def test_two_processes_in_one_folder(module, first, second, texts, tmp_path, gpt2):
    """Catches shards of one making among those of another, a file that the other process has just removed, a manifest
    of what is not there; a download that is made twice, the first one deleted for it."""
    out, script = tmp_path / ("fineweb10B" if module == "cached_fineweb10B" else "out"), tmp_path / "slow.py"
    sha256 = shards.write_shard(tmp_path / "whole", np.arange(10, dtype=np.uint16))
    script.write_text(SLOW.format(module=module, out=out, sha256=sha256))
    programs = []
    for words, pause in ((first, "0.15"), (second, "0")):
        command = [sys.executable, str(script), *(word.format(texts=texts[0], out=out) for word in words)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "data"), "PAUSE": pause}
        programs.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        while programs[0].poll() is None and not list(out.glob("*_val_*")):  # the second starts amid the first's files
            time.sleep(0.01)
    assert [(program.communicate(timeout=60)[1], program.returncode) for program in programs] == [("", 0)] * 2
    manifest = json.loads((out / "manifest.json").read_text())
    here = {path.name for path in out.iterdir()} - {"manifest.json"}
    for name in here:
        shards.check_shard(out / name, manifest["shards"][name]["sha256"])
    if module == "cached_fineweb10B":
        assert len(here) == 14 and len((tmp_path / "calls").read_text().splitlines()) == 14
    else:
        assert here == manifest["shards"].keys() and len(here) > 5


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("local.py", ["{tmp}/nowhere"], "there is no such folder"),
        ("local.py", ["{tmp}", "--encoding", "bytes"], "ends within the validation shard"),
        ("local.py", ["{tmp}/good.txt"], "good.txt is a file: give its folder"),
        ("local.py", ["{tmp}/empty", "--encoding", "bytes"], "there is no text in the folders; skipped: 1 empty"),
        ("fineweb.py", ["{tmp}/nowhere.txt"], "No such file"),
        ("fineweb.py", ["{tmp}/table.csv"], "give .parquet, .jsonl, .txt files"),
        ("fineweb.py", ["{tmp}/bad.jsonl"], "no text after 1 good documents"),
        ("fineweb.py", ["{tmp}/null.parquet"], "no text after 1 good documents"),
        ("fineweb.py", ["{tmp}/good.txt", "--shard-tokens", "0"], "at least 1"),
    ],
)
def test_errors_are_one_line(tmp_path, gpt2, program, arguments, message):
    """Catches a traceback, an exit code of 0, a hang, and half-written files where the input is at fault."""
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "0.txt").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"no": "text"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["good", None]}), tmp_path / "null.parquet")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    result = run(program, *arguments, "--out", tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.startswith(f"data/{program}: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists() or not contents(tmp_path / "out")


def test_a_worker_that_is_killed_ends_the_program(tmp_path, monkeypatch):
    """Catches a wait without end for the batch of a worker that the kernel has killed, and half-written shards."""
    monkeypatch.setattr(fineweb, "encode", killed)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: None)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(SystemExit, match="^x: a worker was killed"), shards.one_line_errors("x"):
        fineweb.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--shard-tokens", "1"])
    assert not contents(tmp_path / "out")


def killed(batch):
    os.kill(os.getpid(), signal.SIGKILL)


def test_blank_lines_are_no_documents(tmp_path, gpt2):
    """Catches hours of tokenising that a blank line at the end of a file undoes."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n \n')
    fineweb.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--shard-tokens", "2"])
    assert read(tmp_path / "out").tolist() == opened(gpt2.encode(text) for text in "ab")


def test_what_was_read_and_skipped_is_told(tmp_path, capsys, monkeypatch):
    """Catches a text that is left out without a word."""
    folder = tmp_path / "texts"
    folder.mkdir()
    raws = b"text" * 99, b"text" * 99, b"more" * 99, b"\0", b"\xff", b""
    for name, raw in zip("abcdef", raws):
        (folder / name).write_bytes(raw)
    local.main([str(folder), "--out", str(tmp_path / "out"), "--encoding", "bytes", "--val-tokens", "9"])
    read, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("read "))
    assert read.startswith("read 2 texts; skipped: ")
    assert set(read.split(": ")[1].split(", ")) == {"1 copies of another", "1 binary", "1 not UTF-8", "1 empty"}


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch, capsys):
    """Catches an end of the program on Lustre or NFS, where flock fails."""
    def refuse(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(shards.fcntl, "flock", refuse)
    with shards.alone(tmp_path / "new"):
        pass
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().out


def test_a_signal_is_one_line():
    """Catches half-made shards that a scheduler's SIGTERM, or a closed terminal, leaves behind."""
    code = "import os, signal, shards\nwith shards.one_line_errors('x'): os.kill(os.getpid(), signal.{})"
    for name in ("SIGTERM", "SIGHUP"):
        ended = subprocess.run([sys.executable, "-c", code.format(name)], cwd=REPOSITORY / "data", capture_output=True)
        assert (ended.returncode, ended.stderr) == (1, b"x: interrupted; nothing half-written is left\n")


def test_an_interrupt_is_one_line():
    """Catches a traceback at Ctrl-C, and messages of several lines."""
    for error, message in ((KeyboardInterrupt(), "interrupted"), (OSError("two\nlines"), "two lines")):
        with pytest.raises(SystemExit, match=f"^data/x.py: {message}"), shards.one_line_errors("data/x.py"):
            raise error
