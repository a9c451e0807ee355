#!/usr/bin/env bash
# Starts ranks of a command on several hosts, through mpirun and launch/bind.sh:
#   run_hosts.sh [--ranks-per-host N] [--hosts FILE|HOST,HOST...] [--dry-run] COMMAND [ARGUMENT...]
# FILE has lines "HOST [slots=N]". Without --hosts: the nodes of the Slurm job it runs in, else this machine.
# Ranks of a host: N, else its slots=, else the GPUs of the first host, else the first host's cores.
# This directory and COMMAND have to be at the same place on every host. --dry-run prints what would be run. Settings of the environment:
#   MUONSHARD_THREADS      BLAS threads of a rank (default: cores / ranks of the first host, at least 1)
#   MUONSHARD_JOB_TIMEOUT  seconds after which the job is ended
#   MUONSHARD_HOST_TIMEOUT seconds after which a host that does not answer mpirun ends the job (default: 30)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

die() {
    echo "run_hosts.sh: $1" >&2
    exit 2
}

per_host='' hosts='' dry=''
while [ $# -gt 0 ]; do
    case $1 in
    --ranks-per-host) per_host=${2-} ;;
    --hosts) hosts=${2-} ;;
    --dry-run) dry=1 ;;
    -*) die "unknown option $1" ;;
    *) break ;;
    esac
    case $1 in
    --dry-run) shift ;;
    *)
        [ $# -ge 2 ] || die "$1 needs a value"
        shift 2
        ;;
    esac
done
[ $# -gt 0 ] || die "usage: run_hosts.sh [--ranks-per-host N] [--hosts FILE|HOST,HOST...] [--dry-run] COMMAND [ARGUMENT...]"
[[ $per_host =~ ^([1-9][0-9]*)?$ ]] || die "--ranks-per-host $per_host is not a number above 0"
if [ -z "$hosts" ]; then
    hosts=localhost
    [ -z "${SLURM_JOB_NODELIST-}" ] || hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
fi

# names[i] is a host, slots[i] its slots or empty. A host on several lines has the sum, as mpirun takes it.
names=() slots=()
declare -A index
add_host() {
    local i=${index[$1]-}
    if [ -z "$i" ]; then
        index[$1]=${#names[@]}
        names+=("$1")
        slots+=("$2")
    else
        slots[i]=$((${slots[i]:-1} + ${2:-1}))
    fi
}
if [ -f "$hosts" ]; then
    number=0
    while read -r name rest || [ -n "$name" ]; do
        number=$((number + 1))
        rest=${rest%%#*}
        rest=${rest%"${rest##*[! ]}"}
        [[ -n $name && $name != \#* ]] || continue
        [[ $rest =~ ^(slots=([1-9][0-9]*))?$ ]] || die "$hosts:$number: \"$rest\" is not slots=N"
        add_host "$name" "${BASH_REMATCH[2]-}"
    done <"$hosts"
else
    [[ $hosts != */* ]] || die "$hosts: no such file"
    for name in ${hosts//,/ }; do add_host "$name" ''; done
fi
[ ${#names[@]} -gt 0 ] || die "$hosts names no host"

if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
# With its directory, mpirun finds its daemon on the other hosts beside itself, whatever PATH a login there has.
mpirun=$(command -v mpirun) || die "there is no mpirun in PATH"

# GPUs and cores of the first host, asked the way the ranks will be started.
# shellcheck disable=SC2016 # the other host's shell reads it
look='gpus=$(nvidia-smi -L 2>/dev/null | grep -c "^GPU ") || gpus=0; echo "machine $gpus $("$0/cores.sh")"'
found=$("$mpirun" --timeout 60 --host "${names[0]}" -n 1 --bind-to none bash -c "$look" "$here" </dev/null) ||
    die "nothing can be started on ${names[0]}; is it reached without a password, with the same MPI and $here there?"
read -r _ gpus whole cores <<<"$(grep '^machine ' <<<"$found")"
default=$gpus
[ "$gpus" -gt 0 ] || default=$cores

list='' total=0 most=0
for i in "${!names[@]}"; do
    n=${per_host:-${slots[i]:-$default}}
    list+=${list:+,}${names[i]}:$n
    total=$((total + n))
    most=$((n > most ? n : most))
done

# Beside GPUs bind.sh knows better than mpirun where a rank belongs; without, every rank gets cores of its own.
threads=${MUONSHARD_THREADS:-$((cores / most > 0 ? cores / most : 1))}
options=(-n "$total" --host "$list")
if [ "$gpus" -gt 0 ]; then
    binding="bound beside their GPUs"
    options+=(--map-by slot --bind-to none)
elif [ "$most" -gt "$cores" ]; then
    binding="no binding, for there are fewer cores ($cores a host)"
    options+=(--map-by slot --bind-to none --mca mpi_yield_when_idle 1)
elif [ "$cores" -lt "$whole" ] || [ $((threads * most)) -gt "$cores" ]; then
    binding="no binding"
    options+=(--map-by slot --bind-to none)
else
    binding="bound to $threads core$([ "$threads" -eq 1 ] || echo s) each"
    options+=(--map-by "slot:PE=$threads" --bind-to core)
fi
if [ -n "${MUONSHARD_JOB_TIMEOUT-}" ]; then
    options+=(--timeout "$MUONSHARD_JOB_TIMEOUT")
fi

# A host that is cut off. Of itself mpirun asks an idle daemon only after five minutes, and waits a quarter of an hour for an answer
# to what it has sent. The first has a setting, which makes both sides see it; the second is read off its connections.
patience=${MUONSHARD_HOST_TIMEOUT:-30}
[[ $patience =~ ^[1-9][0-9]*$ ]] || die "MUONSHARD_HOST_TIMEOUT is \"$patience\", not whole seconds above 0"
options+=(--mca oob_tcp_keepalive_time $(((patience + 1) / 2)) --mca oob_tcp_keepalive_intvl $(((patience + 7) / 8))
    --mca oob_tcp_keepalive_probes 4)
# Who has not answered PID for so many repetitions of what it sent.
unanswered() { # PID REPETITIONS
    local own
    own=$(find "/proc/$1/fd" -lname 'socket:*' -printf '%l\n' 2>/dev/null | tr -cd '0-9\n' | paste -sd' ')
    cat "/proc/$1/net/tcp" "/proc/$1/net/tcp6" 2>/dev/null | awk -v own=" $own " '
        index(own, " " $10 " ") && $4 == "01" { print $3, $7 }' | while read -r address repeated; do
        [ $((16#$repeated)) -ge "$2" ] || continue
        address=${address%:*}
        case $address in
        ???????? | 0000000000000000FFFF0000????????)
            address=${address: -8}
            echo $((16#${address:6:2})).$((16#${address:4:2})).$((16#${address:2:2})).$((16#${address:0:2}))
            ;;
        *) echo "$address (IPv6)" ;;
        esac
    done
}
watch() { # PID
    local repetitions=1 silent
    # Repeated after 0.2 s, 0.4 s, 0.8 s...
    while [ $(((1 << (repetitions + 1)) - 1)) -le $((5 * patience)) ]; do repetitions=$((repetitions + 1)); done
    while kill -0 "$1" 2>/dev/null; do
        silent=$(unanswered "$1" "$repetitions" | sort -u | paste -sd' ') || true # what vanishes while it is looked at
        if [ -n "$silent" ]; then
            echo "run_hosts.sh: no answer from $silent for about $patience s; the job is ended" >&2
            # An mpirun that is aborting already crashes at a SIGTERM. Daemons that can, follow it: they lose its connection.
            pkill -P "$1" || true
            sleep 1
            kill -9 "$1" 2>/dev/null || true
        fi
        sleep 1
    done
}
export MUONSHARD_THREADS=$threads OPENBLAS_NUM_THREADS=$threads
# OMPI_* is forwarded by mpirun itself.
while IFS= read -r name; do
    case $name in
    NCCL_* | UCX_* | MUONSHARD_* | CUDA_* | PATH | LD_LIBRARY_PATH | OPENBLAS_NUM_THREADS | OMP_NUM_THREADS) options+=(-x "$name") ;;
    esac
done < <(compgen -e)

line=("$mpirun" "${options[@]}" "$here/bind.sh" "$@")
if [ -n "$dry" ]; then
    printf '%q ' "${line[@]}"
    echo
    exit 0
fi
echo "run_hosts.sh: $total rank$([ "$total" -eq 1 ] || echo s) on ${#names[@]} host$([ ${#names[@]} -eq 1 ] || echo s), $threads BLAS thread$([ "$threads" -eq 1 ] || echo s) each," \
    "$binding" >&2
(watch $$ >/dev/null &) # of mpirun, which has this number from here on
exec "${line[@]}"
