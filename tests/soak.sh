#!/usr/bin/env bash
# A long run of a small model in which something goes wrong every few hundred steps: its parameters have the bits of a run in which
# nothing does, and memory and descriptors stay what they were.
#   soak.sh SOAK [MPIEXEC] [STEPS] [SEED]
# SOAK is tests/soak.c, in a build with MUONSHARD_FAULTS.
set -u
export LC_ALL=C

soak=$(realpath "$1") || exit 1
mpiexec=${2:-mpirun}
steps=${3:-20000}
seed=${4:-1}
export OPENBLAS_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_odls_base_sigkill_timeout=0
RANDOM=$seed
every=50 # steps between checkpoints
apart=$((steps < 5000 ? 120 : 300)) # and, about, between faults
limit=$((60 + steps / 10)) # seconds of a job
growth=1024 # KiB that a process may grow by, once it is warm

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1

failures=0
failed() { # NAME WHY
    failures=$((failures + 1))
    echo "FAIL  $1: $2"
    tail -n 20 out err 2>/dev/null | sed 's/^/      /'
}

start() { # RANKS FAULT [argument...]: becomes the job
    local n=$1
    export MUONSHARD_FAULT=$2
    shift 2
    # mpirun itself may hang when a rank is killed at an awkward moment (Open MPI 4.1.4), its own timeout too.
    exec timeout -s KILL "$limit" "$mpiexec" --timeout $((limit - 10)) -n "$n" "$soak" "$steps" "$@" >out 2>err
}
job() { { (start "$@"); } 2>/dev/null; }

# ---- undisturbed, on one rank ----

begin=$SECONDS
job 1 "" || failed "undisturbed" "exit code $?"
whole=$(sed -n 's/^parameters //p' out)
grep '^at ' out >whole
echo "undisturbed, 1 rank: parameters $whole, $((SECONDS - begin)) s"

# Wherever a run has looked at its parameters, and at the end.
check_numbers() { # NAME
    local wrong
    wrong=$(grep '^at ' out | grep -vxFf whole | head -n 1)
    [ -z "$wrong" ] || failed "$1" "other parameters: $wrong"
}

# ---- one job, which goes on whatever happens ----

# A list of faults is short; they are spread over the saves of the run.
saves=$((steps / every))
failing=""
for ((i = 0; i < 14; i++)); do
    points=("file create" "file write" "file sync" "file rename" "directory sync" "make directory")
    codes=(ENOSPC EIO EROFS)
    failing+="${codes[RANDOM % 3]}@${points[RANDOM % 6]}:$((saves * (2 * i + 1) / 28 + RANDOM % 3 + 1))/$((RANDOM % 4));"
done
begin=$SECONDS
job 4 "${failing%;}" save=going save_every=$every memory=memory nan=$apart back=$apart seed="$seed" ||
    failed "one job" "exit code $?"
[ "$(sed -n 's/^parameters //p' out)" = "$whole" ] || failed "one job" "other parameters"
check_numbers "one job"
[ "$(find going -name manifest.json | wc -l)" = "$(find going -name 'step-*' | wc -l)" ] || failed "one job" "directories are left over"
count() { grep -c "$1" out; }
echo "one job, 4 ranks: $(count '^skipped once') steps skipped and repeated, $(count '^went back') times back to a checkpoint," \
    "$(count '^not saved') saves failed; $((SECONDS - begin)) s"

# memory: PID RANK STEP KIB DESCRIPTORS, in order of time; the first of a process is its warm-up.
sort -s -n -k 2,2 memory | awk -v growth=$growth '
    !($1 in samples) { samples[$1] = 0; rank[$1] = $2; next }
    { samples[$1]++ }
    samples[$1] == 1 { from[$1] = $4; files[$1] = $5 }
    { at[$1, samples[$1]] = $4; if ($4 > most[$1]) most[$1] = $4; if ($5 != files[$1]) other[$1] = $5 }
    END {
        for (p in samples) {
            if (!samples[p]) continue
            seen++
            n = samples[p]
            printf "rank %d: %d samples, %d KiB resident at first, %d in the middle, %d at last, %d at most; %d descriptors\n",
                rank[p], n, from[p], at[p, int((n + 1) / 2)], at[p, n], most[p], files[p]
            if (most[p] > from[p] + growth) { print "FAIL  memory grows"; bad = 1 }
            if (p in other) { print "FAIL  descriptors: " other[p]; bad = 1 }
        }
        exit bad || seen != 4
    }' || failures=$((failures + 1))

# ---- many jobs, each ended by something ----

