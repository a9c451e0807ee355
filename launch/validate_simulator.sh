#!/usr/bin/env bash
# How far the simulator is off: calibrates this machine at 1, 2 and 4 ranks, then measures whole steps over links of injected
# bandwidth and latency (and over none), with and without a backward pass to hide them under, and compares each with what
# `muonshard plan` says for the same machine, model and link.
#   launch/validate_simulator.sh [OUT]     OUT: a folder for what was measured (default: build/validate)
# Prints a row a run and the median error of the runs over injected links. RANKS="1 2 4" and MODELS="FILE..." change the sweep.
# Of several steps the best counts, as in the calibration: what else is on the machine only takes away.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-build/validate}
muonshard=${MUONSHARD:-$here/../build/release/launch/muonshard}
mkdir -p "$out"

model() { # NAME WIDTH LAYERS
    cat >"$out/$1.yaml" <<YAML
model: $1
preset: moonlight
ns_dtype: fp32
bucket_bytes: 4194304
batch_bytes: 4194304
tensors:
  - {name: wte, role: elementwise, shape: [8192, $2]}
  - {name: ln, role: elementwise, shape: [$3, $2]}
  - {name: qkvw, role: matrix, shape: [$3, $((3 * $2)), $2], row_splits: [$2, $2, $2]}
  - {name: attprojw, role: matrix, shape: [$3, $2, $2]}
  - {name: fcw, role: matrix, shape: [$3, $((4 * $2)), $2]}
  - {name: fcprojw, role: matrix, shape: [$3, $2, $((4 * $2))]}
YAML
}
if [ -z "${MODELS-}" ]; then
    model narrow 128 12
    model middle 256 8
    model wide 512 4
    MODELS="$out/narrow.yaml $out/middle.yaml $out/wide.yaml"
fi

# The best step, microseconds, of a result.
step_of() { awk '/"step_us"/ { on = 1 } on && /"min"/ { gsub(/[",:]/, " "); print $2; exit }' "$1"; }

: >"$out/rows"
printf '# %5s %-8s %-10s %8s | %12s %12s %8s\n' ranks model link backward measured simulated error
for ranks in ${RANKS:-1 2 4}; do
    for file in $MODELS; do
        # Anew for each model: other machines on the same hardware, and heat, change what is there to be had.
        machine=$out/machine-$ranks.yaml
        MUONSHARD_THREADS=1 "$here/run_local.sh" "$ranks" "$muonshard" bench --calibrate "$machine" -n 9 -w 2 threads=1 backend=host \
            >"$out/calibrate-$ranks.log" 2>&1
        for link in none 2,50 0.5,200 0.1,1000; do
            [ "$ranks" -gt 1 ] || [ $link = none ] || continue
            for backward in 0 100; do
                options=(--backward $backward)
                [ $link = none ] || options+=(--link $link)
                MUONSHARD_THREADS=1 "$here/run_local.sh" "$ranks" "$muonshard" bench step "$file" -n 9 -w 2 -c 0 threads=1 backend=host \
                    "${options[@]}" -J "$out/measured" >"$out/log" 2>&1 || { cat "$out/log"; exit 1; }
                "$muonshard" plan "$file" --ranks "$ranks" --machine "$machine" "${options[@]}" -J "$out/simulated" >"$out/log"
                cp "$out/measured" "$out/measured-$ranks-$(basename "$file" .yaml)-$link-$backward"
                cp "$out/simulated" "$out/simulated-$ranks-$(basename "$file" .yaml)-$link-$backward"
                name=$(basename "$file" .yaml)
                awk -v r="$ranks" -v m="$name" -v l=$link -v b=$backward -v t="$(step_of "$out/measured")" \
                    -v s="$(step_of "$out/simulated")" 'BEGIN {
                        printf "  %5d %-8s %-10s %8d | %12.1f %12.1f %7.1f%%\n", r, m, l, b, t, s, 100 * (s - t) / t }' |
                    tee -a "$out/rows"
            done
        done
    done
done

# median PATTERN: of the absolute errors of the rows that fit
median() {
    awk -v injected="$1" '($3 != "none") == injected { e = $NF + 0; print e < 0 ? -e : e }' "$out/rows" | sort -g |
        awk '{ v[NR] = $1 } END { print NR ? (NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2) : "none" }'
}
echo "# median error over injected links: $(median 1) %; over none: $(median 0) %"
