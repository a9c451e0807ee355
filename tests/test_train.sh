#!/usr/bin/env bash
# muonshard train from outside: the same run on any number of ranks, its log, and what it refuses.
#   test_train.sh MUONSHARD [MPIEXEC]
set -u

configs=$(realpath "$(dirname "$0")/../configs") || exit 1
# shellcheck source=tests/train_rig.sh
. "$(dirname "$0")/train_rig.sh"

mkdir text
for i in $(seq 1 2000); do
    echo "Line $i: $((i * 7919 % 1009)) green bottles hang on wall number $((i % 12))."
done >text/bottles.txt
cat >tiny.yaml <<'YAML'
preset: jordan
ns_dtype: fp32
adam.lr: 3e-3
model: {layers: 2, width: 32, heads: 2, context: 32}
data: {files: ["text/*.txt"], val_fraction: 0.1}
train: {steps: 30, batch: 12, warmup: 3, eval_every: 10, eval_windows: 20}
YAML

train() { # RANKS LOG [key=value...]
    local n=$1 log=$2
    shift 2
    "$mpiexec" --timeout 100 -n "$n" "$muonshard" train tiny.yaml train.log="$log" "$@" >stdout 2>stderr
}

# field LOG KEY: "step value" of every line that has it
field() { sed -n "s/^{\"step\":\([0-9]*\),.*\"$2\":\([^,}]*\).*/\1 \2/p" "$1"; }

