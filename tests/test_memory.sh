#!/usr/bin/env bash
# The memory `muonshard plan` predicts for a rank is what an optimizer of that model then has, within 1 %.
#   test_memory.sh MUONSHARD MPIEXEC BACKEND RANKS...
set -u
muonshard=$(realpath "$1") mpiexec=$2 backend=$3
shift 3
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
# Stacks that fill waves and leave some over, matrices of their own, 16 bits with masters, and the rest.
cat >model.yaml <<'YAML'
model: memory
bucket_bytes: 1048576
batch_bytes: 1048576
tensors:
  - {name: wte, role: elementwise, shape: [2003, 256]}
  - {name: qkv, role: matrix, shape: [5, 768, 256], row_splits: [256, 256, 256]}
  - {name: fc, role: matrix, shape: [3, 512, 256]}
  - {name: one, role: matrix, shape: [300, 200]}
  - {name: half, role: matrix, shape: [3, 256, 256], dtype: bf16, grad_dtype: fp32}
YAML
failures=0
for ranks in "$@"; do
    for keys in "" "ns_dtype=bf16 variance=normuon momentum_dtype=bf16" "deterministic=true ownership=balanced norm=spectral" "comm=${comm:-auto} gather=params"; do
        # shellcheck disable=SC2086 # words they are
        "$mpiexec" --timeout 120 -n "$ranks" "$muonshard" bench step model.yaml -n 1 -w 1 -c 0 -e 64K -J got.json threads=1 backend="$backend" $keys \
            >log 2>&1 || { cat log; exit 1; }
        # shellcheck disable=SC2086
        "$muonshard" plan model.yaml --ranks "$ranks" threads=1 backend="$backend" $keys >plan || exit 1
        # state and workspace, MiB, of the table of memory; bytes of the result
        if awk -v ranks="$ranks" '
            FNR == NR { if (/"(state|workspace|pinned)"/) { gsub(/[",:]/, " "); got[$1] = $2 / 1048576 } next }
            /^# memory a rank/ { on = 1 }
            on && /^ / && NF >= 7 && $1 == ranks { said["state"] = $4; said["workspace"] = $5; said["pinned"] = $6; on = 0 }
            END {
                for (k in got) { off = said[k] - got[k]; if (off < 0) off = -off; if (!(off <= 0.01 * got[k] + 0.006)) bad = 1
                    printf "      %s %s: %.2f MiB planned, %.2f there\n", ranks, k, said[k], got[k] }
                exit bad || length(got) != 3 }' got.json plan; then
            echo "ok    $backend, $ranks ranks: $keys"
        else
            failures=$((failures + 1))
            echo "FAIL  $backend, $ranks ranks: $keys"
        fi
    done
done
[ $failures -eq 0 ]
