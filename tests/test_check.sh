#!/usr/bin/env bash
# `muonshard check` from outside: all is well where it is, words and exit codes where a machine file promises too much
# or is bad; and what it finds where MPI brings wrong numbers. All it can say of such is test_check_values's.
#   test_check.sh MUONSHARD MPIEXEC [host|cuda [WRONG_MPI]]
# cuda: on a device, to whose libraries LD_LIBRARY_PATH leads. WRONG_MPI: the library made of wrong_mpi.c.
set -u
muonshard=$(realpath "$1") || exit 1
mpiexec=$2
backend=${3-host}
wrong_mpi=${4-}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OPENBLAS_NUM_THREADS=1

failures=0
failed() {
    failures=$((failures + 1))
    echo "FAIL  $1"
    sed 's/^/      /' stdout stderr | head -n 60
}
# says NAME PATTERN [FILE]: a line of the last output matches the extended regular expression
says() { if grep -qE -- "$2" "${3-stdout}"; then echo "ok    $1"; else failed "$1: no line matches $2"; fi; }
never() { if grep -qE -- "$2" stdout stderr; then failed "$1: a line matches $2"; else echo "ok    $1"; fi; }
# check CODE RANKS ARGUMENT...: under mpirun, within the minute it promises
check() {
    local code=$1 ranks=$2 got
    shift 2
    "$mpiexec" --timeout 60 -n "$ranks" "$muonshard" check backend="$backend" "$@" >stdout 2>stderr
    got=$?
    if [ $got -eq "$code" ]; then
        echo "ok    $ranks ranks, $*: exit code $code"
    else
        failed "$ranks ranks, $*: exit code $got, not $code"
    fi
}
# Nothing is wrong; whether a rank was slow is up to the machine.
right() { # RANKS
    says "$1 ranks: the last line" "^all is (well|right, but [0-9]+ warnings?): $1 ranks? on 1 host, [0-9.]+ s$"
    [ "$(tail -n 1 stdout | cut -c 1-7)" = "all is " ] || failed "$1 ranks: something after the last line"
    never "$1 ranks: no problem" "PROBLEM"
    says "$1 ranks: words" "^messages: an all-gather of 8 bytes takes .* all words arrive$"
    says "$1 ranks: matrices" "^matrices: $1 of [0-9]+ x [0-9]+; U U\^T is within [0-9.]+e-0[4-9] of 1"
    says "$1 ranks: a rate" "^Newton-Schulz: .* [0-9.e+]+ GFLOP/s \(median rank\), .*slowest, rank [0-9]+\)$"
    [ "$(grep -cE '^ +[0-9]+ +[0-9]+ +[0-9.]+ .* 0$' stdout)" -ge 2 ] || failed "$1 ranks: fewer than two sizes"
    for ((r = 0; r < $1; r++)); do says "$1 ranks: rank $r" "^ +$r +[^ ]+ +[0-9]+ +[0-9,-]+.* $backend: "; done
    [ "$(grep -c "^muonshard: backend" stderr)" -eq 1 ] || failed "$1 ranks: the backend is told not once"
}
# machine GBS US GFLOPS: a file that promises so much
machine() {
    cat >machine.yaml <<YAML
machine: promised
runs_on: $backend
newton_schulz:
  - {dtype: fp32, gflop: 1, tflops: $3}
  - {dtype: bf16, gflop: 1, tflops: $3}
links:
  - {name: wire, ranks: 4, gbs: $1, us: $2}
YAML
}

few=()
[ "$backend" = host ] || few=(--largest 1M --side 64)

if [ "$backend" = cuda ]; then
    check 0 2 "${few[@]}"
    right 2
    says "NCCL" "^tensors: moved by NCCL; every element is checked$"
    check 0 2 "${few[@]}" comm=mpi
    right 2
    says "MPI" "^tensors: moved by MPI, through memory of the host; every element is checked$"
    says "and that it is slow" "^warning: GPUs exchange tensors through memory of the host"
    check 0 1 "${few[@]}" deterministic=true ns_dtype=fp16
    right 1
    says "another dtype" "^Newton-Schulz: fp16, a matrix of 64 x 64"
    FAKE_CUDA_DEVICES=1 check 12 2 "${few[@]}"
    says "two ranks, one device" "check: .*finds 1 device|have the same device" stderr
    says "the ranks are shown all the same" "^ +1 +[^ ]+ +[0-9]+ +[0-9,-]+ +not known$"
    FAKE_CUDA_DEVICES=1 check 0 2 "${few[@]}" share_gpu=true comm=mpi
    says "a shared card is noted" "^note: rank 1 of .* has the card of another rank, 1 in all"
    machine 1e6 1e-3 1e6
    check 3 2 "${few[@]}" --machine machine.yaml --strict
    says "what to look at" "^ +look at NCCL_DEBUG=INFO"
    [ $failures -eq 0 ]
    exit
