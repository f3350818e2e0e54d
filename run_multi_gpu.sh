#!/usr/bin/env bash
# bash run_multi_gpu.sh [--nproc N] [--strategy ddp|zero2|zero3|fsdp2] [--cpu] [--script FILE] [-- SCRIPT ARGUMENTS]
#
# Start examples/train_demo.py, or a script of your own, on several processes: accelerate launch with
# examples/accelerate/STRATEGY.yaml. The default is DDP on all GPUs of this machine; --cpu takes its CPU.
# On several machines, set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each. They need no shared disk.
# PYTHON names the interpreter (default: .venv-demo/bin/python if it exists, else python3).
set -euo pipefail

usage() { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() {
    printf 'run_multi_gpu.sh: %s\n\n' "$1" >&2
    usage >&2
    exit 2
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
nproc="" strategy=ddp cpu="" script="$here/examples/train_demo.py" python="${PYTHON:-$here/.venv-demo/bin/python}"
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
while [ $# -gt 0 ]; do
    case "$1" in
        --nproc | --strategy | --script)
            [ $# -ge 2 ] || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2" && shift 2
            ;;
        --cpu) cpu=yes && shift ;;
        --help | -h) usage && exit 0 ;;
        --) shift && break ;;
        *) fail "unknown option $1 (arguments of the script come after --)" ;;
    esac
done
[ -f "$script" ] || fail "there is no script $script"
case "$strategy" in
    ddp) [ -z "$cpu" ] || strategy=cpu2 ;;
    zero2 | zero3) ;;
    fsdp2) [ -z "$cpu" ] || fail "fsdp2 needs GPUs, since accelerate takes it for ddp on a CPU" ;;
    *) fail "--strategy $strategy is none of ddp, zero2, zero3, fsdp2" ;;
esac
[ -z "$cpu" ] || export ACCELERATE_USE_CPU=true
"$python" -c 'import torch' 2>/dev/null ||
    fail "$python has no torch; set PYTHON to the interpreter of your environment, or make demo first"
if [ -z "$nproc" ]; then
    nproc="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
    [ "$nproc" -gt 0 ] || fail "no GPU was found; use --nproc N --cpu"
fi
[[ "$nproc" =~ ^[1-9][0-9]*$ ]] || fail "--nproc $nproc is not a number of processes"
machines=(--num_machines "${NNODES:-1}" --machine_rank "${NODE_RANK:-0}" --main_process_port "${MASTER_PORT:-0}")
[ -z "${MASTER_ADDR:-}" ] || machines+=(--main_process_ip "$MASTER_ADDR")
export PATH="$(dirname "$(command -v "$python")"):$PATH" # DeepSpeed calls ninja by name
exec "$python" -m accelerate.commands.launch --config_file "$here/examples/accelerate/$strategy.yaml" \
    --num_processes "$((nproc * ${NNODES:-1}))" "${machines[@]}" "$script" "$@"
