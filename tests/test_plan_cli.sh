#!/usr/bin/env bash
# muonshard plan from outside: figures that follow from a model's shapes alone, the printed schedule, and what it refuses.
#   test_plan_cli.sh MUONSHARD MODELS
set -u

muonshard=$(realpath "$1") || exit 1
models=$(realpath "$2") || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1

failures=0
failed() {
    failures=$((failures + 1))
    echo "FAIL  $1"
    sed 's/^/      /' stdout stderr
}
# says NAME PATTERN: a line of the last output matches the extended regular expression
says() { if grep -qE -- "$2" stdout; then echo "ok    $1"; else failed "$1: no line matches $2"; fi; }
plan() { "$muonshard" plan "$@" >stdout 2>stderr || failed "plan $*: exit code $?"; }
# refused NAME CODE PATTERN ARGUMENT...
refused() {
    local name=$1 code=$2 pattern=$3
    shift 3
    "$muonshard" plan "$@" >stdout 2>stderr
    local got=$?
    if [ $got -eq "$code" ] && [ "$(wc -l <stderr)" -eq 1 ] && grep -qF -- "$pattern" stderr && [ ! -s stdout ]; then
        echo "ok    $name"
    else
        failed "$name: exit code $got, wanted $code and one line with '$pattern'"
    fi
}

# GPT-2 124M with 50304 tokens: 124475904 parameters; 12 x (3 + 1 + 1 + 1) matrices. NS5, symmetric products at half price, a
# square C: 5 (1+1+2) C^3 flop; C x 4C: 5 (4+1+8) C^3, or in the Gram form with one restart (20 + 3 2 3) C^3.
plan "$models/gpt2-124m.yaml" --ranks 1,4,8
flop=$(awk 'BEGIN { c = 768 ^ 3; printf "%.3f", (48 * 5 * 4 + 24 * 38) * c * 1e-9 }')
says "the model, Gram" "Newton-Schulz ${flop/./\\.} GFLOP"
plan "$models/gpt2-124m.yaml" --ranks 1,4,8 ns_form=standard
flop=$(awk 'BEGIN { c = 768 ^ 3; printf "%.3f", (48 * 5 * 4 + 24 * 5 * 13) * c * 1e-9 }')
says "the model" "16 tensors, 124\.476 M parameters, 72 matrices, Newton-Schulz ${flop/./\\.} GFLOP"
# 84.9 M parameters in matrices, fp32, momentum; 39.5 M element-wise ones in 604 chunks of 65536, twice.
state() { awk -v n="$1" 'BEGIN { chunks = int((604 + n - 1) / n); printf "%.2f", (84934656 / n + 2 * chunks * 65536) * 4 / 1048576 }'; }
says "1 rank: nothing travels" "^ +1 +73 +[0-9]+ +1\.000 +0\.00 +0\.00 .* $(state 1 | sed 's/\./\\./') "
says "4 ranks" "^ +4 +19 +[0-9]+ +1\.000 +356\.25 +356\.25 .* $(state 4 | sed 's/\./\\./') "
says "8 ranks" "^ +8 .* $(state 8 | sed 's/\./\\./') "

cat >small.yaml <<'YAML'
model: small
tensors:
  - {name: w, role: matrix, shape: [4, 8, 8]}
  - {name: v, role: matrix, shape: [12, 8], row_splits: [8, 4]}
  - {name: b, role: elementwise, shape: [5]}
YAML
plan small.yaml --ranks 2 --schedule
says "a wave as it lies" "reduce-scatter bucket 0 +comm"
for operation in "measure bucket 0" agree resolve momentum orthogonalize adam all-gather apply; do
    says "$operation" " $operation"
done
awk '/^ +[0-9]+ +[a-z]/ { if ($1 != rows) bad = 1; rows++ } END { exit bad || rows <= 10 }' stdout &&
    echo "ok    operations are numbered" || failed "operations are numbered"
says "owners of a stack" "^ +w +4 matrices, ranks 0 1 0 1$"
says "owners of parts" "^ +v +2 matrices, ranks [01] [01]$"
says "owners of shards" "^ +b +element-wise, shards of ranks 0 to 0$"
plan small.yaml --ranks 2 --schedule reduce=none
says "reduce=none takes" " take bucket 0 +compute"
grep -q reduce-scatter stdout && failed "reduce=none: a reduce-scatter"

# Two stacked megaelement matrices on two ranks: each sends and receives one. fp32: momentum; 16 bits: and a master.
mega() { printf 'tensors:\n  - {name: w, role: matrix, shape: [2, 1024, 1024], %s}\n' "$1" >mega.yaml; }
mega "dtype: fp32"; plan mega.yaml --ranks 2
says "fp32" "^ +2 +1 +1 +1\.000 +4\.00 +4\.00 +0\.00 +0\.00 +4\.00 "
mega "dtype: bf16"; plan mega.yaml --ranks 2 ns_dtype=bf16 --schedule
says "bf16" "^ +2 +1 +1 +1\.000 +2\.00 +2\.00 +0\.00 +0\.00 +8\.00 "
says "its dtype in the schedule" "1 wave of bf16 1024 x 1024"
mega "dtype: fp16, grad_dtype: fp32"; plan mega.yaml --ranks 2
says "fp16, gradients in fp32" "^ +2 +1 +1 +1\.000 +4\.00 +2\.00 +0\.00 +0\.00 +8\.00 "
mega "dtype: bf16"; plan mega.yaml --ranks 2 rounding=stochastic momentum_dtype=bf16
says "no master" "^ +2 +1 +1 +1\.000 +2\.00 +2\.00 +0\.00 +0\.00 +2\.00 "

