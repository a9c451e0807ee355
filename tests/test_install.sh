#!/usr/bin/env bash
# Installs into a new prefix and builds and runs the outside program against that, as its authors would.
#   test_install.sh BUILD_DIR SOURCE_DIR MPIEXEC
set -u

build=$1 source=$2 mpiexec=$3
export LC_ALL=C OPENBLAS_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
unset LD_LIBRARY_PATH CPATH C_INCLUDE_PATH LIBRARY_PATH

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
prefix=$work/prefix
cd "$work" || exit 1

failures=0
passed() { echo "ok    $1"; }
failed() { # NAME WHY
    failures=$((failures + 1))
    echo "FAIL  $1: $2"
}
# succeeds NAME COMMAND...
succeeds() {
    local name=$1
    shift
    if "$@" >log 2>&1; then
        passed "$name"
    else
        failed "$name" "exit code $?"
        sed 's/^/      /' log
        return 1
    fi
}

succeeds "cmake --install" cmake --install "$build" --prefix "$prefix" || exit 1
libdir=$(dirname "$(find "$prefix" -name libmuonshard.so)")
export PKG_CONFIG_PATH=$libdir/pkgconfig

# ---- what is there --------------------------------------------------------------------------------------

version=$(sed -n 's/^#define MUONSHARD_VERSION_M[A-Z]* \([0-9]*\)$/\1/p; s/^#define MUONSHARD_VERSION_P[A-Z]* \([0-9]*\)$/\1/p' \
    "$prefix/include/muonshard.h" | paste -sd.)
for lib in libmuonshard libmuonshard_mpi; do
    if [ -f "$libdir/$lib.so.$version" ] && [ "$(readlink "$libdir/$lib.so")" = "$lib.so.${version%.*}" ] &&
        [ "$(readlink "$libdir/$lib.so.${version%.*}")" = "$lib.so.$version" ]; then
        passed "$lib.so.$version and its links"
    else
        failed "$lib.so.$version" "$(ls -l "$libdir")"
    fi
done
for pc in muonshard muonshard_mpi; do
    [ "$(pkg-config --modversion $pc)" = "$version" ] && passed "$pc.pc has the header's version" ||
        failed "$pc.pc" "version $(pkg-config --modversion $pc), the header says $version"
done
if grep -rqF -e "$build" -e "$source" "$libdir/cmake" "$libdir/pkgconfig"; then
    failed "the package files" "they name the build or the source: $(grep -rlF -e "$build" -e "$source" "$libdir")"
else
    passed "the package files name neither build nor source"
fi
leaks=$(grep -rliE 'openblas|yaml|xxhash|jansson' "$libdir/cmake" "$libdir/pkgconfig")
[ -z "$leaks" ] && passed "the link interface is the library's own" || failed "the link interface" "$leaks"
[ "$("$prefix/bin/muonshard" --version)" = "muonshard $version" ] && passed "the installed command" ||
    failed "the installed command" "says $("$prefix/bin/muonshard" --version 2>&1)"

# ---- the headers ----------------------------------------------------------------------------------------

echo '#include <muonshard.h>
static muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
static muonshard_tensor_desc desc = MUONSHARD_TENSOR_DESC_INIT;
static muonshard_stats_info stats = MUONSHARD_STATS_INIT;
int main(void) { return args.size + desc.size + stats.size > 0 ? muonshard_version() / 1000000 : 1; }' >header.c
strict="-Wall -Wextra -Werror $(pkg-config --cflags muonshard)"
link="$(pkg-config --libs muonshard) -Wl,-rpath,$libdir"
for std in c99 c11 c17; do
    succeeds "muonshard.h as $std" cc -std=$std -pedantic $strict header.c -o header_$std $link &&
        succeeds "it runs" ./header_$std
done
cp header.c header.cpp
for std in c++11 c++17 c++20; do
    succeeds "muonshard.h as $std" c++ -std=$std -pedantic $strict header.cpp -o header_cpp $link &&
        succeeds "it runs" ./header_cpp
done
sed 's/muonshard.h/muonshard_mpi.h/' header.c >header_mpi.cpp
# shellcheck disable=SC2046
succeeds "muonshard_mpi.h as c++17" c++ -std=c++17 -DOMPI_SKIP_MPICXX -fsyntax-only \
    -Wall -Werror $(pkg-config --cflags muonshard_mpi) header_mpi.cpp

