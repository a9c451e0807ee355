#!/usr/bin/env bash
# Everything that wants a card, in one call of less than ten minutes, on a machine with a card, gcc and nvcc and nothing else
# installed; python3 with torch for the comparison:
#   tests/gpu/run.sh [BUNDLE]   BUNDLE: a folder with Open MPI, cmocka, OpenBLAS, libyaml, Jansson and xxHash and an env.sh
# Builds without cmake into build/gpu, then, what matters most first: whether NCCL works here at all; numbers against the
# fp64 oracle and the host's own tests on the device's memory, NCCL and staged MPI at 1, 2 and 4 ranks on one card, to the
# bit; times beside torch.optim.Muon (launch/bench_vs_torch.py) and of whole steps; training on the card beside the host,
# losses compared; the kernels under compute-sanitizer. Each part has a limit, and all of them MUONSHARD_GPU_BUDGET seconds
# (570): what finds no time left says that it is skipped. What is worth keeping is in build/gpu/results: summary.txt,
# tables and JSON, log/; where $OUT is set, a copy of it goes there after every part.
# MUONSHARD_GPU_FAKE=1 builds and links only. MUONSHARD_GPU_TRIAL=COMMAND tries the measuring alone, of small shapes, with this
# muonshard on a fake device (LD_LIBRARY_PATH leads to it) and torch on the CPU: for what is wrong with this script.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
if [ -n "${1-}" ]; then
    # shellcheck disable=SC1091
    . "$1/env.sh"
fi
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
cuda=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
out=build/gpu results=build/gpu/results
budget=${MUONSHARD_GPU_BUDGET:-570} trial=${MUONSHARD_GPU_TRIAL-} python=${PYTHON:-python3}
rm -rf $results
mkdir -p $out/obj $results/log
case $budget in '' | *[!0-9]*) echo "MUONSHARD_GPU_BUDGET is \"$budget\", not seconds" >&2; exit 2 ;; esac
summary=$results/summary.txt
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 OPENBLAS_NUM_THREADS=1
# torch brings libraries of its own: the path it is started with is the one there was.
paths=${LD_LIBRARY_PATH-}
[ -z "$trial" ] && export LD_LIBRARY_PATH=$PWD/$out${paths:+:$paths}:$cuda/lib64

keep() { if [ -n "${OUT-}" ]; then cp -r $results/. "$OUT"/; fi; }
under_way=
stop() { [ -z "$under_way" ] || kill "$under_way" 2>/dev/null; exit "$1"; }
trap keep EXIT
trap 'stop 143' TERM
trap 'stop 130' INT
say() { echo "$*" | tee -a $summary; }

mpi_flags=$(mpicc --showme:compile 2>/dev/null || echo)
mpi_libs=$(mpicc --showme:link 2>/dev/null || echo -lmpi)
blas=$(pkg-config --libs --cflags openblas 2>/dev/null || echo -lopenblas)
flags="-std=c17 -O2 -g -fPIC -D_POSIX_C_SOURCE=200809L -ffp-contract=off -fno-math-errno -Iinclude -Isrc -Ilaunch -Ilaunch/gpt
    -Itests -isystem $cuda/include $mpi_flags $blas"
archs="-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_80,code=sm_80
    -gencode=arch=compute_90,code=compute_90"
hopper="-gencode=arch=compute_90a,code=sm_90a" # of instructions that no other has
export out results cuda flags archs hopper python paths

# part NAME LIMIT COMMAND...: its output to a log, its outcome to the summary; no longer than LIMIT seconds, nor than there are left.
# COMMAND may be a function of this file. What has run doesn't run again; `reserved` seconds are for what comes later.
reserved=0
declare -A ran
part() {
    local name=$1 limit=$2 from=$SECONDS left=$((budget - reserved - SECONDS)) outcome
    shift 2
    [ -n "${ran[$name]-}" ] && return
    if [ $left -lt $((reserved > 0 ? limit : 10)) ]; then
        [ $reserved -gt 0 ] || say "SKIPPED        $name: the budget of $budget s is used up"
        return
    fi
    ran[$name]=yes
    # shellcheck disable=SC2016 # it is the other shell's
    timeout -k 5 $((limit < left ? limit : left)) bash -c '"$@"' _ "$@" </dev/null >$results/log/"$name".txt 2>&1 &
    under_way=$! # a shell that waits hears signals, one that runs a command hears them when it is over
    wait $under_way
    outcome=$?
    under_way=
    if [ $outcome -eq 0 ]; then
        say "$(printf 'ok    %4d s  %s  %s' $((SECONDS - from)) "$name" "$(tail -n 1 $results/log/"$name".txt)")"
    else
        [ $outcome -eq 124 ] && name="$name: stopped at its limit"
        say "$(printf 'FAIL  %4d s  %s' $((SECONDS - from)) "$name")"
        tail -n 25 $results/log/"${name%%:*}".txt | sed 's/^/    /'
    fi
    keep
}

