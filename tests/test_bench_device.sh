#!/usr/bin/env bash
# `muonshard bench` on a device: steps whose results are right, and a machine file that `muonshard plan` takes.
#   test_bench_device.sh MUONSHARD MPIEXEC    LD_LIBRARY_PATH leads to the device's libraries
set -u
muonshard=$(realpath "$1") mpiexec=$2
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
cat >model.yaml <<'YAML'
model: small
tensors:
  - {name: wte, role: elementwise, shape: [301, 48]}
  - {name: w, role: matrix, shape: [6, 48, 48]}
  - {name: v, role: matrix, shape: [5, 64, 48], dtype: bf16, grad_dtype: fp32}
YAML
failures=0
check() { # NAME CONDITION...
    local name=$1
    shift
    if "$@"; then echo "ok    $name"; else failures=$((failures + 1)); echo "FAIL  $name"; tail -n 20 log; fi
}
run() { # RANKS ARGUMENT...
    local ranks=$1
    shift
    "$mpiexec" --timeout 120 -n "$ranks" "$muonshard" bench "$@" backend=cuda >log 2>&1
}
for ranks in 1 2 3; do
    check "steps at $ranks ranks" run $ranks step model.yaml -n 2 -w 3 -e 64K -J step.json
    check "they ran on the device" grep -q "backend: cuda" log
    check "no number is missing" bash -c '! grep -qw -- "-*nan" log'
    check "they are right" grep -qE '"wrong": 0(\.0)?,' step.json
    check "ceilings and rates of the device" grep -qE "^# passes over memory, .*: .*momentum [0-9.]+ [0-9]+ %.* product runs at [0-9]+ GFLOP/s" log
    check "they are written, too" grep -qE '"copy_gbs": [0-9.]+,' step.json
done
check "steps of shapes" run 1 step --shapes 48x64x3 --dtype bf16 -n 2 -w 3 -e 64K -J step.json
check "they are right" grep -qE '"wrong": 0(\.0)?,' step.json
# The call only enqueues.
median() { awk -v key="\"$1\":" '$1 == key { inside = 1 } inside && $1 == "\"median\":" { print $2 + 0; exit }' step.json; }
check "time of the call" awk "BEGIN { exit !(0 < $(median host_us) && $(median host_us) < $(median step_us)) }"
check "a pass of the owner's alone" grep -qE '"update": [0-9.]+' step.json
check "nothing to copy at one rank" grep -qE '"apply": null' step.json
check "steps with a file of choices" run 1 step model.yaml -n 1 -w 1 -e 64K gemm_table=table
check "it has products" grep -qE "^[0-9]+ [0-9]+ [01] " table
check "none of them is the ceiling's, of 128 x 128" bash -c '! grep -q "^[0-9]* [0-9]* [01] [01] 128 128 128 " table'
check "calibration" run 2 --calibrate machine.yaml -n 1 -w 0 -e 64K
for text in "origin: measured" "runs_on: cuda" "collectives: ring" "dtype: tf32" "name: nccl, ranks: 2"; do
    check "the machine file has $text" grep -q "$text" machine.yaml
done
check "a plan on it" "$muonshard" plan model.yaml --ranks 1,2 --machine machine.yaml
[ $failures -eq 0 ]
