#!/usr/bin/env bash
# muonshard train that is stopped and goes on: by --resume, on the same ranks to the bit and on others; by signals; what it refuses.
#   test_resume.sh MUONSHARD [MPIEXEC]
set -u

# shellcheck source=tests/train_rig.sh
. "$(dirname "$0")/train_rig.sh"
expect() { [ "$2" "$3" "$4" ] && passed "$1" || failed "$1" "$2 $3 $4"; } # NAME A OPERATOR B
says() { grep -qE "$2" stderr && passed "$1" || failed "$1" "not said: $2"; } # NAME PATTERN

mkdir text
seq 1 60000 >text/numbers.txt
cat >tiny.yaml <<'YAML'
preset: jordan
ns_dtype: fp32
adam.lr: 3e-3
model: {layers: 2, width: 32, heads: 2, context: 32}
data: {files: ["text/*.txt"], val_fraction: 0.1}
train: {steps: 24, batch: 12, warmup: 3, eval_every: 6, eval_windows: 20, save: saved, save_every: 5, progress: off}
YAML

train() { # RANKS LOG [argument...]
    local n=$1 log=$2
    shift 2
    "$mpiexec" --timeout 100 -n "$n" "$muonshard" train tiny.yaml train.log="$log" "$@" >stdout 2>stderr
}
# What a run is to have in common with another.
steps() { sed -nE '/^\{"step"/s/,"tokens_per_s.*"time_s":[^,}]*//p' "$1"; }
# The later half of a run is lost, and its log is that of a run that was killed in the middle of a line.
lose() { # LOG STEP
    local step
    for step in saved/step-*; do
        [ "$(basename "$step")" '>' "step-000000$2" ] && rm -r "$step"
    done
    printf '{"step":99,"train_l' >>"$1"
}

train 2 whole.jsonl || failed "a run that saves" "exit code $?"
expect "the newest two stay" "$(echo saved/*)" = "saved/step-00000020 saved/step-00000024"
rm -r saved
train 2 unsaved.jsonl train.save= || failed "a run that does not" "exit code $?"
expect "saving changes no bit" "$(steps whole.jsonl)" = "$(steps unsaved.jsonl)"
[ -e saved ] && failed "no directory without train.save" "it is there"

for how in "" "train.save_async=false" "model.params=bf16" "master=replicated gather=updates model.params=bf16"; do
    rm -rf saved
    # shellcheck disable=SC2086 # words they are
    train 2 one.jsonl train.keep=0 $how || failed "saved run $how" "exit code $?"
    cp one.jsonl all.jsonl
    lose one.jsonl 12
    # shellcheck disable=SC2086
    train 2 one.jsonl --resume auto $how || failed "continued run $how" "exit code $?"
    expect "continued, to the bit: $how" "$(steps all.jsonl)" = "$(steps one.jsonl)"
    expect "the log says where: $how" "$(grep -c '^{"resumed_after":10,"from":"saved/step-00000010","ranks":2}$' one.jsonl)" = 1
done

for n in 1 3 4; do
    rm -rf saved
    train 2 other.jsonl train.keep=0 || failed "saved by 2 ranks" "exit code $?"
    cp other.jsonl all.jsonl
    lose other.jsonl 12
    train $n other.jsonl --resume auto || failed "continued by $n ranks" "exit code $?"
    worst=$(join <(sed -nE 's/^\{"step":([0-9]+),"train_loss":([^,]*).*/\1 \2/p' all.jsonl | sort) \
        <(sed -nE 's/^\{"step":([0-9]+),"train_loss":([^,]*).*/\1 \2/p' other.jsonl | sort) |
        awk '{ d = ($2 - $3) / $2; d = d < 0 ? -d : d; if (d > w) w = d; n++ } END { print n, (w < 1e-3 ? "near" : w) }')
    expect "continued by $n ranks" "$worst" = "24 near"
done

# ---- signals ----

signal() { # NAME SIGNAL RANKS: to one rank; the job saves and ends
    local pid job code
    rm -rf saved
    "$mpiexec" --timeout 100 -n "$3" "$muonshard" train tiny.yaml train.log=stop.jsonl train.steps=100000 \
        train.save_every=0 >stdout 2>stderr &
    job=$!
    for _ in $(seq 300); do
        [ "$(grep -c '"step"' stop.jsonl 2>/dev/null)" -ge 5 ] 2>/dev/null && break
        sleep 0.1
    done
    pid=$(pgrep -f "^$muonshard train tiny.yaml" | head -n 1)
    kill "-$2" "$pid"
    wait $job
    code=$?
    expect "$1: exit code" $code = 4
    says "$1: told" "muonshard train: stopped by a signal, and saved in saved"
    expect "$1: one checkpoint" "$(find saved -name manifest.json | wc -l)" = 1
    expect "$1: of the last step" "$(basename saved/*)" = "$(printf 'step-%08d' "$(grep -c '"step"' stop.jsonl)")"
    rm stop.jsonl
}
signal SIGTERM TERM 2
signal SIGUSR1 USR1 3
train 2 go.jsonl train.steps=100000 --resume auto train.keep=0 train.seed=2
expect "another seed: refused" $? = 12
says "another seed: told" "train.seed is 2; the checkpoint's is 1"

# Through mpirun, which passes SIGUSR1 on.
rm -rf saved
"$mpiexec" --timeout 100 -n 2 "$muonshard" train tiny.yaml train.log=stop.jsonl train.steps=100000 >stdout 2>stderr &
job=$!
for _ in $(seq 300); do
    [ "$(grep -c '"step"' stop.jsonl 2>/dev/null)" -ge 5 ] 2>/dev/null && break
    sleep 0.1
done
kill -USR1 $job
wait $job
expect "SIGUSR1 to mpirun" $? = 4

# ---- what is not there, and what is something else ----

rm -rf saved
train 2 auto.jsonl --resume auto || failed "auto with nothing to go on from" "exit code $?"
expect "auto with nothing to go on from" "$(steps auto.jsonl)" = "$(steps whole.jsonl)"
train 2 auto.jsonl --resume auto || failed "a finished run" "exit code $?"
expect "a finished run has nothing to do" "$(steps auto.jsonl)" = "$(steps whole.jsonl)"
train 2 none.jsonl --resume nowhere
expect "a directory that is not there" $? = 15
says "a directory that is not there: told" "nowhere: no complete checkpoint in it"
train 2 none.jsonl --resume saved/step-00000024 model.width=64
expect "another model" $? = 11
says "another model: told" "tensor 0 is '.*' elementwise fp32 \[256, 32\]; registered is .*\[256, 64\]"
echo more >text/zzz.txt
train 2 none.jsonl --resume auto
expect "other text" $? = 12
says "other text: told" "data.files: other text than that of the checkpoint"
rm text/zzz.txt

# ---- a run goes on without its checkpoint ----

rm -rf saved
echo "not a directory" >saved
train 2 full.jsonl
expect "nowhere to save: exit code" $? = 15
expect "nowhere to save: the run is whole" "$(steps full.jsonl)" = "$(steps whole.jsonl)"
says "nowhere to save: told" "warning: not saved: .*/saved: cannot be read: Not a directory"

[ $failures -eq 0 ] || { echo "$failures failures"; exit 1; }