object_of() { echo "$out/obj/$(tr / _ <<<"$1").o"; }
compile_one() {
    local object archs=$archs
    object=$(object_of "$1")
    [ "$1" = src/kernels/cuda_tile_kernel.cu ] && archs=$hopper
    # shellcheck disable=SC2086 # words they are
    case $1 in
    *.cu) nvcc -std=c++17 -O3 -fmad=false $archs -Xptxas -v -Xcompiler=-fPIC -Iinclude -Isrc -Ilaunch/gpt -c "$1" -o "$object" 2>"$object.ptxas" ||
        { cat "$object.ptxas"; return 1; } ;;
    *) gcc $flags -c "$1" -o "$object" ;;
    esac
}
objects() { local file; for file in "$@"; do object_of "$file"; done; }
export -f compile_one object_of

tests="elementwise backend_data matrix_update alignment orthogonalize_cases newton_schulz presets conventions step_rules
    device_mpi comm_device trace gpt_device checkpoint"
# shellcheck disable=SC2010,SC2016,SC2046,SC2086 # words they are
build() {
    local host core kernels alone gpt gpt_kernels command fixtures name libs
    host="$(ls src/kernels/*.c | grep -v kernels/cuda) src/kernels/cuda_layout.c"
    core="$(ls src/*.c src/optim/*.c) src/comm/comm.c src/comm/self.c src/comm/callbacks.c src/comm/nccl_open.c src/comm/mpi.c
        src/comm/mpi_positions.c $host"
    kernels="$(ls src/kernels/cuda*.c src/kernels/cuda*.cu) src/comm/nccl.c"
    alone="src/comm/comm.c src/status.c src/dtype.c src/kernels/program.c"
    gpt=$(ls launch/gpt/*.c | grep -v gpt_cuda)
    gpt_kernels=$(ls launch/gpt/gpt_cuda*.c launch/gpt/gpt_cuda*.cu)
    command=$(ls launch/*.c)
    fixtures=$(printf 'tests/%s.c ' oracle oracle_optimizer oracle_pair ns_fixture mirror_backend elementwise_fixture device_images \
        step_rig ranks_fixture checkpoint_fixture comm_threads comm_contract)
    libs="$mpi_libs -lopenblas -lyaml -lxxhash -ljansson -lcmocka -lpthread -ldl -lm"
    rm -f $out/obj/*.ptxas
    # What takes longest first.
    printf '%s\n' $kernels $gpt_kernels $core $alone $gpt $command $fixtures $(printf 'tests/test_%s.c ' $tests tile_product) | awk '!seen[$0]++' |
        xargs -P "$(nproc)" -n 1 bash -c 'compile_one "$1"' _ || return
    nvcc -shared -o $out/libmuonshard_cuda.so.0.1 $(objects $kernels $alone) -lcublasLt -lnccl -Xcompiler=-fPIC || return
    nvcc -shared -o $out/libmuonshard_gpt_cuda.so.0.1 $(objects $gpt_kernels) -lcublasLt || return
    rm -f $out/lib*.a
    ar rcs $out/libtests.a $(objects $fixtures) && ar rcs $out/libcore.a $(objects $core) && ar rcs $out/libgpt.a $(objects $gpt) || return
    gcc -o $out/muonshard $(objects $command $gpt) $out/libcore.a $libs || return
    for name in $tests; do
        echo "$name"
    done | xargs -P "$(nproc)" -I NAME sh -c "gcc -o $out/test_NAME $(object_of tests/test_NAME.c) $out/libtests.a $out/libgpt.a $out/libcore.a $(tr '\n' ' ' <<<"$libs")" || return
    nvcc -o $out/test_tile_product $(objects tests/test_tile_product.c src/kernels/cuda_tile_kernel.cu) $(tr '\n' ' ' <<<"$libs") || return
    grep -hE 'spill|registers' $out/obj/*.ptxas | sort | uniq -c | sort -rn | head -n 40
    if grep -hE '[1-9][0-9]* bytes spill' $out/obj/*.ptxas; then
        echo "a kernel spills registers"
        return 1
    fi
    if grep -h 'wgmma.*serialized' $out/obj/*.ptxas; then # ptxas has found sums in use where a product may still add to them
        echo "products wait for each other"
        return 1
    fi
}

on_card() { MUONSHARD_TEST_BACKEND=cuda "$@"; }
with_tiles() { MUONSHARD_TEST_TILES=1 on_card "$@"; }
# Two NCCL ranks on one card pass for two hosts: for correctness only.
ranks_on_card() {
    local n=$1
    shift
    # shellcheck disable=SC2016
    MUONSHARD_TEST_BACKEND=cuda MUONSHARD_TEST_SHARE=1 NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_NET=Socket \
        NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=2 \
        mpirun --timeout 200 -n "$n" bash -c 'NCCL_HOSTID=r$OMPI_COMM_WORLD_RANK exec "$@"' _ "$@"
}
train() { # BACKEND: to the rounding of fp32, as tests/test_train_device.sh has it
    rm -f $out/train-"$1".jsonl
    $out/muonshard train configs/quickstart.yaml backend="$1" preset=moonlight ns_dtype=fp32 train.steps=10 train.warmup=2 \
        train.eval_every=5 train.log=$out/train-"$1".jsonl data.files='docs/*.md'
}
losses() { grep -oE '"(train|val)_loss": ?[0-9.]+' "$1" | grep -oE '[0-9.]+$'; }
same_losses() {
    [ "$(losses $out/train-host.jsonl | wc -l)" -ge 12 ] || return
    paste <(losses $out/train-host.jsonl) <(losses $out/train-cuda.jsonl) |
        awk '{ d = ($1 - $2) / $1; if (d < 0) d = -d; if (!(d < 2e-6) || NF != 2) bad = 1; if (d > most) most = d }
            END { printf "losses differ by %.1e\n", most; exit bad }'
}
# Saved after 5 of 10 steps and continued: to the bit what went on without a stop.
continued() {
    local keys="train.save=$out/saved train.save_every=5 train.keep=0 train.log=$out/train-continued.jsonl"
    rm -rf $out/saved
    # shellcheck disable=SC2086 # words they are
    $out/muonshard train configs/quickstart.yaml backend=cuda preset=moonlight ns_dtype=fp32 train.steps=10 train.warmup=2 \
        train.eval_every=5 data.files='docs/*.md' $keys && rm -r $out/saved/step-00000010 &&
        $out/muonshard train configs/quickstart.yaml backend=cuda preset=moonlight ns_dtype=fp32 train.steps=10 train.warmup=2 \
            train.eval_every=5 data.files='docs/*.md' $keys --resume auto || return
    grep -q resumed_after $out/train-continued.jsonl && diff <(losses $out/train-cuda.jsonl) <(losses $out/train-continued.jsonl)
}

# ---- measuring ----

# Whole steps; wrong results make the exit code. The timeline of the last step is in the JSON.
bench_step() { # NAME ARGUMENT...
    local name=$1
    shift
    "$muonshard" bench step "$@" backend=cuda preset=torch -J "$results/step-$name.json" >"$results/step-$name.txt" || return
    tail -n 2 "$results/step-$name.txt"
}
# What is set by a model or left to cuBLASLt, beside what else it might be: median of whole steps, us.
choices() { # SHAPES... WORDS: from "--" on they go to every run
    local shapes=() keys label shape median wrong=0
    : >"$results/choices.txt"
    while [ "$1" != -- ]; do shapes+=("$1") && shift; done
    shift
    for keys in "" ${tiles:+gemm_kernels=hopper "gemm_kernels=hopper gemm_choice=measured gemm_table=$results/gemm-table-hopper" \
        "gemm_kernels=hopper deterministic=true"} "gemm_choice=measured gemm_table=$results/gemm-table" symmetric_panels=1 \
        symmetric_panels=4 batch_bytes=33554432 batch_bytes=1073741824 cuda_graphs=false; do
        label=${keys:-as it is}
        for shape in "${shapes[@]}"; do
            # shellcheck disable=SC2086 # words they are
            "$muonshard" bench step --shapes "$shape" -n 9 -w 3 -c 0 "$@" backend=cuda preset=torch $keys \
                -J "$results/choice.json" >/dev/null || { printf '%-44s %-16s %12s\n' "${label%% gemm_table*}" "$shape" failed >>"$results/choices.txt"; wrong=1; continue; }
            median=$(sed -n 's/.*"step_us": *{"median": *\([0-9.]*\).*/\1/p; /"step_us"/,/}/s/^ *"median": *\([0-9.]*\).*/\1/p' "$results/choice.json" | head -n 1)
            [ -n "$median" ] || return
            printf '%-44s %-16s %12.1f\n' "${label%% gemm_table*}" "$shape" "$median" | tee -a "$results/choices.txt"
        done
    done
    rm -f "$results/choice.json"
    return $wrong
}
bench_shared() { ranks_on_card 2 "$muonshard" bench step "$@" backend=cuda share_gpu=true preset=torch -n 3 -J "$results/step-shared-2.json"; }
vs_torch() { # NAME SECONDS ARGUMENT...
    local name=$1 seconds=$2 own_paths=$LD_LIBRARY_PATH
    shift 2
    LD_LIBRARY_PATH=$paths "$python" launch/bench_vs_torch.py --device cuda \
        --muonshard "env LD_LIBRARY_PATH='$own_paths' '$muonshard'" --budget "$seconds" --json "$results/$name.json" "$@" \
        >"$results/$name.txt" || return
    echo "in $results/$name.txt"
}
has_torch() {
    LD_LIBRARY_PATH=$paths "$python" -c 'import sys, torch; sys.exit(not ((sys.argv[1:] or torch.cuda.is_available()) and hasattr(torch.optim, "Muon")))' \
        ${trial:+trial} 2>/dev/null
}
# Words that are others in a trial.
# shellcheck disable=SC2054 # a list is one word
if [ -n "$trial" ]; then
    torch_words=(--torch-device cpu --shapes 48x48x4,32x64 --model '' --iterations 3 --rounds 1 --bench "-e 64K")
    step_words=(--shapes 48x48x4,32x64 -e 64K) shared_words=("${step_words[@]}") bytes=64K
    choice_words=(32x32x4 32x64x3 -- -e 64K)
