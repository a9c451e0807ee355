#!/usr/bin/env bash
# Who may include whom: DESIGN.md section 1, as a table that is checked.
#   include_law.sh ROOT              names every #include that breaks it
#   include_law.sh --self-test ROOT  plants a violation of every kind in a copy and expects each to be found
set -u
export LC_ALL=C

# The first row whose pattern fits a file holds: FILE | WHAT IT MAY INCLUDE. Ours are paths from the root, foreign headers
# stand in <>; * matches / too. SYSTEM is every foreign header but those in `reserved`; BASE is the files of src/ itself.
law='
include/muonshard.h        | <stddef.h> <stdint.h>
include/muonshard_mpi.h    | include/muonshard.h <mpi.h>
include/muonshard_nccl.h   | include/muonshard.h <nccl.h>
src/optim/manifest.c       | include/muonshard.h BASE src/optim/* SYSTEM <jansson.h>
src/optim/*                | include/muonshard.h BASE src/optim/* src/comm/comm.h src/kernels/backend.h SYSTEM
src/comm/mpi*              | include/muonshard.h BASE src/comm/* src/kernels/backend.h SYSTEM include/muonshard_mpi.h <mpi.h>
src/comm/nccl*             | include/muonshard.h BASE src/comm/* src/kernels/backend.h src/kernels/plugin.h SYSTEM <nccl.h> <cuda*>
src/comm/*                 | include/muonshard.h BASE src/comm/* src/kernels/backend.h SYSTEM
src/kernels/cuda_plugin.c  | include/muonshard.h BASE src/kernels/* src/comm/nccl_comm.h
src/kernels/cuda*          | include/muonshard.h BASE src/kernels/* SYSTEM <cu*> <nvtx*> tests/fake_cuda/*_emulation.h
src/kernels/host*          | include/muonshard.h BASE src/kernels/* SYSTEM <cblas.h>
src/kernels/*              | include/muonshard.h BASE src/kernels/* SYSTEM
src/settings.h             | include/muonshard.h BASE SYSTEM src/kernels/backend.h
src/safetensors.c          | include/muonshard.h BASE SYSTEM <jansson.h>
src/*                      | include/muonshard.h BASE SYSTEM
launch/replay.c            | include/* launch/* SYSTEM src/safetensors.h
launch/plan*               | include/* launch/* src/* SYSTEM <jansson.h>
launch/simulate.*          | include/* launch/* src/* SYSTEM
launch/machine.c           | include/* launch/* src/* SYSTEM
launch/bench*              | include/* launch/* src/* SYSTEM <mpi.h> <cblas.h> <jansson.h>
launch/report*            | include/* launch/* SYSTEM <jansson.h>
launch/model_file.c        | include/* launch/* src/* SYSTEM <jansson.h>
launch/gpt/gpt_cuda*       | include/muonshard.h launch/gpt/gpt* SYSTEM <cuda*> <cublasLt.h> tests/fake_cuda/cuda_emulation.h
launch/gpt/gpt_device.*    | launch/gpt/gpt_device.h launch/gpt/gpt_layers.h SYSTEM
launch/gpt/*               | include/muonshard.h launch/gpt/* SYSTEM <cblas.h>
launch/command.c           | include/* launch/* SYSTEM src/fault.h <mpi.h> <cblas.h>
launch/*                   | include/* launch/* SYSTEM <mpi.h> <cblas.h> <jansson.h>
tests/consumer/*           | <muonshard_mpi.h> <muonshard.h> include/* SYSTEM <mpi.h>
tests/oracle_pair.*        | include/* src/* tests/* SYSTEM
tests/oracle*              | tests/oracle* SYSTEM
'
# src/settings.h names the enums of the configuration after those of kernels/backend.h.
# tests/oracle_pair.* runs the library beside the oracle, which itself shares nothing with it.

# SYSTEM leaves these out.
reserved() {
    case $1 in
    '<mpi.h>' | '<nccl.h>' | '<cu'* | '<nv'* | '<cblas.h>' | '<lapacke.h>' | '<openblas'* | '<jansson.h>') return 0 ;;
    '<muonshard'* | '<../'* | '<./'*) return 0 ;;
    *) return 1 ;;
    esac
}

# Sets target: the path from the root of what FILE names by HEADER, or <HEADER>. Both kinds of brackets find the same files.
resolve() { # FILE HEADER
    local dir
    for dir in "${1%/*}" src include launch launch/gpt tests/fake_cuda; do
        [ -f "$dir/$2" ] || continue
        target=$dir/$2
        case $2 in *./*) target=$(realpath --relative-to=. "$target") ;; esac
        return
    done
    target="<$2>"
}

# Sets may: the list of the first row that fits FILE.
row_of() { # FILE
    local pattern
    while IFS='| ' read -r pattern may; do
        # shellcheck disable=SC2254 # a pattern it is
        [ -z "$pattern" ] || case $1 in $pattern) return ;; esac
    done <<<"$law"
    may=
}

allowed() { # HEADER PATTERN...
    local header=$1 pattern
    shift
    for pattern in "$@"; do
        # shellcheck disable=SC2254
        case $pattern in
        BASE) case $header in src/*/*) ;; src/*) return 0 ;; esac ;;
        SYSTEM) case $header in '<'*) reserved "$header" || return 0 ;; esac ;;
        *) case $header in $pattern) return 0 ;; esac ;;
        esac
    done
    return 1
}

check() { # FILE...
    local file line target may found=0 plain='^[[:space:]]*#[[:space:]]*include[[:space:]]*[<"]([^>"]+)[>"]'
    set -f
    while IFS=: read -r file line; do
        if [[ $line =~ $plain ]]; then
            resolve "$file" "${BASH_REMATCH[1]}"
            row_of "$file"
            # shellcheck disable=SC2086 # a list it is
            allowed "$target" $may || { echo "$file may not include $target"; found=1; }
        else
            echo "$file: $line: not a plain #include"
            found=1
        fi
    done < <(grep -HE '^[[:space:]]*#[[:space:]]*include' "$@")
    set +f
    return $found
}

check_all() {
    local files
    mapfile -t files < <(find include src launch tests/oracle* tests/consumer -name '*.[ch]' -o -name '*.cu*' -o -name '*.cpp')
    [ ${#files[@]} -gt 50 ] || { echo "only ${#files[@]} files found: is this the root?"; return 1; }
    check "${files[@]}" && echo "${#files[@]} files obey the law"
}

# FILE LINE that breaks each row and each reservation
violations='
include/muonshard.h              #include <stdio.h>
include/muonshard.h              #include <mpi.h>
include/muonshard_mpi.h          #include <stdlib.h>
src/status.c                     #include "kernels/backend.h"
src/status.c                     #include "comm/comm.h"
src/config.c                     #include "optim/plan.h"
src/config_ranks.c               #include "comm/comm.h"
src/settings.h                   #include "comm/comm.h"
src/status.c                     #include <mpi.h>
src/status.c                     #include <cblas.h>
src/kernels/host.c               #include "comm/comm.h"
src/kernels/backend.c            #include "optim/plan.h"
src/kernels/backend.c            #include <cblas.h>
src/kernels/host.c               #include <cuda_runtime.h>
src/kernels/host.c               #  include <mpi.h>
src/comm/comm.c                  #include "kernels/host.h"
src/comm/comm.c                  #include "../kernels/host.h"
src/comm/comm.c                  #include <kernels/host.h>
src/comm/self.c                  #include "optim/plan.h"
src/comm/callbacks.c             #include <mpi.h>
src/comm/self.c                  #include "muonshard_mpi.h"
src/comm/mpi.c                   #include <nccl.h>
src/comm/mpi.c                   #include <cuda_runtime.h>
src/optim/step.c                 #include <mpi.h>
src/optim/step.c                 #include <nccl.h>
src/optim/step.c                 #include <cuda_runtime.h>
src/optim/step.c                 #include <cublasLt.h>
src/optim/step.c                 #include <cblas.h>
src/optim/step.c                 #include "kernels/host.h"
src/optim/step.c                 #include "muonshard_mpi.h"
src/optim/step.c                 #include HEADER
launch/train.c                   #include "config.h"
launch/replay.c                  #include "optim/plan.h"
launch/info.c                    #include "kernels/backend.h"
launch/routing.c                 #include "status.h"
launch/check.c                   #include "config.h"
launch/check_tensors.c           #include "comm/comm.h"
src/config.c                     #include <jansson.h>
launch/command.c                 #include "comm/comm.h"
launch/train.c                   #include "fault.h"
launch/main.c                    #include "settings.h"
launch/gpt/gpt.c                 #include "status.h"
launch/gpt/gpt.c                 #include "command.h"
launch/gpt/gpt_layers.c          #include <mpi.h>
launch/gpt/gpt.c                 #include <cuda_runtime.h>
launch/gpt/gpt_device.c          #include <cuda_runtime.h>
launch/gpt/gpt_device.c          #include "gpt_cuda.h"
launch/gpt/gpt_cuda.c            #include "kernels/cuda.h"
launch/gpt/gpt_cuda.c            #include "corpus.h"
launch/gpt/gpt_cuda_kernels.cu   #include "kernels/cuda_launch.cuh"
tests/oracle.c                   #include "muonshard.h"
tests/oracle.c                   #include "optim/newton_schulz.h"
tests/oracle_optimizer.c         #include <cblas.h>
tests/consumer/consumer.c        #include "status.h"
'

self_test() {
    local work file line out missed=0 planted=0
    work=$(mktemp -d) || exit 1
    # shellcheck disable=SC2064
    trap "rm -rf '$work'" EXIT
    mkdir "$work/tree" "$work/tree/tests"
    cp -r include src launch "$work/tree" && cp -r tests/oracle* tests/consumer "$work/tree/tests" || exit 1
    cd "$work/tree" || exit 1
    check_all || exit 1
    while read -r file line; do
        [ -n "$file" ] || continue
        planted=$((planted + 1))
        cp "$file" "$work/kept" || exit 1
        printf '%s\n' "$line" >>"$file"
        out=$(check "$file")
        [ $? -ne 0 ] && [ "$(grep -c . <<<"$out")" -eq 1 ] && grep -q "^$file" <<<"$out" ||
            { echo "not found as it should be: $file: $line: $out"; missed=$((missed + 1)); }
        cp "$work/kept" "$file"
    done <<<"$violations"
    echo "$planted violations planted, $missed not found"
    [ $missed -eq 0 ]
}

case ${1-} in
--self-test) cd "${2:?root}" && self_test ;;
*) cd "${1:?root}" && check_all ;;
esac
