#!/usr/bin/env bash
# Times optimizer steps of model files over rank counts, and makes a table and a page of them:
#   scaling.sh [--ranks 1,2,4] [--weak|--both] [--launcher local|hosts|srun] [--hosts FILE|HOST,HOST...] [--machine FILE] [--out DIR]
#              MODEL... [-- ARGUMENT OF muonshard bench step...]
#   --ranks LIST     default: 1, 2, 4, 8... to what there is: SLURM_NTASKS, the slots of --hosts, else this machine's GPUs, else its cores
#   --weak, --both   every tensor as often as there are ranks; or both ways. Default: strong, the same model over more ranks
#   --launcher NAME  default: srun where SLURM_NTASKS is set, hosts with --hosts, else local
#   --machine FILE   muonshard plan simulates the same for this machine
#   --out DIR        default: out/scaling. Results of earlier sweeps that lie there are in the table, too
# A rank has as many threads at every rank count as it has at the largest. A run that fails is named at the end, and the exit code is 1.
#   MUONSHARD              the command (default: build/release/launch/muonshard)
#   MUONSHARD_THREADS      threads of a rank
#   MUONSHARD_JOB_TIMEOUT  seconds after which a run is ended
#   MUONSHARD_SRUN_MPI     what srun --mpi gets (default: pmix)
set -euo pipefail
launch=$(cd "$(dirname "$0")" && pwd)
export LC_ALL=C

die() {
    echo "scaling.sh: $1" >&2
    exit 2
}

ranks='' scalings=(strong) launcher='' hosts='' machine='' out=out/scaling models=() arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --weak) scalings=(weak) ;;
    --both) scalings=(strong weak) ;;
    --ranks | --launcher | --hosts | --machine | --out)
        [ $# -ge 2 ] || die "$1 needs a value"
        declare "${1#--}=$2"
        shift
        ;;
    --)
        shift
        arguments=("$@")
        break
        ;;
    -*) die "unknown option $1" ;;
    *) models+=("$1") ;;
    esac
    shift
done
[ ${#models[@]} -gt 0 ] || die "usage: scaling.sh [--ranks 1,2,4] [--weak|--both] [--launcher local|hosts|srun] [--hosts FILE] [--machine FILE] [--out DIR] MODEL... [-- ARGUMENT...]"

muonshard=${MUONSHARD:-$launch/../build/release/launch/muonshard}
muonshard=$(command -v "$muonshard") || die "there is no ${MUONSHARD:-build/release/launch/muonshard}; build it, or set MUONSHARD"
declare -A name_of of_name
for model in "${models[@]}"; do
    [ -r "$model" ] || die "$model cannot be read"
    name=${model##*/}
    name=${name%.yaml}
    [ -z "${of_name[$name]-}" ] || die "$model and ${of_name[$name]} would write the same files"
    of_name[$name]=$model
    name_of[$model]=$name
done
[ -z "$machine" ] || [ -r "$machine" ] || die "$machine cannot be read"

# ---- what there is: `most` ranks, `threads` of each ----
if [ -z "$launcher" ]; then
    launcher=local
    [ -z "${SLURM_NTASKS-}" ] || launcher=srun
    [ -z "$hosts" ] || launcher=hosts
fi
[ "$launcher" = hosts ] || [ -z "$hosts" ] || die "--hosts is for --launcher hosts"
most=0 threads=${MUONSHARD_THREADS-} slots=()
case $launcher in
local)
    most=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || most=0
    read -r _ cores <<<"$("$launch/cores.sh")"
    [ "$most" -gt 0 ] || most=$cores
    ;;
hosts)
    # run_hosts.sh knows how many belong on which host.
    line=$("$launch/run_hosts.sh" ${hosts:+--hosts "$hosts"} --dry-run true) || exit
    line=${line//\\/}
    [[ $line =~ \ -n\ ([0-9]+)\ --host\ ([^ ]+)\  ]] || die "run_hosts.sh says \"$line\""
    most=${BASH_REMATCH[1]}
    IFS=, read -ra slots <<<"${BASH_REMATCH[2]}"
    [[ -n $threads || ! $line =~ PE=([0-9]+) ]] || threads=${BASH_REMATCH[1]}
    ;;
srun)
    command -v srun >/dev/null || die "there is no srun in PATH"
    most=${SLURM_NTASKS:-1}
    nodes=${SLURM_JOB_NUM_NODES:-1}
    per_node=${SLURM_NTASKS_PER_NODE:-$(((most + nodes - 1) / nodes))}
    ;;
*) die "--launcher is \"$launcher\", not local, hosts or srun" ;;
esac
if [ -n "$ranks" ]; then
    [[ $ranks =~ ^[1-9][0-9]*(,[1-9][0-9]*)*$ ]] || die "--ranks is \"$ranks\", not numbers separated by commas"
    IFS=, read -ra counts <<<"$ranks"
else
    counts=()
    for ((n = 1; n < most; n *= 2)); do counts+=("$n"); done
    counts+=("$most")
