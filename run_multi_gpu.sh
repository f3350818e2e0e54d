#!/usr/bin/env bash
# Train on several processes: the demo, or a script of your own. See --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
bash run_multi_gpu.sh [--nproc N] [--strategy ddp|zero2|zero3|fsdp2] [--cpu] [--script FILE] [-- SCRIPT ARGUMENTS]

  --nproc N      processes on this machine (default: its number of GPUs)
  --strategy S   ddp (default), zero2 and zero3 (DeepSpeed, deepspeed_configs/S.json), fsdp2 (needs GPUs)
  --cpu          use the CPU
  --script FILE  script to start (default: examples/train_demo.py); it gets --cpu, --deepspeed FILE and --fsdp2

Several machines: start it on each with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set. They need no shared disk.
PYTHON names the interpreter (default: .venv-demo/bin/python if it is there, else python3).
TEXT
}

fail() {
    echo "run_multi_gpu.sh: $1" >&2
    echo "Try: bash run_multi_gpu.sh --help" >&2
    exit 2
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
nproc="" strategy=ddp cpu="" script="$here/examples/train_demo.py"
while [ $# -gt 0 ]; do
    case "$1" in
        --nproc | --strategy | --script)
            [ $# -ge 2 ] || fail "$1 needs a value"
            case "$1" in
                --nproc) nproc="$2" ;;
                --strategy) strategy="$2" ;;
                --script) script="$2" ;;
            esac
            shift 2
            ;;
        --cpu) cpu=yes && shift ;;
        --help | -h) usage && exit 0 ;;
        --) shift && break ;;
        *) fail "unknown option $1 (arguments of the script come after --)" ;;
    esac
done

python="${PYTHON:-}"
if [ -z "$python" ]; then
    python=python3
    [ ! -x "$here/.venv-demo/bin/python" ] || python="$here/.venv-demo/bin/python"
fi
has_torch='import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
"$python" -c "$has_torch" 2>/dev/null ||
    fail "$python has no torch; set PYTHON to the interpreter of your environment, or make demo first"
if [ -z "$nproc" ]; then
    nproc="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
    [ "$nproc" -gt 0 ] || fail "no GPU was found; use --nproc N --cpu"
fi
[[ "$nproc" =~ ^[1-9][0-9]*$ ]] || fail "--nproc $nproc is not a number of processes"
[ -f "$script" ] || fail "there is no script $script"

options=()
case "$strategy" in
    ddp) ;;
    zero2 | zero3) options+=(--deepspeed "$here/deepspeed_configs/$strategy.json") ;;
    fsdp2)
        [ -z "$cpu" ] || fail "fsdp2 needs GPUs, since accelerate takes it for ddp on a CPU; use ddp, zero2 or zero3"
        options+=(--fsdp2)
        ;;
    *) fail "--strategy $strategy is none of ddp, zero2, zero3, fsdp2" ;;
esac
if [ -n "$cpu" ]; then
    options+=(--cpu)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi

where=(--standalone)
if [ -n "${MASTER_ADDR:-}" ] || [ "${NNODES:-1}" -gt 1 ]; then
    : "${MASTER_ADDR:?set MASTER_ADDR to the address of the first machine}"
    where=(--nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}")
    where+=(--master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
fi
export PATH="$(dirname "$(command -v "$python")"):$PATH" # DeepSpeed calls ninja by name
exec "$python" -m torch.distributed.run "${where[@]}" --nproc_per_node "$nproc" "$script" "${options[@]}" "$@"
