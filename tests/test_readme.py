"""What the READMEs and run.sh tell a person to type, and what the READMEs say was found."""

import importlib.util
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

import sweep
import train_gpt
from harness.arguments import parse
from records.__main__ import parser
from studies import parity

READMES = [ROOT / folder / "README.md" for folder in (".", "harness", "records", "trained", "bench", "studies")]


def commands(start: str) -> list[list[str]]:
    """The words after `start` in every code line of the READMEs that begins with it."""
    lines = "".join(path.read_text() for path in READMES)
    return [shlex.split(line, comments=True) for line in re.findall(rf"^ *{re.escape(start)}(.*)$", lines, re.M)]


def test_commands_of_the_readme_are_understood():
    """Kills: a hyperparameter, recipe, option or verb in the README that is no longer there."""
    runs = [words for words in commands("./run.sh") if words[:1] not in (["test"], ["sweep"])]
    for words in commands("./run.sh sweep"):
        train_gpt.override(sweep.parse(words).words)
    runs += [words[words.index("train_gpt.py") + 1:] for words in commands("torchrun") if "train_gpt.py" in words]
    assert len(runs) >= 5
    for words in runs:
        if "smooth(" not in " ".join(words):  # the README adds this stage: tests/test_technique.py runs it
            train_gpt.override(parse(words).overrides)
    verbs = commands("python -m records")
    assert len(verbs) >= 4
    for words in verbs:
        parser().parse_args(words)
    for words in commands("python -m studies.parity "):
        train_gpt.override(parity.parse(words).overrides)


@pytest.mark.parametrize("path", [*READMES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.parent.name)
def test_a_readme_names_what_is_there(path):
    """Kills: a link, a program or a module that has moved."""
    text = path.read_text()
    modules = set(re.findall(r"python -m ([\w.]+\b)", text)) - {"studies.NAME"}
    assert modules and all(importlib.util.find_spec(module) for module in modules)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (path.parent / link).exists(), link
    for name in re.findall(r"(?:python|bash|sed -f|`)\s?((?:\w+/)+\w+\.(?:py|sh|sed))", text):
        assert (ROOT / name).exists(), name


def test_every_program_of_bench_and_studies_is_in_its_readme():
    """Kills: a program that nobody learns of, a figure of one that is gone."""
    for folder in ("bench", "studies"):
        text = (ROOT / folder / "README.md").read_text()
        for path in (ROOT / folder).glob("*.py"):
            if '__name__ == "__main__"' in path.read_text():
                assert f"{folder}.{path.stem}" in text or f"[{path.stem}](" in text, path.name


def test_quoted_figures_are_those_of_the_results():
    """Kills: a figure that a newer result has left behind. The text of a link to a result quotes it, rounded."""
    found = 0
    for path in READMES:
        for said, link in re.findall(r"\[([^]]*)\]\(([\w./]*results/[\w./]+\.md)\)", path.read_text()):
            result = [abs(float(x)) for x in re.findall(r"-?\d*\.?\d+(?:e-?\d+)?", (path.parent / link).read_text())]
            for figure in re.findall(r"\d*\.?\d+", said):
                digits = len(figure.partition(".")[2])
                assert any(f"{x:.{digits}f}" == f"{float(figure):.{digits}f}" for x in result), f"{figure}: {link}"
                found += 1
    assert found > 20


def stub_python(folder, answers: str, noted: str):
    """run.sh in a folder where a stub stands for Python: it says what the cases in `answers` have, and notes its words
    in the file `calls`."""
    (folder / "run.sh").write_text((ROOT / "run.sh").read_text())
    (folder / "requirements.txt").write_text("pins\n")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "requirements.txt").write_text("pins\n")
    for name in ("pip", "python"):
        stub = folder / ".venv" / "bin" / name
        stub.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\necho "{noted}" >> calls\n')
        stub.chmod(0o755)


