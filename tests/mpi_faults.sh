#!/usr/bin/env bash
# No wait is endless: a rank that stops, leaves or is killed in any phase, a slow one, output that nobody reads, a launcher
# that stands still. The job ends by the deadline and 5 s, with one line that names who is to blame, and nothing is left.
# Needs a build with faults (MUONSHARD_FAULTS, src/fault.h).
#   mpi_faults.sh MUONSHARD [MPIEXEC]
set -u

muonshard=$(realpath "$1") || exit 1
mpiexec=${2:-mpirun}
export OPENBLAS_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
deadline=3
half=$(awk -v d="$deadline" 'BEGIN { print d / 2 }')
export MUONSHARD_START_TIMEOUT=$deadline
host=$(hostname)

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
mkdir text
seq 1 60000 >text/numbers.txt
cat >run.yaml <<YAML
preset: jordan
timeout: $deadline
first_timeout: $deadline
model: {layers: 2, width: 32, heads: 2, context: 32}
data: {files: ["$work/text/*.txt"], val_fraction: 0.1}
train: {steps: 6, batch: 12, warmup: 1, eval_every: 1, eval_windows: 6, log: log.jsonl, progress: off}
YAML

# Every case has a folder and a copy of the config there, by whose name its processes are found.
enter() { # NAME
    name=$1
    dir=$work/${1//[^a-z0-9]/-}
    mkdir "$dir" && cd "$dir" && cp ../run.yaml . || exit 1
    trap - EXIT
}
ranks_of() { # those that run or are stopped: pids
    pgrep -f "^$muonshard train $dir/run.yaml"
}
# since FILE: seconds from FILE's last change till now
since() { awk -v a="$(stat -c %.Y "$1")" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }'; }
wrong() { echo "FAIL  $name: $1"; sed 's/^/      stderr: /' stderr; }

# ended CODE FILE LINE: the job has just ended with $code, FILE was last written when the fault came; LINE is a pattern of
# our one line, "": there is none
ended() {
    local took lines
    took=$(since "$2")
    lines=$(grep '^muonshard: rank ' stderr)
    if [ "$code" -ne "$1" ]; then
        wrong "exit code $code, wanted $1"
    elif [ "${took%.*}" -ge $((deadline + 5)) ]; then
        wrong "ended after $took s"
    elif [ -z "$3" ] && [ -n "$lines" ]; then
        wrong "a line where there is nobody to blame"
    elif [ -n "$3" ] && { [ "$(grep -c . <<<"$lines")" -ne 1 ] || ! grep -qE "^muonshard: $3" <<<"$lines"; }; then
        wrong "not the one line '$3'"
    else
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            [ -n "$(ranks_of)" ] || break
            sleep 0.1
        done
        if [ -n "$(ranks_of)" ]; then
            wrong "processes are left"
        else
            echo "ok    $name: $code after $took s${lines:+: ${lines#muonshard: }}"
        fi
    fi
}

# The points a rank that waits has passed: the last of them just before it had to wait. (Who was stopped goes on for a
# moment when mpirun ends it.)
points_beside() { echo "passed.$((($1 + 1) % $2))"; } # RANK RANKS

# run RANKS FAULTS [mpirun's argument...]: a job with these faults; sets code
run() {
    local ranks=$1 faults=$2
    shift 2
    MUONSHARD_FAULT=$faults MUONSHARD_FAULT_LOG=passed.%r "$mpiexec" --timeout 60 "$@" -n "$ranks" \
        "$muonshard" train "$dir/run.yaml" --resume auto >stdout 2>stderr
    code=$?
}

# stopped RANK RANKS POINT:N WHERE: SIGSTOP there
stopped() (
    enter "rank $1 of $2 stopped at $3"
    run "$2" "stop@$3/$1"
    ended 18 "$(points_beside "$1" "$2")" "rank $1 of $2 \(host $host\): $4: no sign of life for [0-9]+\.[0-9] s \(stopped\); rank [0-2] waited $deadline s for it in [a-z]"
)

# While a checkpoint is saved; ranks whose file is written wait longer, for the late one may yet say that it can't.
saves() { sed -i 's/progress: off/progress: off, save: saved, save_every: 2, save_async: '"$1"'/' run.yaml && echo "save_timeout: $deadline" >>run.yaml; }
stopped_saving() ( # RANK RANKS ASYNC POINT:N WHERE SECONDS
    enter "rank $1 of $2 stopped at $4"
    saves "$3"
    run "$2" "stop@$4/$1"
    ended 18 "$(points_beside "$1" "$2")" "rank $1 of $2 \(host $host\): (after )?step $5: no sign of life for [0-9]+\.[0-9] s \(stopped\); rank [0-2] waited $6 s for it in [a-z]"
)
stopped_loading() ( # RANK RANKS
    enter "rank $1 of $2 stopped at load"
    saves false
    run "$2" ""
    rm passed.*
    run "$2" "stop@load replace:1/$1"
    ended 18 "$(points_beside "$1" "$2")" "rank $1 of $2 \(host $host\): load: no sign of life for [0-9]+\.[0-9] s \(stopped\); rank [0-2] waited $deadline s for it in load"
)

# Where there is no communicator the launcher's children are looked at; of those that wait the first speaks.
stopped_in_mpi() ( # RANK RANKS POINT SPEAKER
    enter "rank $1 of $2 stopped at $3"
    run "$2" "stop@$3:1/$1"
    ended 18 "passed.$4" "rank $1 of $2 \(host $host\): stopped; rank $4 waited $deadline s for it in (step 6, )?$3$"
)

# From outside, wherever the rank is.
stopped_from_outside() (
    enter "rank $1 of $2 stopped from outside"
    sed -i 's/steps: 6/steps: 1000000/; s/eval_every: 1/eval_every: 1000000/' run.yaml
    run "$2" "" &
    until [ "$(grep -c '"step"' log.jsonl 2>/dev/null)" -ge 20 ] 2>/dev/null; do sleep 0.05; done
    for pid in $(ranks_of); do
        tr '\0' '\n' <"/proc/$pid/environ" | grep -qx "OMPI_COMM_WORLD_RANK=$1" && kill -STOP "$pid" && touch stopped
    done
    wait $!
    code=18 # of the job in the background; the line tells
    ended 18 stopped "rank $1 of $2 \(host $host\): (after )?step [0-9]+, .*: no sign of life for [0-9]+\.[0-9] s \(stopped\)"
)

slow() (
    enter "slow ranks below the deadline"
    run 2 "sleep=2@create:1/0;sleep=2@momentum batch 1:2/1;sleep=2@evaluate:3/0;sleep=2@finish:1/1"
    ended 0 passed.0 ""
)

killed() (
    enter "rank $1 of $2 killed"
    run "$2" "kill@momentum batch 1:2/$1"
    ended 137 "$(points_beside "$1" "$2")" ""
)

# mpirun sees to it; where the launcher lets ranks go, the others miss the one that went.
left() (
    enter "rank 1 of 3 leaves"
    run 3 "exit@agree:3/1"
    ended 3 passed.2 ""
)
left_unseen() (
    enter "rank 1 of 3 leaves and the launcher does not mind"
    run 3 "exit@agree:3/1" --mca orte_allowed_exit_without_sync 1 --mca orte_abort_on_non_zero_status 0
    ended 18 passed.2 "rank 1 of 3 \(host $host\): step 3, agree: no sign of life for [0-9.]+ s \(gone\)"
)

# full NAME COMMAND...: stdout is a pipe without room that nobody reads
full() (
    enter "$1"
    shift
    mkfifo pipe && exec 3<>pipe && head -c 60000 /dev/zero >pipe
    sed -i 's/steps: 6/steps: 1000000/; s/progress: off/progress: on/' run.yaml
    "$@" "$muonshard" train "$dir/run.yaml" --resume auto >pipe 2>stderr
    code=$?
    ended 18 log.jsonl "rank 0 of [12] \(host $host\): step [0-9]+, write output, which nobody reads: not done within $half s$"
)

# The launcher can't end anybody: those that wait end themselves.
still_launcher() (
    enter "a launcher that stands still"
    run 2 "sleep=1@agree:3/1;stop@agree:4/1" &
    until grep -q '^finish\|^agree' passed.1 2>/dev/null; do sleep 0.05; done
    launcher=$(pgrep -P $!)
    kill -STOP "$launcher"
    for _ in $(seq $((20 * (deadline + 5)))); do
        sleep 0.05
        alive=$(for pid in $(ranks_of); do grep -h '^State:' "/proc/$pid/status"; done | grep -vc '[TZ] (')
        [ "$alive" -ne 0 ] || break
    done
    kill -CONT "$launcher"
    touch continued
    wait $!
    [ "$alive" -eq 0 ] || wrong "a rank goes on"
    code=18 # of the job in the background; what counts is what the rank did without it
    ended 18 continued "rank 1 of 2 \(host $host\): step 4, agree: no sign of life for [0-9]+\.[0-9] s \(stopped\)"
)

# Two at a time.
number=0
go() {
    number=$((number + 1))
    [ "$(jobs -rp | wc -l)" -lt 2 ] || wait -n
    "$@" >"result.$(printf %02d $number)" 2>&1 &
}
go stopped_in_mpi 1 2 "start MPI" 0
go stopped_in_mpi 0 3 "start MPI" 1
go stopped 0 3 configure:1 configure
go stopped 1 2 "read text:1" "read text"
go stopped 0 2 create:1 create
go stopped 1 2 commit:1 commit
go stopped 2 3 "reduce-scatter bucket 0:3" "step 3, reduce-scatter bucket 0"
go stopped 0 2 agree:2 "step 2, agree"
go stopped 1 3 "momentum batch 1:2" "step 2, momentum batch 1"
go stopped 0 2 "orthogonalize batch 2:1" "step 1, orthogonalize batch 2"
go stopped 1 2 "all-gather batch 1:4" "step 4, all-gather batch 1"
go stopped 0 2 "apply batch 0:2" "step 2, apply batch 0"
go stopped 0 2 "forward and backward:3" "after step 2, forward and backward"
go stopped 2 3 evaluate:1 "after step 1, evaluate"
go stopped 1 2 report:2 "after step 2, report"
go stopped_saving 1 2 false "save begin:1" "2, save" $((2 * deadline))
go stopped_saving 0 3 false "file sync:2" "2, save" $deadline # of the manifest
go stopped_saving 1 3 true "file write:1" "[234], .*" $deadline
go stopped_saving 0 2 false "save complete:1" "2, save" $deadline
go stopped_loading 1 2
go stopped 1 2 finish:1 "after step 6, finish"
go stopped_in_mpi 0 2 "end MPI" 1
go stopped_from_outside 0 3
go stopped_from_outside 1 2
go slow
go left
go left_unseen
go killed 2 3
go killed 0 2
go full "a full pipe, one rank" env
go full "a full pipe behind mpirun" "$mpiexec" --timeout 60 -n 2
go still_launcher
wait
cat result.*
[ "$(cat result.* | grep -c '^ok ')" -eq $number ] || { echo "of $number cases some failed"; exit 1; }