else
    torch_words=() step_words=(configs/models/gpt2-124m.yaml) shared_words=(--shapes 768x768x6,768x3072x3) bytes=256M
    choice_words=(768x768x48 768x3072x24 4096x4096x1 2048x7168x24 -- -e 16M)
fi
muonshard=${trial:-$out/muonshard}
export muonshard
export -f build objects on_card with_tiles ranks_on_card train losses same_losses continued bench_step bench_shared vs_torch choices
export mpi_libs tests

times() {
    if has_torch; then
        part vs_torch 300 vs_torch vs_torch 200 ${tiles:+--hopper} "${torch_words[@]}"
        [ -f $results/vs_torch.txt ] && cat $results/vs_torch.txt | tee -a $summary
        keep
    else
        say "SKIPPED        vs_torch: no torch with torch.optim.Muon and CUDA"
    fi
    part step_gpt2 60 bench_step gpt2 "${step_words[@]}"
    part step_gpt2_fp16 60 bench_step gpt2-fp16 "${step_words[@]}" -c 0 ns_form=gram ns_dtype=fp16
    if [ -n "$tiles" ]; then
        part step_gpt2_hopper 60 bench_step gpt2-hopper "${step_words[@]}" gemm_kernels=hopper
        part step_gpt2_hopper_fp16 60 bench_step gpt2-hopper-fp16 "${step_words[@]}" -c 0 ns_form=auto ns_dtype=fp16 gemm_kernels=hopper
    fi
    part choices 210 choices "${choice_words[@]}"
    [ -f $results/choices.txt ] && cat $results/choices.txt >>$summary
    [ "$nccl" = yes ] && part step_shared_2 60 bench_shared "${shared_words[@]}"
    part calibrate 60 "$muonshard" bench --calibrate $results/machine.yaml -n 5 -w 1 -e $bytes backend=cuda
    if has_torch; then
        part vs_torch_bf16 120 vs_torch vs_torch_bf16 60 "${torch_words[@]}" --dtype bf16 --model '' --ours preset=torch ${tiles:+--hopper}
        [ -f $results/vs_torch_bf16.txt ] && cat $results/vs_torch_bf16.txt | tee -a $summary
    fi
}
# The kernel of tiles, and what the optimizer makes of it; without it nothing is timed with it.
correct_tiles() {
    [ -n "$sm90" ] || return
    MUONSHARD_TILE_REPEATS=50 part test_tile_product 60 $out/test_tile_product
    part tiles_newton_schulz 60 with_tiles $out/test_newton_schulz
    part tiles_orthogonalize_cases 90 with_tiles $out/test_orthogonalize_cases
    tiles=
    if grep -qE '^FAIL .*til' $summary; then
        say "the kernel of tiles is wrong on this card: it is not timed"
    elif [ -n "${ran[test_tile_product]-}" ] && [ -n "${ran[tiles_newton_schulz]-}" ] && [ -n "${ran[tiles_orthogonalize_cases]-}" ]; then
        tiles=yes
    fi
}
correct() {
    for name in elementwise backend_data matrix_update alignment newton_schulz orthogonalize_cases presets conventions step_rules; do
        part test_$name 90 on_card $out/test_$name
    done
    if [ $nccl = yes ]; then
        for n in 1 2; do
            part nccl_and_mpi_np$n 90 ranks_on_card $n $out/test_device_mpi
        done
        MUONSHARD_TEST_ONLY='test_sums_of_integers' part integers_np4 60 ranks_on_card 4 $out/test_device_mpi
        # Its ranks are threads, and NCCL takes no two ranks of one process on one device: as many as there are devices.
        MUONSHARD_TEST_RANKS=$(nvidia-smi -L | wc -l) part test_comm_device 60 on_card $out/test_comm_device
    fi
    # Likewise threads, on one device: NCCL refuses them, and what is traced goes through memory of the host.
    MUONSHARD_TEST_SHARE=1 part test_trace 60 on_card $out/test_trace
    MUONSHARD_TEST_SHARE=1 MUONSHARD_TEST_ONLY=same_ranks part test_checkpoint 60 on_card $out/test_checkpoint
    part test_gpt_device 60 on_card $out/test_gpt_device
}
finish() {
    say "$(grep -c '^ok' $summary) parts ok, $(grep -c '^FAIL' $summary) failed, $(grep -c '^SKIPPED' $summary) skipped, $SECONDS s"
    grep -q '^FAIL' $summary && exit 1
    exit "${1:-0}"
}

