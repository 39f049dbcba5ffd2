#!/usr/bin/env bash
# What only a GPU can tell, in one go: are the kernels right, how fast is each part, does the record's recipe train.
#
#   bench/gpu.sh [FOLDER]      default: bench/results
#
# FOLDER gets the benches' tables (kernels.md, optimizer.md, step.md), the training's log (logs/), whatever was printed
# (gpu.txt) and a summary (gpu.md). A stage that fails stops no later one; the exit code is then 1.
#
# Nine minutes on one H100, by estimate: nothing was timed on one. 200 steps of 0.75 to 1 s and their compilation are
# 215 s, less what was compiled before and is found on disk; 15 whole steps of two programs and their compilation 120 s;
# 23 steps of each optimizer and the compilation of their updates 65 s; 20 rounds of each kernel at the sizes of 1 and 8
# GPUs 60 s; the tests in 8 processes 40 s; the text 20 s. A stage that takes twice as long is no fault,
# so each has a limit that is far off: if all hang, they end after 45 minutes. The tokens are bytes: GPT-2's tokeniser
# takes minutes for as much text, and its vocabulary is a download.
#
# tests/drills/rehearse_gpu.py runs all of it on a CPU, at a tiny size.
set -uo pipefail
folder=$(realpath -m "${1:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.." || exit

python=$PWD/.venv/bin/python  # run.sh makes it
[ -x "$python" ] || python=python3
if ! "$python" -c 'import torch; torch.zeros(1, device="cuda")' 2>/dev/null; then
    echo "bench/gpu.sh: PyTorch finds no GPU; on a CPU run ./run.sh test, python -m bench.optimizer, bench.step;" \
        "with a GPU, python -m harness.doctor may say why" >&2
    exit 1
fi
if ! "$python" -c 'import pytest, xdist' 2>/dev/null; then
    echo "bench/gpu.sh: pytest and pytest-xdist are missing: ./run.sh test --version installs them" >&2
    exit 1
fi
mkdir -p "$folder" || exit
text=$(mktemp -d)
trap 'rm -rf "$text"' EXIT

stage() {  # stage NAME SECONDS COMMAND...
    local start=$SECONDS outcome=passed
    echo "== $1: ${*:3}"
    timeout "$2" "${@:3}" || outcome=failed
    echo "- $1: $outcome, $((SECONDS - start)) s" | tee -a "$folder/gpu.md"
}

main() {
    made=$("$python" -c 'import results; print(results.provenance())')
    printf '# bench/gpu.sh\n\n%s.\n\n' "$made" > "$folder/gpu.md" || return
    stage tests 300 "$python" -m pytest -n 8 --dist load \
        tests/test_{bf16,newton_schulz,cross_entropy,mlp,norm,qkv,fuzz_kernels,banks}.py
    stage kernels 300 "$python" -m bench.kernels -o "$folder"
    stage optimizer 600 "$python" -m bench.optimizer -o "$folder"
    stage step 600 "$python" -m bench.step -o "$folder"
    # the sources of what is installed: 200 steps need 105 MB
    mapfile -t sources < <("$python" -c 'import sysconfig
print(*map(sysconfig.get_path, ("stdlib", "purelib")), sep="\n")')
    stage text 300 "$python" data/local.py --encoding bytes --out "$text" "${sources[@]}"
    steps=$("$python" -c 'import sys; from harness.shards import batches_in, open_shard
print(min(200, sum(batches_in(open_shard(path), 524288) for path in sys.argv[1:])))' "$text"/local_train_*.bin)
    said=$(stage training 600 env -C "$folder" "$python" "$PWD/train_gpt.py" "train_files=$text/local_train_*.bin" \
        "val_files=$text/local_val_*.bin" val_tokens=524288 "train_steps=$steps" | tee /dev/stderr)
    log=$folder/$(sed -n 's/^log: //p' <<< "$said")
    if [ -f "$log" ]; then
        { echo && "$python" -m records verify "$log"; echo && grep '^step:' "$log"; } | tee -a "$folder/gpu.md"
    fi
    [ "$(grep -c '^- [a-z]*: passed, ' "$folder/gpu.md")" = 6 ]  # all stages
}
main 2>&1 | tee "$folder/gpu.txt"
