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
    check "steps at $ranks ranks" run $ranks step model.yaml -n 2 -w 3 -J step.json
    check "they ran on the device" grep -q "backend: cuda" log
    check "they are right" grep -qE '"wrong": 0(\.0)?,' step.json
done
check "calibration" run 2 --calibrate machine.yaml -n 1 -w 0 -e 64K
for text in "origin: measured" "runs_on: cuda" "collectives: ring" "dtype: tf32" "name: nccl, ranks: 2"; do
    check "the machine file has $text" grep -q "$text" machine.yaml
done
check "a plan on it" "$muonshard" plan model.yaml --ranks 1,2 --machine machine.yaml
[ $failures -eq 0 ]
