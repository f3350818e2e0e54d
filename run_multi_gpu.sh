#!/usr/bin/env bash
# bash run_multi_gpu.sh [--nproc N] [--strategy ddp|zero2|zero3|fsdp2|cpu2] [--script FILE] [-- SCRIPT ARGUMENTS]
#
# Start examples/train_demo.py, or a script of your own, on several processes: accelerate launch with
# examples/accelerate/STRATEGY.yaml. The default is DDP on all GPUs of this machine; --cpu is --strategy cpu2.
# On several machines, set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each. They need no shared disk.
# PYTHON names the interpreter (default: .venv-demo/bin/python if it exists, else python3).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
nproc="" strategy=ddp script="$here/examples/train_demo.py" python="${PYTHON:-$here/.venv-demo/bin/python}"
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
while [ $# -gt 0 ]; do
    case "$1" in
        --nproc) nproc="$2" && shift 2 ;;
        --strategy) strategy="$2" && shift 2 ;;
        --script) script="$2" && shift 2 ;;
        --cpu) strategy=cpu2 && shift ;;
        --) shift && break ;;
        *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
    esac
done
[ "$strategy" != cpu2 ] || export ACCELERATE_USE_CPU=true
[ -n "$nproc" ] || nproc="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
[ "$nproc" -gt 0 ] || { echo "run_multi_gpu.sh: no GPU was found; use --nproc N --cpu" >&2 && exit 2; }
machines=(--num_machines "${NNODES:-1}" --machine_rank "${NODE_RANK:-0}" --main_process_port "${MASTER_PORT:-0}")
[ -z "${MASTER_ADDR:-}" ] || machines+=(--main_process_ip "$MASTER_ADDR")
export PATH="$(dirname "$(command -v "$python")"):$PATH" # DeepSpeed calls ninja by name
exec "$python" -m accelerate.commands.launch --config_file "$here/examples/accelerate/$strategy.yaml" \
    --num_processes "$((nproc * ${NNODES:-1}))" "${machines[@]}" "$script" "$@"
