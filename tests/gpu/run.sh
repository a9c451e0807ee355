#!/usr/bin/env bash
# Everything that wants a card, in one call, on a machine with a card, gcc and nvcc and nothing else installed:
#   tests/gpu/run.sh [BUNDLE]   BUNDLE: a folder with Open MPI, cmocka, OpenBLAS, libyaml, Jansson and xxHash and an env.sh
# Builds without cmake into build/gpu, then: whether NCCL works here at all; numbers against the fp64 oracle and the
# host's own tests on the device's memory; NCCL and staged MPI at 1, 2 and 4 ranks on one card, to the bit; training on
# the card beside the host, losses compared; the kernels under compute-sanitizer; torch.optim.Muon's times. The outcome
# of each part is in build/gpu/summary. MUONSHARD_GPU_FAKE=1 builds and links only.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
if [ -n "${1-}" ]; then
    # shellcheck disable=SC1091
    . "$1/env.sh"
fi
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
cuda=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
out=build/gpu
mkdir -p $out/obj $out/log
: >$out/summary
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 OPENBLAS_NUM_THREADS=1
export LD_LIBRARY_PATH=$PWD/$out:$cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

mpi_flags=$(mpicc --showme:compile 2>/dev/null || echo)
mpi_libs=$(mpicc --showme:link 2>/dev/null || echo -lmpi)
blas=$(pkg-config --libs --cflags openblas 2>/dev/null || echo -lopenblas)
flags="-std=c17 -O2 -g -fPIC -D_POSIX_C_SOURCE=200809L -ffp-contract=off -fno-math-errno -Iinclude -Isrc -Ilaunch -Ilaunch/gpt
    -Itests -isystem $cuda/include $mpi_flags $blas"
archs="-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_80,code=sm_80
    -gencode=arch=compute_90,code=compute_90"

# part NAME COMMAND...: its output to a log, its outcome to the summary
part() {
    local name=$1 from=$SECONDS
    shift
    if "$@" >$out/log/"$name" 2>&1; then
        printf 'ok    %4d s  %s  %s\n' $((SECONDS - from)) "$name" "$(tail -n 1 $out/log/"$name")" | tee -a $out/summary
    else
        printf 'FAIL  %4d s  %s\n' $((SECONDS - from)) "$name" | tee -a $out/summary
        tail -n 25 $out/log/"$name" | sed 's/^/    /'
    fi
}

# compile FILE...: prints the objects
compile() {
    local file object
    for file in "$@"; do
        object=$out/obj/$(tr / _ <<<"$file").o
        # shellcheck disable=SC2086 # words they are
        case $file in
        *.cu) nvcc -std=c++17 -O3 -fmad=false $archs -Xptxas -v -Xcompiler=-fPIC -Iinclude -Isrc -Ilaunch/gpt -c "$file" -o "$object" 2>"$object.ptxas" || return ;;
        *) gcc $flags -c "$file" -o "$object" || return ;;
        esac
        echo "$object"
    done
}