# near NAME LOG LOG KEY BOUND COUNT: as many values, relative differences of at most BOUND
near() {
    local worst
    worst=$(join <(field "$2" "$4" | sort) <(field "$3" "$4" | sort) | awk '
        { d = ($2 - $3) / $2; d = d < 0 ? -d : d; if (d > w) w = d; n++ }
        END { printf "%d %.9f", n, w }')
    if [ "${worst% *}" -eq "$6" ] && awk "BEGIN { exit !(${worst#* } <= $5) }"; then
        passed "$1 (${worst#* })"
    else
        failed "$1" "lines and largest difference: $worst, allowed $6 and $5"
    fi
}

for n in 1 2 3 4; do
    train $n $n.jsonl || failed "$n ranks" "exit code $?"
    [ "$(wc -l <$n.jsonl)" -eq 31 ] || failed "$n ranks" "not 31 lines in the log"
done
head -1 2.jsonl | grep -q '^{"run":{.*"ranks":2,.*adam' && passed "the run's own line" ||
    failed "the run's own line" "$(head -1 2.jsonl)"
for n in 2 3 4; do
    near "$n ranks, loss" 1.jsonl $n.jsonl train_loss 1e-3 30
    near "$n ranks, validation" 1.jsonl $n.jsonl val_loss 1e-3 3
    near "$n ranks, gradient norm" 1.jsonl $n.jsonl grad_norm 1e-2 30
    # Before the first step only the order of sums differs.
    near "$n ranks, first loss" <(sed -n 2p 1.jsonl) <(sed -n 2p $n.jsonl) train_loss 1e-6 1
done
train 2 micro.jsonl train.micro_batch=2 || failed "micro-batches" "exit code $?"
near "micro-batches" 2.jsonl micro.jsonl train_loss 1e-3 30
train 2 again.jsonl || failed "again" "exit code $?"
near "again, to the bit" 2.jsonl again.jsonl train_loss 0 30
train 2 seed.jsonl train.seed=2 || failed "other seed" "exit code $?"
field 2.jsonl train_loss >one
field seed.jsonl train_loss >two
cmp -s one two && failed "other seed" "the same losses" || passed "other seed"

# The first loss is ln 256 = 5.55; tied, logits start with variance 1, which adds a half.
train 1 adamw.jsonl train.optimizer=adamw model.tied=true || failed "adamw, tied" "exit code $?"
for log in 2 adamw; do
    field $log.jsonl train_loss | awk 'NR == 1 { a = $2 } { b = $2 } END { exit !(a > 5.4 && a < 6.3 && b < 3.8) }' &&
        passed "$log learns" || failed "$log learns" "$(field $log.jsonl train_loss | tail -1)"
done
field 2.jsonl lr_factor | awk '
    $1 == 1 { a = $2 } $1 == 3 { b = $2 } $1 == 4 { c = $2 } $1 == 17 { d = $2 } $1 == 30 { e = $2 }
    END { exit !(a < .334 && a > .333 && b == 1 && c == 1 && d > .549 && d < .551 && e == .1) }' &&
    passed "schedule" || failed "schedule" "$(field 2.jsonl lr_factor | tr '\n' ' ')"

# Rules. same NAME LOG LOG: the same losses to the bit
same() { near "$1" "$2" "$3" train_loss 0 30; }
says() { grep -qF -- "$2" stderr && passed "$1" || failed "$1" "no \"$2\""; }
grep -q "^# tensor" stderr && failed "no rules, no table" "there is one" || passed "no rules, no table"
train 2 rule.jsonl "groups=match=*qkv* role=matrix" || failed "a rule" "exit code $?"
same "what a rule does not say stays" 2.jsonl rule.jsonl
says "the table" "fp32   matrix              6  1: match=*qkv*"
says "the table without a rule" "fp32   elementwise         -  none"
train 2 rule.jsonl "groups=match=* role=elementwise" || failed "all by AdamW" "exit code $?"
train 2 all.jsonl train.optimizer=adamw || failed "adamw" "exit code $?"
same "a rule for all is train.optimizer=adamw" rule.jsonl all.jsonl
train 2 rule.jsonl train.optimizer=adamw "groups=dims=3 role=matrix" || failed "all by rule" "exit code $?"
same "and back" 2.jsonl rule.jsonl
train 2 rule.jsonl train.optimizer=adamw "groups=match=* role=elementwise lr=2e-3 lr_schedule=0:1,end:0" ||
    failed "schedule of a rule" "exit code $?"
train 2 all.jsonl train.optimizer=adamw adam.lr=2e-3 "lr_schedule=0:1 30:0" || failed "schedule" "exit code $?"
same "a schedule for all, which ends with the steps" rule.jsonl all.jsonl
train 2 all.jsonl train.optimizer=adamw adam.lr=2e-3 || failed "no schedule" "exit code $?"
cmp -s <(field rule.jsonl train_loss) <(field all.jsonl train_loss) && failed "the schedule has no effect" "same losses"
train 1 frozen.jsonl "groups=match=* role=frozen" || failed "frozen" "exit code $?"
field frozen.jsonl val_loss | awk 'NR == 1 { a = $2 } $2 != a { bad = 1 } END { exit bad || NR != 3 }' &&
    passed "frozen does not move" || failed "frozen does not move" "$(field frozen.jsonl val_loss | tr '\n' ' ')"
train 2 flat.jsonl "groups=dims=3 role=matrix form=flatten" train.steps=4 || failed "flattened" "exit code $?"
says "row splits go with their form" "matrix              1  1: dims=3 form=flatten"

# refused NAME CODE PATTERN COMMAND...: that exit code, and one line of ours on stderr with the pattern in it
refused() {
    local name=$1 code=$2 pattern=$3
    shift 3
    "$@" >stdout 2>stderr
    local got=$?
    if [ $got -ne "$code" ]; then
        failed "$name" "exit code $got, not $code"
    elif [ "$(grep -v '^muonshard: ' stderr | grep -c '^muonshard')" -ne 1 ]; then
        failed "$name" "not one line on stderr"
    elif ! grep '^muonshard train: ' stderr | grep -qF -- "$pattern"; then
        failed "$name" "no \"$pattern\""
    else
        passed "$name"
    fi
}
two() { "$mpiexec" --timeout 60 -n 2 "$muonshard" train "$@"; }

grep -v data: tiny.yaml >nodata.yaml
refused "no config" 11 "too few arguments" two
refused "two configs" 11 "unexpected argument b.yaml" two tiny.yaml b.yaml
refused "unknown option" 11 "unknown option --config" two --config=tiny.yaml
refused "missing config" 15 "missing.yaml" two missing.yaml
refused "unknown key" 12 "train.stepz" two tiny.yaml train.stepz=3
refused "out of range" 12 "model.layers" two tiny.yaml model.layers=0
refused "uneven batch" 12 "train.batch: 7 sequences" two tiny.yaml train.batch=7
refused "uneven micro-batch" 12 "train.micro_batch" two tiny.yaml train.micro_batch=5
refused "warm-up only" 12 "train.warmup" two tiny.yaml train.warmup=30
refused "a bad rule" 12 'groups: rule 1 (dims=1) makes tensor' two tiny.yaml "groups=dims=1 role=matrix"
refused "an unknown word" 12 'groups: rule 1: unknown word "group"' two tiny.yaml "groups=dims=1 role=matrix group=1"
refused "width and heads" 12 "multiple of the heads" two tiny.yaml model.heads=3
refused "no text" 12 "no file matches nothing/*" two tiny.yaml "data.files=nothing/*"
refused "empty list" 12 "data.files is empty" two nodata.yaml
refused "little text" 12 "data.val_fraction" two tiny.yaml model.context=20000
refused "log" 15 "no/such/log" two tiny.yaml train.log=no/such/log
refused "threads" 11 "MUONSHARD_THREADS" env MUONSHARD_THREADS=none "$mpiexec" -n 1 --timeout 60 "$muonshard" train tiny.yaml
mkdir -p here/text there/text
cp text/bottles.txt here/text
sed '$s/green/brown/' text/bottles.txt >there/text/bottles.txt
refused "other text on a rank" 17 "rank 1 reads other text" "$mpiexec" --timeout 60 \
    --wdir "$work/here" -n 1 "$muonshard" train "$work/tiny.yaml" : \
    --wdir "$work/there" -n 1 "$muonshard" train "$work/tiny.yaml"
refused "diverged" 23 "20 steps in a row were skipped" two tiny.yaml train.steps=60 train.log=diverged.jsonl lr=1e6 weight_decay=1e6
grep -q '"train_loss":null.*"skipped":true' diverged.jsonl && passed "skips are logged" ||
    failed "skips are logged" "$(tail -1 diverged.jsonl)"
refused "diverged, three skips" 23 "3 steps in a row were skipped" two tiny.yaml train.steps=60 lr=1e6 weight_decay=1e6 train.max_skipped=3
train 2 never.jsonl lr=1e6 weight_decay=1e6 train.max_skipped=0 && [ "$(tail -21 never.jsonl | grep -c '"skipped":true')" -eq 21 ] &&
    passed "diverged, never given up" || failed "diverged, never given up" "$(tail -1 never.jsonl)"

# The file a person with eight GPUs starts from, on less of everything.
"$mpiexec" --timeout 100 -n 2 "$muonshard" train "$configs/gpt2-124m.yaml" model.layers=1 model.width=24 model.heads=3 model.context=17 \
    "data.files=text/*.txt" data.val_fraction=0.1 train.steps=4 train.batch=4 train.micro_batch=2 train.warmup=1 train.eval_windows=4 \
    train.log=gpt2.jsonl >stdout 2>stderr && [ "$(grep -c train_loss gpt2.jsonl)" -ge 4 ] && passed "configs/gpt2-124m.yaml" ||
    failed "configs/gpt2-124m.yaml" "$(tail -1 stdout)"

"$muonshard" train --help >stdout 2>stderr && grep -q 'train.batch' stdout && grep -q 'ns_steps' stdout &&
    passed "help" || failed "help" "$(wc -l <stdout) lines"

[ $failures -eq 0 ] || { echo "$failures failures"; exit 1; }