def test_run_sh_with_gpus(tmp_path):
    """Kills: a start without data or without the checks, on another number of processes than there are GPUs, with
    the tiny recipe, with arguments lost on the way, or as a part of what another job has left in the environment; a
    launcher whose path is that of another clone. A stub stands for Python."""
    stub_python(tmp_path, "*find_gpus*|*device_count*) echo 8; exit;; *doctor*) echo well;; *torchrun*) echo step;; "
                          "*--fineweb-shards*) echo data/cached_fineweb100B.py 17;;",
                noted="${0##*/} $* WORLD_SIZE=$WORLD_SIZE$RANK")
    with open(tmp_path / "said", "w") as said:
        subprocess.run(["bash", "run.sh", "matrix_lr=0.9", "--seed", "3"], cwd=tmp_path, check=True, stdout=said,
                       env={"PATH": "/usr/bin:/bin", "WORLD_SIZE": "3", "RANK": "2"})
    assert (tmp_path / "said").read_text() == "well\nstep\n"
    assert (tmp_path / "calls").read_text().splitlines() == [
        "python train_gpt.py --fineweb-shards matrix_lr=0.9 --seed 3 WORLD_SIZE=",
        "python data/cached_fineweb100B.py 17 WORLD_SIZE=",
        "python -m harness.doctor -- matrix_lr=0.9 --seed 3 WORLD_SIZE=8",
        "python -m harness.torchrun --standalone --nproc_per_node=8 train_gpt.py matrix_lr=0.9 --seed 3 WORLD_SIZE="]


def test_run_sh_sweeps(tmp_path):
    """Kills: a sweep without data, or on fewer processes than there are GPUs; a doctor that is asked about the file of
    variations; a sweep that each of several machines makes; a @tiny that is lost where there is no GPU."""
    stub_python(tmp_path, "*find_gpus*|*device_count*) echo $GPUS; exit;; "
                          "*--fineweb-shards*) echo data/cached_fineweb10B.py 17;;", noted="$*")

    def calls(code=0, **environment):
        (tmp_path / "calls").write_text("")
        run = subprocess.run(["bash", "run.sh", "sweep", "lr.txt", "--seeds", "2"], cwd=tmp_path, text=True,
                             capture_output=True, env={"PATH": "/usr/bin:/bin"} | environment)
        assert run.returncode == code, run.stderr
        return (tmp_path / "calls").read_text().splitlines() or run.stderr
    assert calls(GPUS="8") == ["-m sweep --fineweb-shards lr.txt --seeds 2", "data/cached_fineweb10B.py 17",
                               "-m sweep --nproc_per_node=8 lr.txt --seeds 2"]
    assert calls(GPUS="0") == ["data/local.py --encoding bytes",
                               "-m sweep --nproc_per_node=1 @tiny lr.txt --seeds 2"]
    assert calls(1, GPUS="8", NNODES="2", NODE_RANK="0", MASTER_ADDR="a").startswith("run.sh: sweep is for one machine")


def test_run_sh_stops_where_the_doctor_finds_an_end(tmp_path):
    """Kills: a paid start of what cannot run; the end of the training that is not the script's."""
    (tmp_path / "run.sh").write_text((ROOT / "run.sh").read_text())
    (tmp_path / "requirements.txt").write_text("pins\n")
    for name in ("pip", "python"):
        stub = tmp_path / ".venv" / "bin" / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text('#!/bin/sh\ncase "$*" in *find_gpus*) echo 0; exit;; esac\n'
                        f'echo "{name} $*" >> calls\ncase "{name} $*" in *$BAD*) exit 1;; esac\n')
        stub.chmod(0o755)
    (tmp_path / ".venv" / "requirements.txt").write_text("pins\n")
    for bad, code, last in (("doctor", 1, "python -m harness.doctor -- @tiny"), ("torchrun", 1, "train_gpt.py @tiny"),
                            ("nothing", 0, "train_gpt.py @tiny")):
        run = subprocess.run(["bash", "run.sh"], cwd=tmp_path,
                             env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "BAD": bad})
        assert run.returncode == code and (tmp_path / "calls").read_text().splitlines()[-1].endswith(last)
