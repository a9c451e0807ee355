#!/usr/bin/env bash
# What the compiler made of the kernel of tiles: registers, spills, and instructions that matter, a line a kernel; with a
# folder as second argument the listings are left there.
#   tests/gpu/sass.sh [NVDISASM] [FOLDER]   NVDISASM: of the toolkit, or of a Python package that brings one
# Fails where a kernel spills, or where products wait for each other.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
nvdisasm=${1:-nvdisasm} folder=${2:-$(mktemp -d)}
[ $# -ge 2 ] || trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder"
nvcc -std=c++17 -O3 -fmad=false -arch=sm_90a -Isrc -Iinclude -Xptxas -v -cubin src/kernels/cuda_tile_kernel.cu \
    -o "$folder/tiles.cubin" 2>"$folder/ptxas.txt"
"$nvdisasm" -c "$folder/tiles.cubin" >"$folder/tiles.sass"
printf '%-36s %9s %7s %12s' kernel registers spilled instructions
counted="HGMMA UTMALDG UTMASTG STSM LDL STL MEMBAR"
# shellcheck disable=SC2086 # words they are
printf ' %7s' $counted
echo ' loop'
# The loop that multiplies: from the last label before the first HGMMA that a branch behind the last HGMMA goes to.
awk -v counted="$counted" '
    FILENAME ~ /ptxas/ {
        if (/Compiling entry/) { match($0, /tile_kernelI[A-Za-z0-9]*/); name = substr($0, RSTART, RLENGTH) }
        if (/bytes stack frame/) spilled[name] = $5 + $9
        if (/Used [0-9]+ registers/) { match($0, /Used [0-9]+/); registers[name] = substr($0, RSTART + 5, RLENGTH - 5) }
        next
    }
    /\.section[ \t]*\.text\./ { match($0, /tile_kernelI[A-Za-z0-9]*/); name = substr($0, RSTART, RLENGTH); names[++kernels] = name; next }
    /^\.L_x_/ { label[name] = $1; sub(/:.*/, "", label[name]); place[name, label[name]] = total[name] + 0 }
    /^[ \t]*\/\*[0-9a-f]+\*\// {
        sub(/^[ \t]*\/\*[0-9a-f]+\*\/[ \t]*/, "")
        sub(/^@!?U?P[0-9T]+ /, "")
        operation = $1; sub(/[.;].*/, "", operation)
        total[name]++
        count[name, operation]++
        if (operation == "HGMMA") { last[name] = total[name]; if (!((name) in first)) first[name] = total[name] }
        if (operation == "BRA" && (name in last) && !(name in loop)) {
            match($0, /\.L_x_[0-9]+/); to = substr($0, RSTART, RLENGTH)
            if (((name, to) in place) && place[name, to] < first[name]) loop[name] = total[name] - place[name, to]
        }
    }
    END {
        split(counted, words, " ")
        for (k = 1; k <= kernels; k++) {
            n = names[k]; match(n, /ILi[0-9]+/); text = substr(n, RSTART + 3, RLENGTH - 3)
            match(n, /E(Lb[01]E)+/); bits = substr(n, RSTART, RLENGTH); gsub(/[^01]/, "", bits)
            text = text " columns, " (substr(bits, 1, 1) == 1 ? "bf16" : "fp16") (substr(bits, 2, 1) == 1 ? ", a turned" : "") (substr(bits, 3, 1) == 1 ? ", b turned" : "")
            printf "%-36s %9d %7d %12d", text, registers[n], spilled[n], total[n]
            for (w = 1; w in words; w++) printf " %7d", count[n, words[w]]
            printf " %4d\n", loop[n]
            bad = bad || spilled[n]
        }
        exit bad || kernels != 12
    }' "$folder/ptxas.txt" "$folder/tiles.sass"
if grep -i 'wgmma.*serialized' "$folder/ptxas.txt"; then exit 1; fi