# Where gradients are reduced by the caller, no zeros are sent in the place of a missing one: 8 MiB less.
mega "dtype: fp32"; plan mega.yaml --ranks 2
with=$(awk '/^ / { print $NF; exit }' stdout)
plan mega.yaml --ranks 2 reduce=none
says "zeros" " $(awk -v w="$with" 'BEGIN { printf "%.2f", w - 8 }' | sed 's/\./\\./')$"
# A megaelement in bf16, half of it a rank's. State: m, v and master. Workspace: sums 2, what is sent 1, packed gradients 2, two
# places for what is gathered 4.
printf 'tensors:\n  - {name: b, role: elementwise, shape: [1048576], dtype: bf16}\n' >mega.yaml; plan mega.yaml --ranks 2
says "element-wise in bf16" "^ +2 +1 +1 +1\.000 +1\.00 +1\.00 +2\.00 +0\.00 +6\.00 +9\.00$"

# Squares of 32, 48 and 64 cost as 8 : 27 : 64; the best two ranks can have is 64 and 35.
cat >uneven.yaml <<'YAML'
tensors:
  - {name: a, role: matrix, shape: [32, 32]}
  - {name: b, role: matrix, shape: [48, 48]}
  - {name: c, role: matrix, shape: [64, 64]}
YAML
plan uneven.yaml --ranks 2
says "the policy" "ownership round_robin$"
plan uneven.yaml --ranks 2 ownership=balanced --schedule
says "the other policy" "ownership balanced$"
says "the largest and its mean" "^ +2 .* $(awk 'BEGIN { printf "%.3f", 64 / 49.5 }' | sed 's/\./\\./') "
says "the largest alone" "^ +c +1 matrices, ranks 0$"
says "the others together" "^ +[ab] +1 matrices, ranks 1$"

refused "no model" 11 "too few arguments"
refused "missing file" 15 "missing.yaml" missing.yaml
refused "unknown key" 12 "learning_rate" small.yaml learning_rate=1
refused "no ranks" 11 "--ranks" small.yaml --ranks 0
refused "ranks in words" 11 "--ranks" small.yaml --ranks two
refused "no machine file" 15 "h100.yaml" small.yaml --machine h100.yaml
refused "times without a machine" 11 "--link goes with --machine" small.yaml --link 1
bad() { printf 'tensors:\n  - {%s}\n' "$1" >bad.yaml; }
bad "name: w, role: matrix"; refused "no shape" 12 "bad.yaml:2: tensors: 'w' has no shape" bad.yaml
bad "name: w, shape: [2, 2]"; refused "no role" 12 "'w' has no role" bad.yaml
bad "name: w, role: moe, shape: [2, 2]"; refused "unknown role" 12 "role is 'moe'" bad.yaml
bad "name: w, role: matrix, shape: [2, -2]"; refused "negative size" 12 "shape is '2,-2'" bad.yaml
bad "name: w, role: matrix, shape: [1099511627777, 2]"; refused "a size beyond reason" 12 "shape is '1099511627777,2'" bad.yaml
bad "name: w, role: matrix, shape: [4194305, 2, 2]"; refused "more matrices than can be listed" 21 "bad.yaml:2: tensors: 'w': up to it they are" bad.yaml
printf 'tensors:\n  - ""\n' >bad.yaml; refused "an empty item" 12 "bad.yaml:2: tensors: '?' has no name" bad.yaml
bad "name: w, role: matrix, shape: [2, 2], color: red"; refused "unknown word" 12 "unknown word 'color'" bad.yaml
bad "name: w, role: matrix, shape: [7]"; refused "a vector as a matrix" 11 "1 dimensions" bad.yaml
bad "name: w, role: matrix, shape: [4, 4], row_splits: [3, 2]"; refused "splits" 11 "row split 1 is 2" bad.yaml
bad "name: w, role: matrix, shape: [4, 4], dtype: fp8"; refused "unknown dtype" 12 "dtype is 'fp8'" bad.yaml
bad "name: w, role: matrix, shape: [4, 4], grad_dtype: F32"; refused "unknown grad_dtype" 12 "grad_dtype is 'F32'" bad.yaml
bad "name: w, role: matrix, shape: [4, 4], axes: [layer]"; refused "no size left" 12 "bad.yaml:2: tensors: 'w': 1 axes and 2 sizes" bad.yaml
bad "name: w, role: matrix, shape: [4, 4, 4], axes: [expert, layer]"; refused "axes in another order" 12 "axes is 'expert,layer'" bad.yaml
printf 'expert_parallel: 3\n' >>bad.yaml; bad "name: w, role: matrix, shape: [2, 8, 4, 4], axes: [layer, expert]"
printf 'expert_parallel: 3\n' >>bad.yaml
refused "experts that can't be spread" 12 "bad.yaml:2: tensors: 'w': its 8 experts" bad.yaml --ranks 3
echo "model: empty" >bad.yaml
refused "no tensors" 12 "tensors: the model has none" bad.yaml