fi
largest=$(printf '%s\n' "${counts[@]}" | sort -n | tail -n 1)
[ "$launcher" != hosts ] || [ "$largest" -le "$most" ] || die "--ranks: $largest are more than the $most slots of the hosts"
case $launcher in
local) threads=${threads:-$((cores / largest > 0 ? cores / largest : 1))} ;;
srun)
    share=$((largest < per_node ? largest : per_node))
    threads=${threads:-${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / share > 0 ? ${SLURM_CPUS_ON_NODE:-1} / share : 1))}}
    ;;
esac
if [ -n "$threads" ]; then
    export MUONSHARD_THREADS=$threads OPENBLAS_NUM_THREADS=$threads
    case " ${arguments[*]-} " in *' threads='*) ;; *) arguments+=("threads=$threads") ;; esac
fi

mkdir -p "$out"

# Sets command: what starts so many ranks of what follows it.
launch_with() { # RANKS
    local left=$1 slot here
    case $launcher in
    local) command=("$launch/run_local.sh" "$1") ;;
    hosts)
        for slot in "${slots[@]}"; do
            here=$((${slot##*:} < left ? ${slot##*:} : left))
            left=$((left - here))
            [ $here -eq 0 ] || echo "${slot%:*} slots=$here"
        done >"$out/hosts-$1"
        command=("$launch/run_hosts.sh" --hosts "$out/hosts-$1")
        ;;
    srun)
        command=(srun --mpi="${MUONSHARD_SRUN_MPI:-pmix}" --ntasks="$1" --nodes=$((($1 + per_node - 1) / per_node))
            --ntasks-per-node="$(($1 < per_node ? $1 : per_node))" --cpus-per-task="$threads" --kill-on-bad-exit=1)
        [ -z "${SLURM_GPUS_ON_NODE-}" ] || command+=(--cpu-bind=none) # bind.sh picks CPUs beside them
        [ -z "${MUONSHARD_JOB_TIMEOUT-}" ] || command=(timeout "$MUONSHARD_JOB_TIMEOUT" "${command[@]}")
        command+=("$launch/bind.sh")
        ;;
    esac
}

# ---- the runs ----
trap 'exit 130' INT # mpirun ends as if nothing had been
trap 'exit 143' TERM
failed=() run=0
total=$((${#models[@]} * ${#scalings[@]} * ${#counts[@]}))
# A command's output goes to a file; its result is DIR/NAME.json or, where it fails, nothing.
attempt() { # NAME COMMAND...
    local name=$1 begin=$SECONDS code=0
    shift
    rm -f "$out/$name.json"
    "$@" </dev/null >"$out/$name.log" 2>&1 || code=$?
    if [ $code -eq 0 ]; then
        echo "$((SECONDS - begin)) s" >&2
    else
        echo "failed after $((SECONDS - begin)) s, exit code $code; the end of $out/$name.log:" >&2
        grep -v '^-*$' "$out/$name.log" | tail -n 10 | sed 's/^/    /' >&2 || true # without mpirun's frames
        rm -f "$out/$name.json" # of wrong results, or not whole
        failed+=("$name (exit code $code)")
    fi
}

overrides=()
for argument in ${arguments[@]+"${arguments[@]}"}; do
    [[ ! $argument =~ ^[a-z0-9_.]+= ]] || overrides+=("$argument")
done
simulates=''
if [ -n "$machine" ]; then
    help=$("$muonshard" plan --help)
    if grep -qE '^ *-J\b' <<<"$help"; then
        simulates=1
    else
        echo "scaling.sh: this muonshard plan has no -J: nothing is simulated" >&2
    fi
fi
for model in "${models[@]}"; do
    for scaling in "${scalings[@]}"; do
        weak=()
        [ "$scaling" = strong ] || weak=(--weak)
        for n in "${counts[@]}"; do
            run=$((run + 1))
            name=${name_of[$model]}-$scaling-$n
            printf '[%d/%d] %s, %s, %d rank%s: ' "$run" "$total" "${name_of[$model]}" "$scaling" "$n" "$([ "$n" -eq 1 ] || echo s)" >&2
            launch_with "$n"
            attempt "$name" "${command[@]}" "$muonshard" bench step "$model" ${weak[@]+"${weak[@]}"} -J "$out/$name.json" \
                ${arguments[@]+"${arguments[@]}"}
        done
        [ -n "$simulates" ] || continue
        if [ "$scaling" = weak ] && ! grep -qE '^ *--weak\b' <<<"$help"; then
            echo "scaling.sh: this muonshard plan has no --weak: weak scaling isn't simulated" >&2
            continue
        fi
        name=${name_of[$model]}-$scaling-simulated
        printf '%s, %s, simulated: ' "${name_of[$model]}" "$scaling" >&2
        attempt "$name" "$muonshard" plan "$model" --ranks "$(IFS=, && echo "${counts[*]}")" --machine "$machine" \
            ${weak[@]+"${weak[@]}"} -J "$out/$name.json" ${overrides[@]+"${overrides[@]}"}
    done
done

# ---- what came of it ----
code=0
if compgen -G "$out/*.json" >/dev/null; then
    if "$muonshard" report "$out"/*.json --out "$out/report.html"; then
        echo "scaling.sh: the page is $out/report.html" >&2
    else
        code=1
    fi
else
    echo "scaling.sh: there are no results" >&2
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "scaling.sh: ${#failed[@]} failed:" >&2
    printf '    %s\n' "${failed[@]}" >&2
    code=1
fi
exit $code
