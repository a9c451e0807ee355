#!/usr/bin/env bash
# Starts N ranks of a command on this machine: run_local.sh [--share-gpu] N COMMAND [ARGUMENT...]
# --share-gpu: all ranks on one GPU, for tests: NCCL is told that they are on different hosts, and share_gpu=true is added.
# Ranks get cores and threads of their own as far as there are any. Settings of the environment:
#   MUONSHARD_THREADS      BLAS threads of a rank (default: cores / N, at least 1)
#   MUONSHARD_JOB_TIMEOUT  seconds after which the job is ended
set -euo pipefail

share=
if [ "${1-}" = --share-gpu ]; then
    share=1
    shift
fi
ranks=${1-}
if [ $# -lt 2 ] || ! [[ $ranks =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: run_local.sh [--share-gpu] N COMMAND [ARGUMENT...]" >&2
    exit 2
fi
shift

read -r whole cores <<<"$("$(dirname "$0")/cores.sh")"
threads=${MUONSHARD_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}
options=(--host "localhost:$ranks")
if [ "$ranks" -gt "$cores" ]; then
    binding="no binding, for there are fewer cores ($cores)"
    options+=(--bind-to none --mca mpi_yield_when_idle 1)
elif [ "$cores" -lt "$whole" ] || [ $((ranks * threads)) -gt "$cores" ]; then
    binding="no binding"
    options+=(--bind-to none)
else
    binding="bound to $threads core$([ "$threads" -eq 1 ] || echo s) each"
    options+=(--map-by "slot:PE=$threads" --bind-to core)
fi
if [ -n "${MUONSHARD_JOB_TIMEOUT-}" ]; then
    options+=(--timeout "$MUONSHARD_JOB_TIMEOUT")
fi
export MUONSHARD_THREADS=$threads OPENBLAS_NUM_THREADS=$threads
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
echo "run_local.sh: $ranks rank$([ "$ranks" -eq 1 ] || echo s), $threads BLAS thread$([ "$threads" -eq 1 ] || echo s) each," \
    "$binding" >&2
if [ -n "$share" ]; then
    export NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 NCCL_NVLS_ENABLE=0 \
        NCCL_MAX_CTAS=2
    # shellcheck disable=SC2016 # a rank's own shell reads it
    exec mpirun -n "$ranks" "${options[@]}" bash -c 'NCCL_HOSTID=r$OMPI_COMM_WORLD_RANK exec "$@"' _ "$@" share_gpu=true
fi
exec mpirun -n "$ranks" "${options[@]}" "$@"
