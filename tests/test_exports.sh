#!/usr/bin/env bash
# The ABI: what the libraries export is what the headers declare, with a version on each; every declaration has its
# comment; and nothing in the libraries ends the process, prints, or starts MPI.
#   test_exports.sh LIBMUONSHARD LIBMUONSHARD_MPI SOURCE_DIR [LIBMUONSHARD_CUDA [LIBMUONSHARD_GPT_CUDA]]
set -u

core=$1 mpi=$2 include=$3/include cuda=${4-} gpt=${5-}
export LC_ALL=C
failures=0
# same NAME EXPECTED FOUND
same() {
    local difference
    if [ -n "$2" ] && difference=$(diff <(sort -u <<<"$2") <(sort -u <<<"$3")); then
        echo "ok    $1"
    else
        failures=$((failures + 1))
        printf 'FAIL  %s\n%s\n' "$1" "$difference"
    fi
}

# declared VERSION_NODE HEADER: the functions of a header as name@@VERSION_NODE
declared() {
    sed 's/^#.*//; s/[*]/ /g' "$2" | tr '\n' ' ' | grep -oE 'MUONSHARD_API [^;(]*\(' |
        sed -E "s/.*[ ]([a-z_]+) *\($/\1@@$1/"
}
# exported LIBRARY: name@@VERSION_NODE of every symbol it defines; the nodes themselves (A) are left out
exported() { nm -D --defined-only "$1" | awk '$2 != "A" { print $3 }'; }
# imported LIBRARY: names it takes from others
imported() { nm -D --undefined-only "$1" | awk '{ sub(/@.*/, "", $2); print $2 }'; }

node=MUONSHARD_$(awk '/define MUONSHARD_VERSION_MAJOR/ { a = $3 } /define MUONSHARD_VERSION_MINOR/ { b = $3 }
    END { print a "." b }' "$include/muonshard.h")
# What libmuonshard_mpi of the same version takes from inside has a prefix and a node of its own.
same "libmuonshard exports its header" "$(declared "$node" "$include/muonshard.h")" \
    "$(exported "$core" | grep -v '^muonshard_private_[a-z_]*@@MUONSHARD_PRIVATE$')"
same "libmuonshard_mpi exports its header" \
    "$(declared "${node/MUONSHARD/MUONSHARD_MPI}" "$include/muonshard_mpi.h")" "$(exported "$mpi")"

# none NAME LIBRARY PATTERN: it imports nothing of the kind
none() {
    local names
    names=$(imported "$2")
    [ -n "$names" ] || names="nothing: cannot be"
    same "$1" none "$(grep -E "^($3|nothing: .*)$" <<<"$names" || echo none)"
}
ends='exit|_exit|_Exit|quick_exit|abort|__assert_fail|raise|kill'
prints='printf|__printf_chk|vprintf|puts|putchar|perror|stdout|stderr'
none "libmuonshard ends no process" "$core" "$ends"
none "libmuonshard prints nothing" "$core" "$prints"
none "libmuonshard sets no BLAS threads" "$core" 'openblas_set_.*|goto_set_.*|omp_set_.*'
none "libmuonshard has no MPI and no CUDA in it" "$core" 'P?MPI_.*|cu[A-Z].*|cuda.*|nccl.*'
# muonshard_mpi_abort may: with _exit, where MPI_Abort hangs.
none "libmuonshard_mpi ends no process but where it is asked to" "$mpi" "${ends/_exit|/}"
none "libmuonshard_mpi neither starts nor ends MPI" "$mpi" 'P?MPI_(Init|Init_thread|Finalize|Session_.*)'
same "libmuonshard stands on" "libc.so.6 libjansson.so.4 libm.so.6 libopenblas.so.0 libxxhash.so.0 libyaml-0.so.2" \
    "$(objdump -p "$core" | awk '$1 == "NEEDED" { print $2 }' | sort | paste -sd' ')"

if [ -n "$cuda" ]; then
    same "libmuonshard_cuda exports one symbol" muonshard_cuda_plugin "$(exported "$cuda")"
    none "libmuonshard_cuda ends no process" "$cuda" "$ends"
    none "libmuonshard_cuda prints nothing" "$cuda" "$prints"
    none "libmuonshard_cuda needs neither MPI nor libmuonshard nor the driver's own library" "$cuda" \
        'P?MPI_.*|muonshard_.*|cu[A-Z].*'
    none "libmuonshard_cuda waits for no whole device" "$cuda" 'cudaDeviceSynchronize|cudaMemcpy|cudaMemset'
fi

if [ -n "$gpt" ]; then
    same "libmuonshard_gpt_cuda exports one symbol" muonshard_gpt_cuda "$(exported "$gpt")"
    # nvcc gives device functions that are templates a host's body that would exit; nobody calls it.
    none "libmuonshard_gpt_cuda ends no process" "$gpt" "${ends#exit|}"
    none "libmuonshard_gpt_cuda prints nothing" "$gpt" "$prints"
    none "libmuonshard_gpt_cuda needs neither MPI nor libmuonshard nor the driver's own library" "$gpt" \
        'P?MPI_.*|muonshard_.*|cu[A-Z].*'
    none "libmuonshard_gpt_cuda waits for no whole device" "$gpt" 'cudaDeviceSynchronize|cudaMemcpy|cudaMemset'
fi

# A declaration stands directly under the end of its comment, or under another declaration that shares it.
uncommented() { # HEADER
    awk '
        /^MUONSHARD_API/ { if (!covered) print FILENAME ":" FNR ": " $0; inside = 1 }
        { covered = inside || /\*\/$/ }
        /;$/ { inside = 0 }' "$1"
}
for header in "$include"/*.h; do
    same "every function of ${header##*/} has its comment" none "$(uncommented "$header" | grep . || echo none)"
done

[ $failures -eq 0 ] || { echo "$failures failures"; exit 1; }
