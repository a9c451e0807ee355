#!/usr/bin/env bash
# `muonshard train` on a device beside the host: the same text, model, batches and steps, so the same losses to the
# rounding of fp32, whatever the number of ranks.
#   test_train_device.sh MUONSHARD MPIEXEC    LD_LIBRARY_PATH leads to the device's libraries
set -u
muonshard=$1 mpiexec=$2
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
for i in $(seq 1 400); do echo "line $i of a text that says $((i * i % 97)) and $((i * 31 % 89))"; done >"$work/text.txt"

run() { # BACKEND RANKS KEY=VALUE...
    local backend=$1 ranks=$2
    shift 2
    "$mpiexec" --timeout 120 -n "$ranks" "$muonshard" train "$work/config.yaml" backend="$backend" train.log="$work/$backend.jsonl" "$@" \
        >"$work/$backend.log" 2>&1 || { cat "$work/$backend.log"; exit 1; }
}
cat >"$work/config.yaml" <<'EOF'
model: {layers: 2, width: 24, heads: 3, context: 17}
train: {steps: 10, batch: 4, warmup: 2, eval_every: 5, eval_windows: 5}
preset: moonlight
ns_dtype: fp32
clip_norm: 1.0
lr: 0.01
EOF
echo "data: {files: [$work/text.txt]}" >>"$work/config.yaml"

# loss FILE: train and validation losses, in order
losses() { grep -oE '"(train|val)_loss": ?[0-9.]+' "$1" | grep -oE '[0-9.]+$'; }
failures=0
for case in "1" "2" "1 model.tied=true train.micro_batch=2" "2 cuda_graphs=false deterministic=true" \
    "2 model.params=bf16"; do
    tolerance=2e-6
    case $case in *bf16*) tolerance=1e-4 ;; esac # a parameter may round to its other neighbour
    # shellcheck disable=SC2086 # words they are
    run host $case
    # shellcheck disable=SC2086
    run cuda $case
    count=$(losses "$work/host.jsonl" | wc -l)
    if [ "$count" -ge 12 ] && paste <(losses "$work/host.jsonl") <(losses "$work/cuda.jsonl") |
        awk -v most_allowed=$tolerance '{ d = ($1 - $2) / $1; if (!(d < most_allowed && d > -most_allowed) || NF != 2) bad = 1; if (d < 0) d = -d; if (d > most) most = d }
            END { printf "      losses differ by %.1e\n", most; exit bad }'; then
        echo "ok    ranks and keys: $case"
    else
        failures=$((failures + 1))
        echo "FAIL  ranks and keys: $case ($count losses)"
        paste <(losses "$work/host.jsonl") <(losses "$work/cuda.jsonl")
    fi
done
# What was saved goes on: on a device to the bit, and from the host there and back. A run from FIRST goes on with SECOND.
go_on() { # FIRST SECOND RANKS RANKS
    rm -rf "$work/saved"
    run "$2" "$4" train.save="$work/saved" train.save_every=4 train.keep=0
    cp "$work/$2.jsonl" "$work/whole.jsonl"
    rm -rf "$work/saved"
    run "$1" "$3" train.save="$work/saved" train.save_every=4 train.keep=0
    rm -rf "$work/saved/step-00000008" "$work/saved/step-00000010"
    run "$2" "$4" train.save="$work/saved" --resume auto
    sed -n '/resumed_after":4/,$p' "$work/$2.jsonl" >"$work/after.jsonl"
    paste <(losses "$work/whole.jsonl" | tail -n "$(losses "$work/after.jsonl" | wc -l)") <(losses "$work/after.jsonl") |
        awk -v bits="$([ "$1$3" = "$2$4" ] && echo 1 || echo 0)" '
            { d = ($1 - $2) / $1; if (!(d < 2e-6 && d > -2e-6) || NF != 2 || (bits && $1 != $2)) bad = 1; n++ } END { exit bad || n < 6 }'
}
for case in "cuda cuda 2 2" "cuda cuda 1 1" "host cuda 2 2" "cuda host 1 2" "host cuda 4 2"; do
    # shellcheck disable=SC2086
    if go_on $case; then
        echo "ok    saved and continued: $case"
    else
        failures=$((failures + 1))
        echo "FAIL  saved and continued: $case"
        cat "$work/whole.jsonl" "$work/after.jsonl"
    fi
done
grep -q "backend: cuda" "$work/cuda.log" || { failures=$((failures + 1)); echo "FAIL  the log does not name the backend"; }
[ $failures -eq 0 ]
