#!/usr/bin/env bash
# muonshard train that is killed at any point and goes on by --resume auto: no checkpoint that was complete is lost, and the
# numbers are those of a run that nothing has happened to. Then the same for disks that are full, read-only or failing.
#   kills.sh MUONSHARD [MPIEXEC] [--kills N] [--seed S]
# Wants a build with MUONSHARD_FAULTS.
set -u

kills_wanted=60
seed=1
words=()
while [ $# -gt 0 ]; do
    case $1 in
    --kills) kills_wanted=$2 && shift ;;
    --seed) seed=$2 && shift ;;
    *) words+=("$1") ;;
    esac
    shift
done
muonshard=$(realpath "${words[0]}") || exit 1
mpiexec=${words[1]:-mpirun}
export OPENBLAS_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
# mpirun kills the ranks that are left at once; a program of one rank starts no daemon.
export OMPI_MCA_odls_base_sigkill_timeout=0 OMPI_MCA_ess_singleton_isolated=1
RANDOM=$seed

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
export OMPI_MCA_orte_tmpdir_base=$work # what is killed leaves its files of a session
cd "$work" || exit 1

failures=0
failed() { # NAME WHY
    failures=$((failures + 1))
    echo "FAIL  $1: $2"
    sed 's/^/      stderr: /' stderr
    find "$saved" 2>/dev/null | sed 's/^/      /'
}
expect() { test "$2" "$3" "$4" || failed "$1" "$2 $3 $4"; } # NAME A OPERATOR B

last=12  # steps of a run
every=3  # and between its checkpoints
keep=2
saved=saved
mkdir text
seq 1 6000 >text/numbers.txt
cat >tiny.yaml <<YAML
preset: jordan
ns_dtype: fp32
timeout: 20
adam.lr: 3e-3
model: {layers: 1, width: 16, heads: 2, context: 16}
data: {files: ["text/*.txt"], val_fraction: 0.1}
train: {steps: $last, batch: 12, warmup: 2, eval_every: 6, eval_windows: 4, save_every: $every, keep: $keep, progress: off}
YAML

# mpirun itself may hang when a rank is killed at an awkward moment (Open MPI 4.1.4), its own timeout too.
start() { # RANKS FAULT [argument...]: becomes the run
    local launch=(timeout -s KILL 70 "$mpiexec" --timeout 60 -n "$1")
    [ "$1" = 1 ] && launch=()
    export MUONSHARD_FAULT=$2
    shift 2
    exec "${launch[@]}" "$muonshard" train tiny.yaml train.save="$saved" train.log=log.jsonl train.save_async="$async" "$@" \
        >stdout 2>stderr
}
train() { { (start "$@"); } 2>/dev/null; } # RANKS FAULT [argument...]; without the shell's word on who was killed

# What a run is to have in common with another.
steps() { sed -nE '/^\{"step"/s/,"tokens_per_s.*"time_s":[^,}]*//p' "$1"; }
losses() { sed -nE 's/^\{"step":([0-9]+),"train_loss":([^,]*).*/\1 \2/p' "$1" | sort; }
# Other numbers of ranks add in another order.
near() { # LOG LOG
    join <(losses "$1") <(losses "$2") | awk -v last=$last '
        { d = ($2 - $3) / $2; if (d > 1e-4 || d < -1e-4) far = 1 }
        END { exit far || NR != last }'
}