# ---- the outside program --------------------------------------------------------------------------------

lines=$(wc -l <"$source/tests/consumer/consumer.c")
[ "$lines" -lt 80 ] && passed "consumer.c has $lines lines" || failed "consumer.c" "$lines lines, not under 80"
if sed -n '/^```c$/,/^```$/{/^```/!p}' "$source/docs/integrate.md" | cmp - "$source/tests/consumer/consumer.c" >log 2>&1; then
    passed "docs/integrate.md shows the same program"
else
    failed "docs/integrate.md shows another program" "$(cat log)"
fi

mkdir package make
succeeds "find_package: configure" cmake -S "$source/tests/consumer" -B package -DCMAKE_PREFIX_PATH="$prefix" &&
    succeeds "find_package: build" cmake --build package
cp "$source/tests/consumer/consumer.c" "$source/tests/consumer/Makefile" make
succeeds "pkg-config: build" make -C make

# A program without MPI, which asks for any version of 0.1, and one that wants a version there is not.
mkdir plain
cp header.c plain
plain() { # VERSION
    rm -rf plain/build
    printf '%s\n' 'cmake_minimum_required(VERSION 3.22)' 'project(plain LANGUAGES C)' \
        "find_package(muonshard $1 REQUIRED)" 'add_executable(plain header.c)' \
        'target_link_libraries(plain PRIVATE muonshard::muonshard)' >plain/CMakeLists.txt
    cmake -S plain -B plain/build -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_DISABLE_FIND_PACKAGE_MPI=ON &&
        cmake --build plain/build && plain/build/plain
}
succeeds "find_package without MPI" plain 0.1
for wanted in 0.0 0.2 1.0; do
    if plain $wanted >log 2>&1; then
        failed "version $wanted" "it was found"
    elif grep -q "$version" log; then
        passed "version $wanted is refused"
    else
        failed "version $wanted" "$(tail -3 log)"
    fi
done

# The ranks' targets differ by their number, so at the optimum |W[l] + b - target|^2 / 2 summed over the ranks is
# 4*24*16/2 times the sum of squares of (rank - mean rank).
floor() { awk "BEGIN { for (r = 0; r < $1; r++) s += (r - ($1 - 1) / 2)^2; print 768 * s }"; }
run() { # NAME PROGRAM RANKS
    local name="$1, $3 ranks"
    succeeds "$name" "$mpiexec" --timeout 60 -n "$3" "$2" "$source/tests/consumer/consumer.yaml" || return
    awk -v ranks="$3" -v floor="$(floor "$3")" '
        /skipped/ { exit 1 }
        / step 1: /   { first += $NF; n++ }
        / step 100: / { last += $NF; n++ }
        / parameters / { hashes++; if (!($NF in seen)) kinds++; seen[$NF] = 1 }
        END {
            printf "loss %.2f -> %.2f, at the optimum %.2f; %d ranks, %d sets of parameters\n", \
                first, last, floor, hashes, kinds
            exit !(n == 2 * ranks && hashes == ranks && kinds == 1 && first - floor > 300 &&
                   last - floor > -0.1 && last - floor < 3)
        }' log >verdict && passed "$name: $(cat verdict)" || failed "$name" "$(cat verdict log)"
    grep ' parameters ' log | sort >"$1-$3.hashes"
}
for n in 1 2 3; do
    run find_package package/consumer $n
    run pkg-config make/consumer $n
    cmp -s find_package-$n.hashes pkg-config-$n.hashes && passed "the same bits, $n ranks" ||
        failed "the same bits, $n ranks" "$(cat find_package-$n.hashes pkg-config-$n.hashes)"
done
"$mpiexec" --timeout 60 -n 2 make/consumer nowhere.yaml >log 2>&1
code=$?
[ $code -eq 15 ] && [ "$(grep -c '^muonshard: .*nowhere.yaml' log)" -eq 1 ] && passed "a missing config ends the job" ||
    failed "a missing config ends the job" "exit code $code: $(cat log)"

[ $failures -eq 0 ] || { echo "$failures failures"; exit 1; }