build() {
    local host core kernels gpt name more libs
    host="$(ls src/kernels/*.c | grep -v kernels/cuda) src/kernels/cuda_layout.c"
    # shellcheck disable=SC2046,SC2086 # words they are
    {
        core=$(compile src/*.c src/optim/*.c src/comm/comm.c src/comm/self.c src/comm/callbacks.c src/comm/nccl_open.c \
            src/comm/mpi.c src/comm/mpi_positions.c $host) || return
        kernels=$(compile src/kernels/cuda*.c src/kernels/cuda*.cu src/comm/nccl.c) || return
        nvcc -shared -o $out/libmuonshard_cuda.so.0.1 $kernels $(compile src/comm/comm.c src/status.c src/dtype.c src/kernels/program.c) \
            -lcublasLt -lnccl -Xcompiler=-fPIC || return
        if [ -f launch/gpt/gpt_cuda.c ]; then
            nvcc -shared -o $out/libmuonshard_gpt_cuda.so.0.1 $(compile launch/gpt/gpt_cuda*.c launch/gpt/gpt_cuda*.cu) -lcublasLt || return
        fi
        libs="$mpi_libs -lopenblas -lyaml -lxxhash -ljansson -lcmocka -lpthread -ldl -lm"
        more=$(compile tests/oracle.c tests/oracle_optimizer.c tests/oracle_pair.c tests/ns_fixture.c tests/mirror_backend.c \
            tests/elementwise_fixture.c tests/device_images.c tests/step_rig.c tests/ranks_fixture.c tests/checkpoint_fixture.c tests/comm_threads.c tests/comm_contract.c) || return
        ar rcs $out/libtests.a $more && ar rcs $out/libcore.a $core || return
        gpt=$(compile $(ls launch/gpt/*.c | grep -v gpt_cuda)) || return
        ar rcs $out/libgpt.a $gpt || return
        for name in elementwise backend_data matrix_update orthogonalize_cases newton_schulz presets conventions step_rules \
            device_mpi comm_device trace gpt_device checkpoint; do
            gcc -o $out/test_$name $(compile tests/test_$name.c) $out/libtests.a $out/libgpt.a $out/libcore.a $libs || return
        done
        gcc -o $out/muonshard $(compile launch/*.c $(ls launch/gpt/*.c | grep -v gpt_cuda)) $out/libcore.a $libs || return
    }
    grep -hE 'spill|registers' $out/obj/*.ptxas | sort | uniq -c | sort -rn | head -n 40
    if grep -hE '[1-9][0-9]* bytes spill' $out/obj/*.ptxas; then
        echo "a kernel spills registers"
        return 1
    fi
}

on_card() { MUONSHARD_TEST_BACKEND=cuda "$@"; }
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
# Not of this project, for comparison: a step of torch.optim.Muon in bf16, by shape.
torch_muon() {
    python3 - <<'EOF'
import statistics, time, torch
for count, rows, cols in ((48, 768, 768), (24, 768, 3072), (1, 4096, 4096), (1, 4096, 14336), (24, 2048, 7168)):
    params = [torch.nn.Parameter(torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer, times = torch.optim.Muon(params, lr=1e-3), []
    for step in range(13):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    print(f"torch {torch.__version__} Muon, {count} x {rows} x {cols}, bf16: median {1e3 * statistics.median(times[3:]):.3f} ms")
    del params, optimizer
EOF
}

part build build
if [ -n "${MUONSHARD_GPU_FAKE-}" ] || [ ! -e /dev/nvidiactl ]; then
    echo "SKIPPED: no NVIDIA device: built and linked, nothing ran" | tee -a $out/summary
    grep -q '^FAIL' $out/summary && exit 1
    exit 77
fi
nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.total --format=csv,noheader | tee -a $out/summary
part info $out/muonshard info
MUONSHARD_TEST_ONLY='test_smoke' part nccl_smoke ranks_on_card 2 $out/test_device_mpi
if grep -q '^FAIL .*nccl_smoke' $out/summary; then
    echo "NCCL does not work between two ranks on this card: the rest is not run" | tee -a $out/summary
    exit 1
fi
for name in elementwise backend_data matrix_update newton_schulz orthogonalize_cases presets conventions step_rules; do
    part test_$name on_card $out/test_$name
done
for n in 1 2; do
    part nccl_and_mpi_np$n ranks_on_card $n $out/test_device_mpi
done
MUONSHARD_TEST_ONLY='test_sums_of_integers' part integers_np4 ranks_on_card 4 $out/test_device_mpi
# Its ranks are threads, and NCCL takes no two ranks of one process on one device: as many as there are devices.
MUONSHARD_TEST_RANKS=$(nvidia-smi -L | wc -l) part test_comm_device on_card $out/test_comm_device
# Likewise threads, on one device: NCCL refuses them, and what is traced goes through memory of the host.
MUONSHARD_TEST_SHARE=1 part test_trace on_card $out/test_trace
MUONSHARD_TEST_SHARE=1 MUONSHARD_TEST_ONLY=same_ranks part test_checkpoint on_card $out/test_checkpoint
part test_gpt_device on_card $out/test_gpt_device
if command -v compute-sanitizer >/dev/null; then
    for name in elementwise backend_data matrix_update newton_schulz gpt_device; do
        part sanitizer_$name on_card compute-sanitizer --error-exitcode 9 $out/test_$name
    done
    for tool in initcheck racecheck; do
        for name in newton_schulz gpt_device; do
            part ${tool}_$name on_card compute-sanitizer --tool $tool --error-exitcode 9 $out/test_$name
        done
    done
else
    echo "SKIPPED: compute-sanitizer is not there" | tee -a $out/summary
fi
for backend in host cuda; do
    part train_$backend train $backend
done
part same_losses same_losses
part continued continued
if python3 -c 'import sys, torch; sys.exit(not (torch.cuda.is_available() and hasattr(torch.optim, "Muon")))' 2>/dev/null; then
    part torch_muon torch_muon
    cat $out/log/torch_muon >>$out/summary
else
    echo "SKIPPED: no torch with CUDA and torch.optim.Muon" | tee -a $out/summary
fi
grep -q '^FAIL' $out/summary && exit 1
exit 0