card=$(nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total,power.limit --format=csv,noheader 2>/dev/null | head -n 1)
say "# $(date -u +%Y-%m-%dT%H:%M:%SZ) tests/gpu/run.sh $*; commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown); $(nproc) cores; ${card:-no card}"
nccl=yes sm90=
[ "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)" = 9.0 ] && sm90=yes
export tiles=${trial:+yes} # products of our own are timed
if [ -n "$trial" ]; then
    times
    finish
fi
# The card's own instructions are enough for it.
[ -n "$sm90" ] && archs=$hopper
# shellcheck disable=SC2034 # compile_one has it
part build "$budget" build
if [ -n "${MUONSHARD_GPU_FAKE-}" ] || [ ! -e /dev/nvidiactl ]; then
    say "SKIPPED: no NVIDIA device: built and linked, nothing ran"
    finish 77
fi
if grep -q '^FAIL' $summary; then
    finish
fi
part info 30 $out/muonshard info
MUONSHARD_TEST_ONLY='test_smoke' part nccl_smoke 60 ranks_on_card 2 $out/test_device_mpi
if grep -q '^FAIL .*nccl_smoke' $summary; then
    say "NCCL does not work between two ranks on this card: what needs it is not run"
    nccl=no
fi
# Slow tests don't keep times from being taken; they come after them.
reserved=$((budget / 2))
correct_tiles
correct
reserved=0
times
correct_tiles
correct
for backend in host cuda; do
    part train_$backend 60 train $backend
done
part same_losses 10 same_losses
part continued 60 continued
if command -v compute-sanitizer >/dev/null; then
    if [ -n "$tiles" ]; then
        for tool in memcheck racecheck synccheck; do
            MUONSHARD_TILE_CASES=20 part ${tool}_tile_product 90 compute-sanitizer --tool $tool --error-exitcode 9 $out/test_tile_product
        done
    fi
    for name in elementwise backend_data matrix_update newton_schulz gpt_device; do
        part sanitizer_$name 90 on_card compute-sanitizer --error-exitcode 9 $out/test_$name
    done
    for tool in initcheck racecheck; do
        for name in newton_schulz gpt_device; do
            part ${tool}_$name 90 on_card compute-sanitizer --tool $tool --error-exitcode 9 $out/test_$name
        done
    done
else
    say "SKIPPED        compute-sanitizer is not there"
fi
finish