complete() { find "$saved" -name manifest.json 2>/dev/null | wc -l; }
# The step of the newest complete checkpoint; 0: there is none.
newest() {
    find "$saved" -name manifest.json 2>/dev/null | sed -E 's|.*/step-0*([0-9]+)[^/]*/.*|\1|' | sort -n | tail -n 1 | grep . || echo 0
}
# What is no part of a complete checkpoint.
leftovers() {
    local path
    for path in "$saved"/*; do
        [ -f "$path/manifest.json" ] || echo "$path"
    done
    find "$saved" -name '*.tmp'
}

# ---- what a run passes ----

# points.RANKS.RANK: lines "TIMES POINT".
async=true
for n in 1 2 3; do
    rm -rf saved
    MUONSHARD_FAULT_LOG=passed.%r train $n "" || failed "a run on $n ranks" "exit code $?"
    mv log.jsonl whole.$n.jsonl
    for ((r = 0; r < n; r++)); do
        sort passed.$r | uniq -c | sed -E 's/^ +//' >points.$n.$r
    done
    rm passed.*
done
[ -s points.1.0 ] || { echo "this build has no faults: MUONSHARD_FAULTS is off"; exit 1; }
near whole.1.jsonl whole.3.jsonl || failed "the same on 1 and 3 ranks" "other losses"

# Lines "RANKS WHO TIME POINT": the first, the middle and the last time that a rank, or all, pass a point.
sweep_of() { # RANKS WHO POINTS
    awk -v n="$1" -v who="$2" '
        { times = $1; sub(/^[0-9]+ /, ""); split("", done)
          split("1 " int((times + 1) / 2) " " times, at, " ")
          for (i = 1; i <= 3; i++) if (!(at[i] in done)) { done[at[i]]; print n, who, at[i], $0 } }' "$3"
}
# RANDOM follows the seed in this shell only, not in those of pipes and substitutions.
order=$RANDOM
shuffle() { awk -v seed="$order" 'BEGIN { srand(seed) } { print rand() "\t" $0 }' | sort -n | cut -f 2-; }
{
    sweep_of 1 0 points.1.0
    for n in 2 3; do
        sweep_of $n 0 points.$n.0
        sweep_of $n 1 points.$n.1
        sweep_of $n all points.$n.0
    done
} | shuffle >sweep
# Every write of one rank comes first: of its own file, of the manifest. Then every point comes once on one rank and once on
# several before any comes again.
awk '{ where = $1 == 1; point = $0; sub(/^[^ ]+ [^ ]+ [^ ]+ /, "", point)
       round = ++seen[where, point]
       print (where && point ~ /^file |^directory sync/ ? 0 : round) "\t" $0 }' sweep |
    sort -s -n -k 1,1 | cut -f 2- >plan

# ---- a kill, and what it may leave ----

class_of() { # POINT
    case $1 in
    load*) echo "while loading" ;;
    "any moment"*) echo "any moment" ;;
    save*) echo "around a save" ;;
    file* | "directory sync" | "make directory") echo "writing files" ;;
    remove*) echo "removing old ones" ;;
    *) echo "in a step" ;;
    esac
}
declare -A killed_in
kills=0 lost=0 chains=0 finished=0

lose() { lost=$((lost + 1)) && failed "$1" "$2"; }

# Before and after a run, whether it was killed or not: what was complete stays, and is what it goes on from.
before() { had=$(complete) was=$(newest); }
check_kept() { # NAME
    local from
    [ "$(newest)" -ge "$was" ] || lose "$1" "checkpoint of step $was is gone"
    [ "$(complete)" -ge $((had < keep ? had : keep)) ] || lose "$1" "$(complete) checkpoints of $had"
    from=$(sed -nE 's/^muonshard train: goes on after step ([0-9]+),.*/\1/p' stderr)
    [ "${from:-$was}" = "$was" ] || lose "$1" "went on after step $from, not $was"
    ! grep -q 'passed over' stderr || lose "$1" "a complete checkpoint is damaged"
}

