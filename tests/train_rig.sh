# What test_train.sh and test_resume.sh begin with, who source it: the command, ranks, a place to work in, and a tally.
muonshard=$(realpath "$1") || exit 1
mpiexec=${2:-mpirun}
export OPENBLAS_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1

failures=0
passed() { echo "ok    $1"; }
failed() { # NAME WHY
    failures=$((failures + 1))
    echo "FAIL  $1: $2"
    sed 's/^/      stderr: /' stderr
}
