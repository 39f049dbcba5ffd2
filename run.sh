#!/usr/bin/env bash
# From a bare machine to a judged log.
#
#   ./run.sh [NAME=VALUE ...]   set up, fetch or make the data, train, judge the log; see ./run.sh --help
#   ./run.sh sweep FILE [...]   the same for variations of a run, one a line of FILE; see ./run.sh sweep --help
#   ./run.sh test [...]         set up and run the tests; arguments go to pytest
#
# With GPUs (CUDA_VISIBLE_DEVICES is heeded): the 3175-step recipe on all of them. Without: the tiny recipe on the CPU.
# On several machines: the same command on each, with NNODES, NODE_RANK and MASTER_ADDR; see examples/slurm.sh.
set -euo pipefail
cd "$(dirname "$0")"

die() { echo "run.sh: $*" >&2; exit 1; }
# A step of what comes before the training: a signal to this shell ends it too.
step() { "$@" <&0 & wait $!; }
trap 'kill ${!-} 2>/dev/null; wait; exit 1' INT TERM HUP
trap '' USR1  # there is nothing to save yet
unset RANK LOCAL_RANK WORLD_SIZE  # of another job; this one's come from torchrun
nodes=${NNODES:-1}
case $nodes,${NODE_RANK:-0} in *[!0-9,]*) die "NNODES=$nodes NODE_RANK=${NODE_RANK-}: both are numbers" ;; esac
if [ "$nodes" = 1 ]; then
    unset MASTER_ADDR MASTER_PORT
    meeting=(--standalone)
else
    [ -n "${MASTER_ADDR-}" ] && [ "${NODE_RANK:-$nodes}" -lt "$nodes" ] ||
        die "NNODES=$nodes: each machine needs its NODE_RANK, 0 to $((nodes - 1)), and as MASTER_ADDR the address of 0"
    export MASTER_PORT=${MASTER_PORT:-29500}
    meeting=(--nnodes="$nodes" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")
fi

trainer=(train_gpt.py)
if [ "${1-}" = sweep ]; then
    [ "$nodes" = 1 ] || die "sweep is for one machine: unset NNODES"
    trainer=(-m sweep)
    shift
fi

install() {  # install FILE: its pins into .venv, unless they are there
    cmp -s "$1" ".venv/${1//\//-}" && return
    step .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" || die "could not install $1"
    cp "$1" ".venv/${1//\//-}"
}

if ! [ -x .venv/bin/pip ]; then
    command -v python3 >/dev/null || die "no python3: install it with: apt install python3 python3-venv"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Python 3.10 or newer is needed, this is $(python3 -V)"
    python3 -c 'import ensurepip, venv' 2>/dev/null || die "python3 cannot make a virtual environment: apt install $(
        python3 -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')"
    python3 -m venv --clear .venv
fi
install requirements.txt

if [ "${1-}" = test ]; then
    install tests/requirements.txt
    trap - USR1  # what is ignored stays so in the tests' own processes
    exec .venv/bin/python -m pytest "${@:2}"
fi

gpus=$(.venv/bin/python -c 'from harness import doctor; print(len(doctor.find_gpus()[0]))')
if [ "$gpus" != 0 ]; then
    count='import torch; torch.zeros(1, device="cuda"); print(torch.cuda.device_count())'
    gpus=$(.venv/bin/python -c "$count" 2>/dev/null) ||
        die "PyTorch cannot use the GPUs that nvidia-smi lists: .venv/bin/python -m harness.doctor may say why;" \
            "CUDA_VISIBLE_DEVICES= trains on the CPU"
fi
if [ "$gpus" = 0 ]; then
    case " $* " in
        *" --resume newest "*) set -- @tiny "$@" ;;
        *" --resume "* | *" --fork-from "*) ;;  # they have a recipe
        *) set -- @tiny "$@" ;;
    esac
fi
processes=$((gpus > 0 ? gpus : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((processes < $(nproc) ? $(nproc) / processes : 1))}

# A mistake in the arguments or the data ends in one line, here: torchrun would add a report of its own.
case " $* " in *" --help "* | *" -h "*) exec .venv/bin/python "${trainer[@]}" --help ;; esac
if [ "$gpus" != 0 ]; then
    download=$(.venv/bin/python "${trainer[@]}" --fineweb-shards "$@")
    # shellcheck disable=SC2086  # two words: a program and a number
    [ -z "$download" ] || step .venv/bin/python $download
fi
case " $* " in *" @tiny "*) step .venv/bin/python data/local.py --encoding bytes ;; esac
[ "${trainer[0]}" = train_gpt.py ] || exec .venv/bin/python "${trainer[@]}" --nproc_per_node="$processes" "$@"
WORLD_SIZE=$((nodes * processes)) step .venv/bin/python -m harness.doctor -- "$@"
case " $* " in *" --dry-run "*) exit ;; esac

# In this shell's place, so that a signal to the one is a signal to the other. It judges the log in the end.
exec .venv/bin/python -m harness.torchrun "${meeting[@]}" --nproc_per_node="$processes" train_gpt.py "$@"