# The run has ended by itself: numbers, and nothing but checkpoints.
check_end() { # NAME CODE RANKS (0: several)
    expect "$1: exit code" "$2" = 0
    expect "$1: newest" "$(newest)" = $last
    if [ "$was" -gt 0 ]; then
        [ "$(grep -c "^{\"resumed_after\":$was,\"from\":\"$saved/step-" log.jsonl)" -ge 1 ] || lose "$1" "the log has no resumed_after $was"
    fi
    if [ "$3" = 0 ]; then
        near whole.1.jsonl log.jsonl || lose "$1" "other losses"
    else
        [ "$(steps log.jsonl)" = "$(steps whole."$3".jsonl)" ] || lose "$1" "other numbers"
    fi
    # A job that was killed after its last checkpoint was complete has nothing left to save, and so to remove.
    if [ "$was" != $last ]; then
        expect "$1: left over" "$(leftovers)" = ""
        expect "$1: checkpoints" "$(complete)" = $keep
    fi
    finished=$((finished + 1))
}

# kill_at RANKS WHO TIME POINT: a run that goes on from what is there; false: it has ended by itself before.
kill_at() {
    local n=$1 fault="kill@$4:$3/$2" code
    [ "$2" = all ] && fault="kill@$4:$3"
    name="kill $((kills + 1)), $n ranks, $fault"
    before
    train "$n" "$fault" --resume auto
    code=$?
    check_kept "$name"
    [ $code -eq 0 ] && ended=$code && return 1
    [ $code -eq 137 ] || failed "$name" "exit code $code"
    note_kill "$4"
}
note_kill() { # POINT
    local class
    class=$(class_of "$1")
    killed_in[$class]=$((${killed_in[$class]:-0} + 1))
    kills=$((kills + 1))
}

# kill_any_moment RANKS: from outside, one rank or all of them, whatever they do. False: ended before.
kill_any_moment() {
    local n=$1 job mpirun victims code
    name="kill $((kills + 1)), $n ranks, any moment"
    before
    (start "$n" "" --resume auto) &
    job=$!
    sleep "0.$(printf %03d $((RANDOM % 600 + 50)))"
    victims=("$job")
    if [ "$n" != 1 ]; then # the ranks are below timeout and mpirun; there are none before it has begun, and when it has ended
        mpirun=$(pgrep -P $job)
        mapfile -t victims < <(pgrep -P "${mpirun:-$job}")
    fi
    [ $((RANDOM % 2)) = 0 ] && [ ${#victims[@]} -gt 0 ] && victims=("${victims[RANDOM % ${#victims[@]}]}")
    kill -KILL "${victims[@]}" 2>/dev/null
    wait $job 2>/dev/null
    code=$?
    check_kept "$name"
    [ $code -eq 0 ] && ended=$code && return 1
    note_kill "any moment"
}

# Sets who, time and point: what such a run passes, most often in its first half.
random_fault() { # RANKS
    local times points loads=("load" "load replace")
    who=$((RANDOM % ($1 < 2 ? 1 : 2)))
    time=1
    point=${loads[RANDOM % 2]}
    [ $((RANDOM % 3)) = 0 ] && return
    mapfile -t points <"points.$1.$who"
    read -r times point <<<"${points[RANDOM % ${#points[@]}]}"
    time=$((RANDOM % (times / 2 + 1) + 1))
    [ "$1" != 1 ] && [ $((RANDOM % 3)) = 0 ] && who=all
}

# From nothing, killed as the plan says; then up to two kills of the runs that go on; then to the end. Half of the chains have
# one number of ranks.
chain() { # RANKS WHO TIME POINT
    local n=$1 same=$((RANDOM % 2)) more=$((RANDOM % 3)) ranks
    chains=$((chains + 1))
    rm -rf saved log.jsonl
    ((RANDOM % 2)) && async=true || async=false
    if ! kill_at "$@"; then
        failed "$name" "was not killed"
        return
    fi
    ranks=$n
    while [ $more -gt 0 ]; do
        more=$((more - 1))
        [ $same = 1 ] || n=$((RANDOM % 3 + 1))
        [ "$n" = "$ranks" ] || ranks=0
        if [ $((RANDOM % 4)) = 0 ]; then
            kill_any_moment "$n"
        else
            random_fault "$n"
            kill_at "$n" "$who" "$time" "$point"
        fi || { check_end "$name" "$ended" "$ranks" && return; }
    done
    [ $same = 1 ] || n=$((RANDOM % 3 + 1))
    [ "$n" = "$ranks" ] || ranks=0
    name="after $kills kills, on $n ranks"
    before
    train "$n" "" --resume auto
    ended=$?
    check_kept "$name"
    check_end "$name" $ended "$ranks"
}

begin=$SECONDS
while [ $kills -lt "$kills_wanted" ]; do
    while [ $kills -lt "$kills_wanted" ] && read -r n who time point <&3; do
        chain "$n" "$who" "$time" "$point"
    done 3<plan
    order=$RANDOM
    shuffle <sweep >plan
done
echo "points: $(cut -d ' ' -f 2- points.?.? | sort -u | wc -l); planned kills: $(wc -l <sweep)"
for class in "${!killed_in[@]}"; do
    printf '%-20s %4d kills\n' "$class" "${killed_in[$class]}"
done | sort
echo "$chains chains, $finished finished with the right numbers, $((SECONDS - begin)) s"
echo "$kills kills, $lost lost"

# ---- disks that fail: the run goes on, says so, and has its earlier checkpoints ----

# failing RANKS FAULT LAST: a fault in a save that is the last one (1) or not (0).
failing() {
    local name="$1 ranks, $2" code
    rm -rf "$saved" log.jsonl
    train "$1" "$2"
    code=$?
    expect "$name: exit code" $code = $(($3 ? 15 : 0))
    expect "$name: told" "$(grep -c '^muonshard train: warning: not saved: ' stderr)" = 1
    expect "$name: numbers" "$(steps log.jsonl)" = "$(steps whole."$1".jsonl)"
    expect "$name: left over" "$(leftovers)" = ""
    expect "$name: newest" "$(newest)" = $(($3 ? last - every : last))
    expect "$name: checkpoints" "$(complete)" = $keep
    [ "$3" = 1 ] || return
    before
    train "$1" "" --resume auto
    code=$?
    check_kept "$name: resumed"
    check_end "$name: resumed" $code "$1"
}

errors=0
for error in ENOSPC EIO; do
    async=$([ $error = EIO ] && echo true || echo false)
    # On one rank a save makes two files, and after the first one a directory.
    for fault in "make directory:4/0/0" "file create:3/0/0" "file create:4/0/0" "file write:3/0/0" "file write:8/0/1" \
        "file sync:7/0/1" "file sync:8/0/1" "file rename:5/0/0" "file rename:8/0/1"; do
        failing 1 "$error@${fault%/?}" "${fault##*/}"
        errors=$((errors + 1))
    done
    # Rank 1 makes its own file only.
    for fault in "file create:2/1/0" "file write:4/1/1" "file sync:4/1/1" "directory sync:3/1/0"; do
        failing 2 "$error@${fault%/?}" "${fault##*/}"
        errors=$((errors + 1))
    done
done
echo "$errors failing calls of the file system"

# Killed while what a failed save has left is removed, after one that was older.
for point in "remove manifest" "remove file" "remove directory"; do
    name="failed, and kill@$point:2"
    rm -rf "$saved" log.jsonl
    train 1 "ENOSPC@file write:8;kill@$point:2"
    expect "$name: exit code" $? = 137
    expect "$name: newest" "$(newest)" = $((last - every))
    before
    train 1 "" --resume auto
    code=$?
    check_kept "$name"
    check_end "$name" $code 1
done

# Writes that write less are gone on with.
for n in 1 2; do
    rm -rf "$saved" log.jsonl
    was=0
    train $n "short@file write:1;short@file write:2;short@file write:3;short@file write:5;short@file write:7"
    check_end "short writes, $n ranks" $? $n
    ! grep -q "not saved" stderr || failed "short writes, $n ranks" "not saved"
    train $n "" --resume auto
    expect "short writes, $n ranks: read again" $? = 0
    ! grep -q "passed over" stderr || failed "short writes, $n ranks" "damaged"
done
echo "short writes"

# A small file system of its own, which nobody else sees.
on_small_disk() {
    mkdir -p disk && mount -t tmpfs -o size=4m none disk || return 77
    saved=disk/saved
    async=true
    local checkpoint n code
    for n in 1 2; do
        # Room for one checkpoint and a half.
        train $n ""
        checkpoint=$(du -sk $saved/step-000000$last | cut -f 1)
        rm -rf $saved log.jsonl
        dd if=/dev/zero of=disk/ballast bs=1k count=$((4096 - checkpoint * 3 / 2)) 2>/dev/null
        train $n ""
        expect "full disk, $n ranks: exit code" $? = 15
        expect "full disk, $n ranks: told" "$(grep -c 'warning: not saved: .*No space left on device' stderr)" = 3
        expect "full disk, $n ranks: the earlier one" "$(newest)" = $every
        expect "full disk, $n ranks: left over" "$(leftovers)" = ""
        expect "full disk, $n ranks: numbers" "$(steps log.jsonl)" = "$(steps whole.$n.jsonl)"
        # Space comes back while it goes on, after the first save that fails.
        before
        (start $n "sleep=1.5@save begin:2/0" --resume auto) &
        for _ in $(seq 300); do
            grep -q "not saved" stderr && break
            sleep 0.05
        done
        rm disk/ballast
        wait $!
        code=$?
        expect "space comes back, $n ranks: told" "$(grep -c 'warning: not saved: ' stderr)" = 1
        check_kept "space comes back, $n ranks"
        check_end "space comes back, $n ranks" $code $n
        # Read-only from the start, then not.
        rm -r $saved/step-000000$last
        before
        mount -o remount,ro disk
        train $n "" --resume auto
        expect "read-only, $n ranks: exit code" $? = 15
        expect "read-only, $n ranks: told" "$(grep -c 'warning: not saved: .*Read-only file system' stderr)" = 1
        mount -o remount,rw disk
        check_kept "read-only, $n ranks"
        train $n "" --resume auto
        check_end "writable again, $n ranks" $? $n
        rm -rf $saved log.jsonl
    done
    echo "a full disk, space that comes back, a read-only file system"
    [ $failures -eq 0 ]
}
if unshare -m true 2>/dev/null; then
    (unshare -m bash -c "$(declare -f; declare -p seed muonshard mpiexec last every keep failures finished lost); on_small_disk")
    case $? in
    0) ;;
    77) echo "skipped: a full disk, for nothing can be mounted here" ;;
    *) failures=$((failures + 1)) ;;
    esac
else
    echo "skipped: a full disk, for nothing can be mounted here"
fi

[ $failures -eq 0 ] || { echo "$failures failures"; exit 1; }
