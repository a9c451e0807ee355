#!/usr/bin/env bash
# A rank that is killed or stopped while it trains: the job ends by the deadline, with one line that says who was where.
#   mpi_faults.sh MUONSHARD [MPIEXEC]
set -u

muonshard=$(realpath "$1") || exit 1
mpiexec=${2:-mpirun}
export OPENBLAS_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
deadline=3

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
mkdir text
seq 1 60000 >text/numbers.txt
cat >endless.yaml <<YAML
preset: jordan
timeout: $deadline
first_timeout: $deadline
model: {layers: 2, width: 32, heads: 2, context: 32}
data: {files: ["text/*.txt"], val_fraction: 0.1}
train: {steps: 1000000, batch: 12, eval_every: 1000000, log: log.jsonl, progress: off}
YAML

failures=0
failed() {
    failures=$((failures + 1))
    echo "FAIL  $1"
    sed 's/^/      stderr: /' stderr
}

# pid_of RANK: of the job started by this script's $job
pid_of() {
    local pid
    for pid in $(pgrep -f "^$muonshard train endless.yaml"); do
        if tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -qx "OMPI_COMM_WORLD_RANK=$1" &&
            [ "$(readlink "/proc/$pid/cwd")" = "$(realpath "$work")" ]; then
            echo "$pid"
        fi
    done
}

steps() { grep -c '"step"' log.jsonl 2>/dev/null; }

# fault NAME SIGNAL RANK RANKS EXPECTED_CODE (- : any but 0)
fault() {
    local name=$1 signal=$2 rank=$3 ranks=$4 expected=$5 job pid code start waited
    rm -f log.jsonl
    "$mpiexec" --timeout 60 -n "$ranks" "$muonshard" train endless.yaml >stdout 2>stderr &
    job=$!
    for _ in $(seq 300); do
        [ "$(steps || true)" != "" ] && [ "$(steps)" -ge 5 ] && break
        sleep 0.1
    done
    pid=$(pid_of "$rank")
    if [ -z "$pid" ]; then
        failed "$name: rank $rank was not found"
        kill $job
        return
    fi
    start=$(date +%s)
    kill "-$signal" "$pid"
    wait $job
    code=$?
    waited=$(($(date +%s) - start))
    [ $waited -le $((deadline + 5)) ] || failed "$name: the job ended after $waited s"
    if [ "$expected" = - ]; then
        [ $code -ne 0 ] || failed "$name: exit code 0"
    else
        [ $code -eq "$expected" ] || failed "$name: exit code $code, wanted $expected"
        [ "$(grep -c '^muonshard: rank ' stderr)" -eq 1 ] || failed "$name: not one line of ours"
        grep -q "^muonshard: rank .* of $ranks .*: .*: no completion within $deadline s.*rank $rank: .*(stopped)" stderr ||
            failed "$name: the line does not say who was where"
    fi
    sleep 0.3
    [ -z "$(pid_of 0)$(pid_of 1)$(pid_of 2)" ] || failed "$name: processes are left"
    echo "ok    $name: ended after $waited s with $code: $(grep -m1 '^muonshard: rank ' stderr)"
}

fault "rank 1 of 2 stopped" STOP 1 2 18
fault "rank 0 of 3 stopped" STOP 0 3 18
fault "rank 2 of 3 killed" KILL 2 3 -
fault "rank 0 of 2 killed" KILL 0 2 -
[ $failures -eq 0 ] || { echo "$failures failures"; exit 1; }