fi

for n in 1 2 4; do
    check 0 $n --largest 1M
    right $n
done
check 0 2 # as a person would call it
right 2
says "as large as said" "^ +167771[0-9]+ "
says "words about CPUs" "^note: .*(not bound|share)"
check 0 3 --largest=1M --side 48 ns_dtype=bf16 preset=gram deterministic=true ownership=balanced
right 3
says "another dtype" "^Newton-Schulz: bf16, a matrix of 48 x 48"

# An MPI that is wrong. mpirun -x: not mpirun itself.
wrong() { # FAULT CODE RANKS
    "$mpiexec" --timeout 60 -n "$3" -x LD_PRELOAD="$wrong_mpi" -x WRONG_MPI="$1" "$muonshard" check backend=host \
        --largest 1M >stdout 2>stderr
    local got=$?
    if [ $got -eq "$2" ]; then echo "ok    $1: exit code $2"; else failed "$1: exit code $got, not $2"; fi
}
if [ -n "$wrong_mpi" ]; then
    wrong nothing 0 3
    right 3
    element="elements of 'check' are wrong, the first is 0, owned by rank 0: its sum is [^ ]+ and should be [^ ]+;"
    wrong missing 19 2
    says "missing: the rank" "^PROBLEM: on rank 0 16384 of 16384 $element as if rank 1's gradient were missing from the sum$"
    says "missing: every rank has it" "^PROBLEM: on rank 1 16384 of 16384 $element"
    says "missing: of matrices" "^PROBLEM: an update is not that of its gradient"
    says "missing: the last line" "^[0-9]+ problems, [0-9]+ warnings?: 2 ranks on 1 host"
    wrong twice 19 2
    says "twice: the rank" "^PROBLEM: on rank 0 16384 of 16384 $element as if rank 1's gradient were added twice$"
    wrong swapped 19 3
    says "swapped: the slot" "^PROBLEM: on rank 0 .* owned by rank 1: .*it is what belongs in the slot of rank 2$"
    never "swapped: on no other rank" "^PROBLEM: on rank [12]"
    says "swapped: of matrices" "^PROBLEM: matrices have other bytes than on rank 0 on 2 ranks, the first is rank 1"
fi

# A machine that promises nothing is never slow; one that promises wonders is.
machine 1e-6 1e9 1e-7
check 0 2 --machine machine.yaml --largest 1M
never "nothing was promised" "^warning: .*machine.yaml expects"
machine 1e6 1e-3 1e6
check 0 2 --machine machine.yaml --largest 1M
says "latency" "^warning: a reduce-scatter of a tensor of 65536 bytes takes [0-9.]+ us at best, more than 3 times the .* machine.yaml expects"
says "bandwidth" "^warning: an all-gather of a tensor of 104[0-9]+ bytes runs at [0-9.e-]+ GB/s a rank at best; machine.yaml expects "
says "what to look at" "^ +look at which interface MPI takes .*binding"
says "messages" "^warning: an all-gather of 8 bytes took [0-9.]+ us, more than 3 times the .* machine.yaml expects"
says "Newton-Schulz" "^warning: Newton-Schulz in fp32 runs at .* on the slowest rank; machine.yaml expects"
says "the last line counts them" "^all is right, but [0-9]+ warnings: 2 ranks on 1 host"
check 3 2 --machine machine.yaml --largest 64K --strict

# Bad arguments and files: one line, nothing is run.
refused() { # CODE PATTERN RANKS ARGUMENT...
    local code=$1 pattern=$2
    shift 2
    check "$code" "$@"
    says "it says $pattern" "^muonshard check: .*$pattern" stderr
    [ "$(grep -c '^muonshard' stderr)" -eq 1 ] || failed "more lines than one"
    never "nothing was run" "^messages|^all is"
}
sed -i 's/gbs: 1e6/gsb: 1e6/' machine.yaml
refused 12 'machine.yaml:7: links: unknown word .gsb' 2 --machine machine.yaml
sed -i 's/ranks: 4, gsb/ranks: 2, gbs/' machine.yaml
refused 12 'machine.yaml: its links join 2 ranks; there are 3' 3 --machine machine.yaml
refused 15 'none.yaml' 2 --machine none.yaml
refused 11 '--largest is "1T"' 1 --largest 1T
refused 11 '--side is "0"' 1 --side 0
refused 11 'unknown option --machin' 1 --machin machine.yaml
refused 12 'ns_dtipe' 1 ns_dtipe=bf16
"$muonshard" check --help >stdout 2>stderr
says "help" "^usage: muonshard check "
"$muonshard" --help >stdout 2>stderr
says "it is in the list" "^  check +look at a new cluster"

[ $failures -eq 0 ]
