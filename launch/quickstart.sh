#!/usr/bin/env bash
# From a fresh Debian to a trained model: installs, builds, trains a small GPT on two ranks with Muon and, for
# comparison, with AdamW at three learning rates; shows the curves and writes a picture. Minutes on two cores.
#   launch/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C

rates="1e-3 2e-3 4e-3" # adam.lr of the AdamW runs
ranks=2
out=out/quickstart
begin=$SECONDS
export MUONSHARD_JOB_TIMEOUT=${MUONSHARD_JOB_TIMEOUT:-1800}

say() { printf '\n== %s\n' "$*"; }

say "Packages"
launch/setup.sh build quickstart
echo "all there"

say "Build (log: build/release.log)"
mkdir -p build "$out"
if ! { cmake --preset release && cmake --build --preset release -j "$(nproc)"; } >build/release.log 2>&1; then
    tail -n 40 build/release.log >&2
    exit 1
fi
muonshard=build/release/launch/muonshard
"$muonshard" --version

# train NAME CONFIG [key=value...]: leaves $out/NAME.jsonl
train() {
    local name=$1 config=$2
    shift 2
    say "Training: $name $*"
    launch/run_local.sh $ranks "$muonshard" train "$config" "train.log=$out/$name.jsonl" "$@"
}
train muon configs/quickstart.yaml
for rate in $rates; do
    train "adamw-$rate" configs/quickstart-adamw.yaml "adam.lr=$rate"
done

# curve NAME: step, validation loss and seconds since the start of training, of every validation
curve() {
    sed -nE 's/^\{"step":([0-9]+),.*"time_s":([^,}]+).*"val_loss":([^,}]+).*/\1\t\3\t\2/p' "$out/$1.jsonl"
}
curves=$out/curves.tsv
{
    printf 'step\tMuon'
    printf '\tAdamW lr %s' $rates
    echo
    cut -f 1,2 <(curve muon) >"$out/.columns"
    for rate in $rates; do
        paste "$out/.columns" <(cut -f 2 <(curve "adamw-$rate")) >"$out/.wider"
        mv "$out/.wider" "$out/.columns"
    done
    cat "$out/.columns"
} >$curves
rm "$out/.columns"

say "Validation loss, nats per byte (every step that was evaluated: $curves)"
awk -F '\t' '
    NR == 1 { for (i = 1; i <= NF; i++) name[i] = $i; next }
    { row[++n] = $0 }
    END {
        printf "%6s", name[1]
        for (i = 2; i <= NF; i++) printf "  %13s", name[i]
        print ""
        every = int((n + 15) / 16)
        for (r = every; r <= n; r += every) {
            split(row[r], x)
            printf "%6d", x[1]
            for (i = 2; i <= NF; i++) printf "  %13.4f", x[i]
            print ""
        }
    }' $curves

# Which AdamW is best, when, and when Muon is there: BEST_LOSS BEST_STEP STEPS COLUMN MUON_STEP (0: never) MUON_BEST
read -r loss step steps column muon_step muon_loss < <(awk -F '\t' '
    NR == 1 { next }
    {
        at[NR] = $1; muon[NR] = $2; steps = $1
        for (i = 3; i <= NF; i++) if (!column || $i < best) { best = $i; step = $1; column = i }
        if (NR == 2 || $2 < lowest) lowest = $2
    }
    END {
        for (r = 2; r <= NR && !there; r++) if (muon[r] <= best) there = at[r]
        printf "%.4f %d %d %d %d %.4f\n", best, step, steps, column, there, lowest
    }' $curves)
rate=$(cut -d ' ' -f $((column - 2)) <<<"$rates")
seconds() { curve "$1" | awk -F '\t' -v step="$2" '$1 == step { printf "%.0f s", $3 }'; } # NAME STEP

say "Result"
echo "AdamW's best validation loss is $loss, at step $step of $steps ($(seconds "adamw-$rate" "$step")), with adam.lr $rate of $rates."
if [ "$muon_step" -gt 0 ]; then
    percent=$(awk "BEGIN { printf \"%.1f\", 100 * $muon_step / $step }")
    echo "Muon is there at step $muon_step ($(seconds muon "$muon_step")): $percent % of AdamW's steps. Its own best is $muon_loss."
    mark="Muon is there at step $muon_step:\\n$percent % of AdamW's steps"
else
    echo "Muon does not get there; its best is $muon_loss."
    mark="Muon does not get there"
fi

subject=$(sed -nE '1s/.*"parameters":([0-9]+),"text_bytes":([0-9]+).*/\1 \2/p' $out/muon.jsonl |
    awk -v ranks=$ranks '{ printf "GPT of %.1f million parameters, %.1f MB of text, %d ranks", $1 / 1e6, $2 / 1e6, ranks }')
picture=$out/validation.png
gnuplot -e "curves = '$curves'; picture = '$picture'; best_column = $column; best = $loss; muon_step = $muon_step" \
    -e "mark = \"$mark\"; subject = '$subject'" launch/plot_quickstart.gp
echo "Picture: $picture; logs: $out/*.jsonl; $((SECONDS - begin)) s in all"
