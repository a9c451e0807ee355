#!/usr/bin/env bash
# Lets libFuzzer look for input that breaks what must hold: tests/fuzz/run.sh [SECONDS [TARGET...]]
# SECONDS (3600) for each target, one after the other; without TARGETs all of them. What it learns stays in build/fuzz/work/TARGET/,
# where a later run goes on; inputs that broke something are in build/fuzz/found/TARGET/. Needs clang and its runtime (Debian: clang,
# libclang-rt-14-dev).
# The exit code is not 0 when something was found.
#   tests/fuzz/run.sh --keep [TARGET...]   adds to the corpora in the repository what the work directories cover beyond them, as far
#                                          as it is little
set -euo pipefail
cd "$(dirname "$0")/../.."
export LC_ALL=C OPENBLAS_NUM_THREADS=1
export UBSAN_OPTIONS=print_stacktrace=1:${UBSAN_OPTIONS-} ASAN_OPTIONS=allocator_may_return_null=1:${ASAN_OPTIONS-}

keep=
seconds=3600
if [ "${1-}" = --keep ]; then keep=1; shift; elif [ $# -gt 0 ]; then seconds=$1; shift; fi
targets=("$@")
if [ $# -eq 0 ]; then
    mapfile -t targets < <(basename -s .c -a tests/fuzz/fuzz_*.c | grep -v '^fuzz_files$' | sed 's/^fuzz_//')
fi

mkdir -p build/fuzz
if ! { cmake --preset fuzz && cmake --build --preset fuzz -j "$(nproc)"; } >build/fuzz.log 2>&1; then
    tail -n 40 build/fuzz.log >&2
    exit 1
fi

longest_input() {
    case $1 in
    calls | schedule) echo 512 ;;
    *) echo 4096 ;;
    esac
}

# Words worth trying: the keys of the configuration, as its page has them, and those of a file beside the target.
words_of() { # TARGET
    case $1 in
    config) sed -n 's/^| `\([a-z0-9_.]*\)` |.*/"\1"/p' docs/config.md ;;
    *) cat "tests/fuzz/$1.dict" 2>/dev/null || true ;;
    esac
}

# An input of 4 kB that takes ten seconds, or half a gigabyte, is a finding too.
fuzz() { # TARGET
    local work=build/fuzz/work/$1 found=build/fuzz/found/$1 log=build/fuzz/$1.log before after
    mkdir -p "$work" "$found"
    before=$(find "$found" -type f | wc -l)
    words_of "$1" >"build/fuzz/$1.dict"
    # shellcheck disable=SC2046 # two words or none
    "build/fuzz/tests/fuzz_$1" -max_total_time="$seconds" -max_len="$(longest_input "$1")" -timeout=10 -rss_limit_mb=2048 \
        -malloc_limit_mb=512 -print_final_stats=1 -artifact_prefix="$found/" \
        $([ -s "build/fuzz/$1.dict" ] && echo "-dict=build/fuzz/$1.dict") "$work" "tests/fuzz/corpus/$1" >"$log" 2>&1 || true
    after=$(find "$found" -type f | wc -l)
    printf '%-12s %12s executions %8s a second %6s edges, %d found\n' "$1" \
        "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")" \
        "$(sed -n 's/^stat::average_exec_per_sec: *//p' "$log")" \
        "$(grep -o 'cov: [0-9]*' "$log" | tail -n 1 | cut -d ' ' -f 2)" $((after - before))
    [ "$after" -eq "$before" ] && grep -q '^stat::' "$log" || { tail -n 40 "$log"; return 1; }
}

# Of what the work directory covers beyond the corpus, the inputs that add most edges: at most 40, and 24 kB.
keep() { # TARGET
    local corpus=tests/fuzz/corpus/$1 merged=build/fuzz/merged/$1 control=build/fuzz/$1.merge
    rm -rf "$merged" "$control"
    mkdir -p "${merged%/*}"
    cp -r "$corpus" "$merged"
    "build/fuzz/tests/fuzz_$1" -merge=1 -use_counters=0 -max_len=2048 -merge_control_file="$control" "$merged" \
        "build/fuzz/work/$1" >"build/fuzz/$1.merge.log" 2>&1
    awk 'NR == 1 { n = $1 } NR > 2 && NR < n + 3 { name[NR - 3] = $0 } $1 == "FT" { print NF - 2, name[$2] }' "$control" |
        grep " build/fuzz/work/" | sort -rn | awk 'NR <= 40' | while read -r _ input; do
            size=$(wc -c <"$input")
            total=$((${total-0} + size))
            [ "$total" -gt 24000 ] || [ "$size" -eq 0 ] || cp "$input" "$corpus/"
        done
    printf '%-12s %4d files, %7d bytes\n' "$1" "$(find "$corpus" -type f | wc -l)" \
        "$(find "$corpus" -type f -printf '%s\n' | awk '{ n += $1 } END { print n + 0 }')"
}

failed=0
for target in "${targets[@]}"; do
    if [ -n "$keep" ]; then keep "$target"; else fuzz "$target" || failed=1; fi
done
exit $failed