# A model in parts: 2 stages of 2 layers, 4 experts over 2 ranks. Of 8 ranks 4 share a stage, and 2 an expert. A rank has the
# matrices and elements of its stage, and half of the stage's experts: momentum a quarter of w, and half of its x.
cat >parts.yaml <<'YAML'
pipeline_parallel: 2
expert_parallel: 2
tensors:
  - {name: w, role: matrix, shape: [4, 256, 256], axes: [layer]}
  - {name: x, role: matrix, shape: [4, 4, 256, 256], axes: [layer, expert]}
  - {name: b, role: elementwise, shape: [262144]}
YAML
plan parts.yaml --ranks 8
says "parameters of a rank: 2 + 4 matrices, 1 MiB of the rest" "^ +8 +2\.50 +2\.50 "
says "matrices a rank: 2 / 4 and 4 / 2" "^ +8 +2\.50 +[0-9.]+ +[0-9.]+ +1\.[0-9]+$"
refused "ranks that don't divide" 11 "takes a multiple of 4" parts.yaml --ranks 6

# Machines. What a step takes on one where only Newton-Schulz does: 2 of 4 matrices of 8^3 x 20 operations at 1e6 a second.
cat >slow.yaml <<'YAML'
machine: slow
launch_us: 0
newton_schulz:
  - {dtype: fp32, gflop: 1, tflops: 1e-6}
links:
  - {name: wire, ranks: 4, gbs: 1e6, us: 0}
YAML
plan small.yaml --ranks 2,4 --machine slow.yaml -J plan.json --schedule
says "what it runs on" "^# simulated on slow \\(from datasheets\\)"
says "its links" "MiB a step"
awk '/^# simulated/ { on = 1 } on && NF == 18 && /^ +2 / { t = $5; w = $9 } on && NF == 18 && /^ +4 / { e = $NF }
    END { exit !(t > 3.0e4 && t < 3.4e4 && w <= t && e > 0.4 && e <= 1.01) }' stdout && echo "ok    times and efficiency" ||
    failed "times and efficiency"
says "where it stops" "^# scaling: "
says "when each operation runs" "^ +[0-9]+ +orthogonalize batch 0 +compute +[-0-9]+ +[0-9.]+ +[0-9.]+  "
for member in '"measured": false' '"tensors": "name=' '"schema": ' '"ranks": 4' '"kernels": "simulated"' '"timeline"'; do
    grep -qF -- "$member" plan.json && echo "ok    JSON has $member" || failed "JSON: no $member"
done
refused "more ranks than are joined" 12 "its links join 4 ranks, not 8" small.yaml --ranks 8 --machine slow.yaml
refused "a dtype without a rate" 12 "no rate of Newton-Schulz in bf16" small.yaml --ranks 2 --machine slow.yaml ns_dtype=bf16
# broken NAME TEXT SED: slow.yaml with a change is refused
broken() { sed "$3" slow.yaml >broken.yaml; refused "$1" 12 "$2" small.yaml --ranks 2 --machine broken.yaml; }
broken "an unknown key" "broken.yaml:2: unknown key 'lunch_us'" 's/launch_us/lunch_us/'
broken "a rate of nothing" "broken.yaml:4: newton_schulz: dtype has to be" 's/dtype: fp32/dtype: fp8/'
broken "a rate of 0" "broken.yaml:4: newton_schulz: gflop and tflops" 's/tflops: 1e-6/tflops: 0/'
broken "a word too many" "broken.yaml:4: newton_schulz: unknown word 'speed'" 's/tflops: 1e-6/tflops: 1, speed: 3/'
broken "a link of no ranks" "broken.yaml:6: links: ranks has to be" 's/ranks: 4, //'
broken "a link of half a rank" "broken.yaml:6: links: ranks has to be" 's/ranks: 4/ranks: 2.5/'
broken "a link without a name" "broken.yaml:6: links: a link needs a name" 's/name: wire, //'
broken "a link that joins no more" "broken.yaml:7: links: ranks has to be a multiple" '$a\  - {name: two, ranks: 6, gbs: 1, us: 1}'
broken "no rates" "newton_schulz has no rates" '/newton_schulz\|dtype/d'
broken "a setting of the optimizer" "'lr' is a setting of the optimizer" '$a\lr: 3'
broken "malformed YAML" "broken.yaml:" '$a\  - {name'
for model in "$models"/*.yaml; do
    for machine in "$models"/../machines/*.yaml; do
        plan "$model" --ranks 4096 --machine "$machine" ns_dtype=bf16
        says "$(basename "$model") on $(basename "$machine")" "^ +4096 .*"
    done
done

[ $failures -eq 0 ] || { echo "$failures failures"; exit 1; }