limit=300
declare -A ended_by
jobs=0 resumes=0 expected="" latest=0
complete() { find saved -name manifest.json -printf '%h\n' 2>/dev/null | sort -r; }
touch damaged
# A directory may come again under the name of one that is gone; it was made at another time.
made_at() { stat -c '%n %y' "$1"; }
# Complete and not damaged, newest first.
good() {
    local dir
    for dir in $(complete); do
        grep -qxF "$(made_at "$dir")" damaged || echo "$dir"
    done
}
step_of() { local at=${1#saved/step-} && echo $((10#0${at%%-*})); } # DIRECTORY; of none: 0
operations=("reduce-scatter bucket 0" "agree" "resolve" "momentum batch 1" "orthogonalize batch 1" "all-gather batch 0" "apply batch 0")
saving=("save begin" "save end" "save complete" "file write" "file sync" "file rename" "directory sync")

# Sets kind and fault, and for a fault from outside how long to wait.
choose() { # RANKS
    local who=$((RANDOM % $1)) after=$((RANDOM % apart + apart / 2))
    fault="" kind=${kinds[jobs % ${#kinds[@]}]}
    case $kind in
    "killed in a step") fault="kill@${operations[RANDOM % ${#operations[@]}]}:$after/$who" ;;
    "all killed in a step") fault="kill@${operations[RANDOM % ${#operations[@]}]}:$after" ;;
    "killed in a save") fault="kill@${saving[RANDOM % ${#saving[@]}]}:$((after / every + 1))/$who" ;;
    "killed removing") fault="kill@remove file:$((RANDOM % 8 + 1))/0" ;;
    "killed, and damaged") fault="kill@agree:$after/$who" ;;
    esac
}
kinds=("killed, and damaged" "killed in a save" "stopped by a signal" "killed, and damaged" "all killed in a step" "killed removing"
    "killed in a step" "killed from outside")

# A byte of a file of the newest checkpoint becomes another; what is expected then is the one before.
damage() {
    local dirs files file at byte
    mapfile -t dirs < <(good)
    [ ${#dirs[@]} -ge 2 ] || return
    files=("${dirs[0]}"/*)
    file=${files[RANDOM % ${#files[@]}]}
    at=$(((RANDOM * 32768 + RANDOM) % $(stat -c %s "$file")))
    byte=$(od -An -tu1 -j $at -N 1 "$file")
    # shellcheck disable=SC2059 # it is the byte
    printf "\\x$(printf %x $((byte ^ (RANDOM % 255 + 1))))" | dd of="$file" bs=1 seek=$at conv=notrunc 2>/dev/null
    made_at "${dirs[0]}" >>damaged
}

from_outside() { # RANKS KIND: a job that something is done to after a second or so
    local pids mpirun
    : >out
    (start "$1" "" save=saved save_every=$every nan=$apart seed=$((seed + jobs))) &
    local job=$!
    until grep -q ' ranks' out || ! kill -0 $job 2>/dev/null; do
        sleep 0.05
    done
    sleep "$((RANDOM % 3)).$((RANDOM % 10))"
    mpirun=$(pgrep -P $job) # it may have ended, as well as its ranks
    mapfile -t pids < <(pgrep -P "${mpirun:-$job}")
    if [ "$2" = "stopped by a signal" ]; then
        [ -z "$mpirun" ] || kill -USR1 "$mpirun" 2>/dev/null # which passes it on
    elif [ ${#pids[@]} -gt 0 ]; then
        kill -KILL "${pids[RANDOM % ${#pids[@]}]}" 2>/dev/null
    fi
    wait $job 2>/dev/null
}

check_job() { # NAME
    local from
    from=$(sed -nE 's/^goes on .*, from (.*)/\1/p' out)
    if [ -n "$from" ]; then
        resumes=$((resumes + 1))
        passed_over=$((passed_over + $(count '^passed over: ')))
        [ "$from" = "$expected" ] || failed "$1" "goes on from $from, expected ${expected:-nothing}"
    fi
    check_numbers "$1"
    skipped=$((skipped + $(count '^skipped once')))
}

begin=$SECONDS
skipped=0 passed_over=0 done=""
while [ -z "$done" ] && [ $failures -lt 5 ]; do
    n=$((RANDOM % 4 + 1))
    jobs=$((jobs + 1))
    choose $n
    [ $jobs -gt $((steps / 20 + 20)) ] && failed "many jobs" "they get nowhere" && break
    case $kind in
    "killed from outside" | "stopped by a signal") from_outside $n "$kind" ;;
    *) job $n "$fault" save=saved save_every=$every nan=$apart seed=$((seed + jobs)) ;;
    esac
    code=$?
    name="job $jobs, $n ranks, $kind${fault:+ ($fault)}"
    check_job "$name"
    case $code in
    0) done=1 && kind="done" ;;
    4) kind="stopped by a signal" ;;
    137) ;;
    *) failed "$name" "exit code $code" ;;
    esac
    [ "$kind" = "done" ] || ended_by[$kind]=$((${ended_by[$kind]:-0} + 1))
    # What was good stays, or something later is there.
    expected=$(good | head -n 1)
    [ "$(step_of "$expected")" -ge "$latest" ] || failed "$name" "the newest checkpoint was of step $latest, and is $expected"
    if [ "$kind" = "killed, and damaged" ]; then
        damage
        expected=$(good | head -n 1)
    fi
    latest=$(step_of "$expected")
done
[ "$(sed -n 's/^parameters //p' out)" = "$whole" ] || failed "many jobs" "other parameters"
[ "$(find saved -name manifest.json | wc -l)" = "$(find saved -name 'step-*' | wc -l)" ] || failed "many jobs" "directories are left over"
echo "$jobs jobs of 1 to 4 ranks: $resumes went on from a checkpoint; $(wc -l <damaged) checkpoints were damaged, $passed_over times one was passed over; $skipped steps skipped" \
    "and repeated; $((SECONDS - begin)) s"
for kind in "${!ended_by[@]}"; do
    printf '  %-24s %4d\n' "$kind" "${ended_by[$kind]}"
done | sort
echo "$steps steps, parameters $(sed -n 's/^parameters //p' out), $(du -sb saved | cut -f 1) bytes in $(complete | wc -l) checkpoints"
[ $failures -eq 0 ] || { echo "$failures failures"; exit 1; }
