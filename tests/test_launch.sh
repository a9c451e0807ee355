#!/usr/bin/env bash
# The launchers, without the machines they are for: mpirun, nvidia-smi, srun and scontrol are stand-ins that write down what they are
# told, and /sys is a tree of 8 GPUs and 8 NICs on 2 NUMA nodes.
#   test_launch.sh LAUNCH_DIRECTORY
set -euo pipefail

launch=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir bin
# What this runs in must not show through.
for name in $(compgen -e); do
    case $name in SLURM_* | OMPI_* | UCX_* | NCCL_* | CUDA_* | MUONSHARD*) unset "$name" ;; esac
done

failures=0
failed() {
    failures=$((failures + 1))
    echo "FAIL  $1"
    sed 's/^/      /' stdout stderr
}
# runs NAME CODE COMMAND...
runs() {
    local name=$1 code=$2 got=0
    shift 2
    "$@" >stdout 2>stderr || got=$?
    [ $got -eq "$code" ] || failed "$name: exit code $got, wanted $code"
}
# says NAME PATTERN FILE; silent NAME PATTERN FILE: whether a line matches the extended regular expression
says() { if grep -qE -- "$2" "$3"; then echo "ok    $1"; else failed "$1: no line matches $2"; fi; }
silent() { if grep -qE -- "$2" "$3"; then failed "$1: a line matches $2"; else echo "ok    $1"; fi; }
program() { # NAME, its text from stdin
    cat >"bin/$1"
    chmod +x "bin/$1"
}
tools=$PATH
PATH=$work/bin:$tools

# ---- run_hosts.sh ----
program mpirun <<'SH'
#!/usr/bin/env bash
case " $* " in
*" down1 "*) exit 1 ;;
*nvidia-smi*) echo "machine ${FAKE_MACHINE:-0 16 16}" ;; # run_hosts.sh asks for GPUs and cores
*) printf '%s\n' "$@" >mpirun.log ;;
esac
SH
# What is printed is what is run, quoted for a shell: a comma has a backslash before it.
dry() { # NAME ARGUMENT...
    local name=$1
    shift
    runs "$name" 0 "$launch/run_hosts.sh" --dry-run "$@"
}
cat >hosts <<'TXT'
# two of a kind
node1 slots=4

node2   slots=4   # the other one
TXT
dry "slots" --hosts hosts muonshard bench step
says "slots of the file, and cores each" "^$work/bin/mpirun -n 8 --host node1:4.,node2:4 --map-by slot:PE=4 --bind-to core " stdout
says "each through bind.sh" " $launch/bind.sh muonshard bench step $" stdout
says "threads are forwarded" " -x MUONSHARD_THREADS " stdout
says "PATH is forwarded" " -x PATH " stdout
printf 'node1\nnode2 slots=2\nnode1' >mixed
dry "no slots" --hosts mixed a
says "a host named twice, and other slots" "-n 4 --host node1:2.,node2:2 " stdout
dry "ranks per host" --ranks-per-host 3 --hosts hosts a "b c"
says "the number goes before slots" "-n 6 --host node1:3.,node2:3 --map-by slot:PE=5 --bind-to core " stdout
says "arguments stay whole" ' a b\\ c $' stdout
FAKE_MACHINE="8 96 96" dry "GPUs" --hosts n1,n2 a
says "a rank a GPU, bound by bind.sh" "-n 16 --host n1:8.,n2:8 --map-by slot --bind-to none " stdout
FAKE_MACHINE="0 6 6" dry "cores" --hosts n1 a
says "a rank a core" "-n 6 --host n1:6 --map-by slot:PE=1 --bind-to core " stdout
FAKE_MACHINE="0 8 4" dry "a share of time" --ranks-per-host 2 a
says "a container's share of time" "-n 2 --host localhost:2 --map-by slot --bind-to none --mca oob" stdout
dry "more ranks than cores" --ranks-per-host 17 a
says "more ranks than cores" "-n 17 --host localhost:17 --map-by slot --bind-to none --mca mpi_yield_when_idle 1 " stdout
# run_local.sh: a stand-in for /sys says what a container's time is.
mkdir -p share/fs/cgroup
echo "50000 100000" >share/fs/cgroup/cpu.max
runs "one machine" 0 env MUONSHARD_SYSFS="$work/share" "$launch/run_local.sh" 1 muonshard train
says "one machine" "^muonshard$" mpirun.log
silent "a share of time is not a shared GPU" "share_gpu" mpirun.log
runs "shared GPU" 0 "$launch/run_local.sh" --share-gpu 1 muonshard train
says "a shared GPU is said to the run" "^share_gpu=true$" mpirun.log
MUONSHARD_JOB_TIMEOUT=60 NCCL_DEBUG=INFO UCX_TLS=tcp OTHER_THING=1 dry "environment" a
for name in NCCL_DEBUG UCX_TLS MUONSHARD_JOB_TIMEOUT; do says "$name is forwarded" " -x $name " stdout; done
silent "nothing else is" "OTHER_THING" stdout
says "the job's time" " --timeout 60 " stdout
says "hosts that do not answer: after 30 s" " oob_tcp_keepalive_time 15 --mca oob_tcp_keepalive_intvl 4 --mca oob_tcp_keepalive_probes 4 " stdout
runs "a run" 0 "$launch/run_hosts.sh" --ranks-per-host 2 --hosts n1 muonshard "x y"
says "a run: the words as they are" "^x y$" mpirun.log
says "a run: says what it does" "^run_hosts.sh: 2 ranks on 1 host, 8 BLAS threads each, bound to 8 cores each" stderr
program scontrol <<'SH'
#!/usr/bin/env bash
[ "$*" = "show hostnames node[7-8]" ] && printf 'node7\nnode8\n'
SH
SLURM_JOB_NODELIST='node[7-8]' dry "Slurm" --ranks-per-host 1 a
says "the nodes of a Slurm job" "--host node7:1.,node8:1 " stdout
refused() { # NAME PATTERN ARGUMENT...
    local name=$1 pattern=$2
    shift 2
    runs "$name" 2 "$launch/run_hosts.sh" "$@"
    says "$name" "^run_hosts.sh: .*$pattern" stderr
}
echo 'node1 slot=3' >bad
echo '# nobody' >empty
refused "no command" "usage" --hosts n1
refused "an unknown option" "unknown option --host" --host n1 a
refused "no value" "usage|needs a value" --hosts
refused "a bad number" "0 is not a number above 0" --ranks-per-host 0 a
MUONSHARD_HOST_TIMEOUT=0.5 refused "a bad time" 'MUONSHARD_HOST_TIMEOUT is "0.5"' a
refused "a bad hostfile" 'bad:1: "slot=3"' --hosts bad a
refused "an empty hostfile" "empty names no host" --hosts empty a
refused "no hostfile" "no such file" --hosts no/such a
refused "a host that is down" "nothing can be started on down1" --hosts down1,n2 a

# ---- bind.sh ----
# As on machines of eight GPUs: pairs of a GPU and a NIC under a switch each, four switches a NUMA node.
cpus=$(taskset -cp $$ | sed 's/.*: //' | tr ',' '\n' | awk -F- '{ for (i = $1; i <= $NF; i++) print i }')
cpu=("$(head -n 1 <<<"$cpus")" "$(tail -n 1 <<<"$cpus")")
device() { # PATH BUS NODE
    mkdir -p "sys/devices/$1/$2" sys/bus/pci/devices
    echo "$3" >"sys/devices/$1/$2/numa_node"
    ln -s "$work/sys/devices/$1/$2" "sys/bus/pci/devices/$2"
}
nic() { # NAME BUS STATE LAYER
    mkdir -p "sys/class/infiniband/$1/ports/1"
    ln -s "$(realpath "sys/bus/pci/devices/$2")" "sys/class/infiniband/$1/device"
    echo "$3" >"sys/class/infiniband/$1/ports/1/state"
    echo "$4" >"sys/class/infiniband/$1/ports/1/link_layer"
}
buses=(1b 43 52 61 9d c3 d1 df)
: >gpus
for i in 0 1 2 3 4 5 6 7; do
    bus=${buses[i]}
    switch=pci0000:$((i + 10))/0000:$((i + 10)):01.0
    device "$switch" "0000:$bus:00.0" $((i / 4))
    # NICs count the other way, so that a number is not right by chance.
    device "$switch" "0000:$bus:01.0" $((i / 4))
    nic mlx5_$((7 - i)) "0000:$bus:01.0" "4: ACTIVE" InfiniBand
    echo "$i, GPU-0000000$i-aaaa, 00000000:${bus^^}:00.0" >>gpus
done
# A card for storage, nearer to GPU 0 than nothing, and of another network.
device pci0000:30 0000:05:00.0 0
nic mlx5_8 0000:05:00.0 "4: ACTIVE" Ethernet
for n in 0 1; do
    mkdir -p sys/devices/system/node/node$n
    echo "${cpu[n]},100$n-1020" >sys/devices/system/node/node$n/cpulist
done
program nvidia-smi <<SH
#!/usr/bin/env bash
[ "\$*" = "--query-gpu=index,uuid,pci.bus_id --format=csv,noheader" ] && cat $work/gpus
SH
export MUONSHARD_SYSFS=$work/sys MUONSHARD_BIND_VERBOSE=1
# shellcheck disable=SC2016 # the shell that is bound reads it
told='echo "nic=${UCX_NET_DEVICES-} visible=${CUDA_VISIBLE_DEVICES-} order=${CUDA_DEVICE_ORDER-} cpus=$(taskset -cp $$ | sed "s/.*: //")"'
bound() { # NAME [VARIABLE=VALUE...]
    local name=$1
    shift
    runs "$name" 0 env "$@" "$launch/bind.sh" bash -c "$told"
}
for i in 0 3 4 7; do
    bound "rank $i" OMPI_COMM_WORLD_LOCAL_RANK=$i
    says "rank $i: the NIC of its switch, the CPUs of its node, all GPUs" \
        "^nic=mlx5_$((7 - i)):1 visible= order=PCI_BUS_ID cpus=${cpu[i / 4]}$" stdout
done
says "one line" "^bind.sh: .*, local rank 7: GPU 7 at 0000:df:00.0, NUMA node 1, NIC mlx5_0:1, CPUs ${cpu[1]}$" stderr
bound "srun" SLURM_LOCALID=2
says "srun's number" "^nic=mlx5_5:1 " stdout
bound "indices" OMPI_COMM_WORLD_LOCAL_RANK=1 CUDA_VISIBLE_DEVICES=6,5
says "the visible ones count" "^nic=mlx5_2:1 visible=6,5 " stdout
bound "UUIDs" OMPI_COMM_WORLD_LOCAL_RANK=0 CUDA_VISIBLE_DEVICES=GPU-00000004
says "by UUID" "^nic=mlx5_3:1 visible=GPU-00000004 " stdout
bound "one for all" OMPI_COMM_WORLD_LOCAL_RANK=5 CUDA_VISIBLE_DEVICES=3
says "the only one, for every rank" "^nic=mlx5_4:1 " stdout
bound "UCX_NET_DEVICES" OMPI_COMM_WORLD_LOCAL_RANK=0 UCX_NET_DEVICES=mlx5_9:1
says "what is set stays" "^nic=mlx5_9:1 " stdout
bound "order" OMPI_COMM_WORLD_LOCAL_RANK=0 CUDA_DEVICE_ORDER=FASTEST_FIRST
says "an order nvidia-smi does not know" "nothing bound, for CUDA_DEVICE_ORDER is FASTEST_FIRST" stderr
bound "MIG" OMPI_COMM_WORLD_LOCAL_RANK=0 CUDA_VISIBLE_DEVICES=MIG-1234
says "a part of a GPU" "nothing bound, for $work/sys does not know GPU MIG-1234" stderr
# A port that is down: next come those of the same node, by turns.
echo "1: DOWN" >sys/class/infiniband/mlx5_7/ports/1/state
bound "down" OMPI_COMM_WORLD_LOCAL_RANK=0
says "a port that is down" "^nic=mlx5_[456]:1 " stdout
if [ "${cpu[0]}" != "${cpu[1]}" ]; then
    runs "bound already" 0 env OMPI_COMM_WORLD_LOCAL_RANK=0 taskset -c "${cpu[1]}" "$launch/bind.sh" bash -c "$told"
    says "the launcher's binding stays" " cpus=${cpu[1]}$" stdout
fi
runs "its code" 7 env OMPI_COMM_WORLD_LOCAL_RANK=0 "$launch/bind.sh" bash -c 'exit 7'
rm bin/nvidia-smi
# shellcheck disable=SC2123 # a machine without it, even where this one has it
bound "no GPU" PATH="$(dirname "$(command -v env)"):/bin" OMPI_COMM_WORLD_LOCAL_RANK=1
if ! PATH=/usr/bin:/bin command -v nvidia-smi >/dev/null; then
    says "no GPU: only the command" "^nic= visible= order= " stdout
    says "no GPU: says so" "no GPU, nothing bound" stderr
fi
unset MUONSHARD_SYSFS MUONSHARD_BIND_VERBOSE

# ---- slurm.sbatch ----
program scontrol <<'SH'
#!/usr/bin/env bash
echo "scontrol $*" >>slurm.log
SH
# Ends with FAKE_CODE at once, or, with FAKE_WAIT, when it is told a signal.
program srun <<'SH'
#!/usr/bin/env bash
echo "srun $*" >>slurm.log
[ -n "${FAKE_WAIT-}" ] || exit "$FAKE_CODE"
trap 'echo "srun: USR1" >>slurm.log; exit "$FAKE_CODE"' USR1
trap 'echo "srun: TERM" >>slurm.log; exit "$FAKE_CODE"' TERM
echo ready >>slurm.log
for _ in $(seq 200); do sleep 0.05; done
exit 99
SH
cp "$launch/slurm.sbatch" script # Slurm runs a copy
export SLURM_JOB_ID=4711 SLURM_JOB_NUM_NODES=2 SLURM_CPUS_ON_NODE=32 SLURM_GPUS_ON_NODE=8 SLURM_SUBMIT_DIR=${launch%/*}
# job NAME CODE SIGNALS [VARIABLE=VALUE...]: the script's exit code when the job's shell gets the signals
job() {
    local name=$1 code=$2 signals=$3 pid got=0
    shift 3
    : >slurm.log
    env "$@" bash script config.yaml train.steps=5 >stdout 2>stderr &
    pid=$!
    for signal in $signals; do
        for _ in $(seq 100); do
            ! grep -q ready slurm.log || break
            sleep 0.05
        done
        kill "-$signal" $pid
    done
    wait $pid || got=$?
    [ $got -eq "$code" ] || failed "$name: exit code $got, wanted $code"
}
job "finished" 0 "" FAKE_CODE=0
says "a rank a GPU, through bind.sh" \
    "^srun --mpi=pmix --ntasks-per-node=8 --ntasks=16 --cpus-per-task=4 --kill-on-bad-exit=1 --cpu-bind=none $launch/bind.sh muonshard train --resume auto config.yaml train.steps=5$" slurm.log
silent "finished: not queued again" scontrol slurm.log
job "failed" 18 "" FAKE_CODE=18
silent "failed without a warning: not queued again" scontrol slurm.log
job "warned, and could not save" 15 USR1 FAKE_CODE=15 FAKE_WAIT=1
silent "warned, and could not save: not queued again" scontrol slurm.log
job "warned" 4 USR1 FAKE_CODE=4 FAKE_WAIT=1
says "the warning reaches the run" "^srun: USR1$" slurm.log
says "warned: queued again" "^scontrol requeue 4711$" slurm.log
job "warned and finished" 0 USR1 FAKE_CODE=0 FAKE_WAIT=1
says "warned and finished: told" "^srun: USR1$" slurm.log
silent "warned and finished: not queued again" scontrol slurm.log
job "often enough" 4 USR1 FAKE_CODE=4 FAKE_WAIT=1 SLURM_RESTART_COUNT=3 MUONSHARD_REQUEUES=3
silent "not without end" scontrol slurm.log
says "not without end: says so" "queued again 3 times already" stderr
job "more often" 4 USR1 FAKE_CODE=4 FAKE_WAIT=1 SLURM_RESTART_COUNT=3 MUONSHARD_REQUEUES=4
says "as often as it is told" "^scontrol requeue 4711$" slurm.log
job "cancelled" 143 TERM FAKE_CODE=143 FAKE_WAIT=1
says "a cancelled job ends its run" "^srun: TERM$" slurm.log
silent "cancelled: not queued again" scontrol slurm.log
job "tasks" 0 "" FAKE_CODE=0 SLURM_NTASKS_PER_NODE=4 MUONSHARD_SRUN_MPI=pmi2 MUONSHARD=/opt/muonshard
says "tasks, PMI and command as told" "^srun --mpi=pmi2 --ntasks-per-node=4 --ntasks=8 .* /opt/muonshard train" slurm.log
mkdir stand_in
cp "$launch/bind.sh" stand_in
printf '#!/usr/bin/env bash\necho "run_hosts $*" >>slurm.log\nexit 5\n' >stand_in/run_hosts.sh
chmod +x stand_in/run_hosts.sh
job "mpirun" 5 "" MUONSHARD_LAUNCHER=mpirun MUONSHARD_LAUNCH="$work/stand_in"
says "through mpirun" "^run_hosts --ranks-per-host 8 muonshard train --resume auto config.yaml train.steps=5$" slurm.log
job "another launcher" 2 "" MUONSHARD_LAUNCHER=prun
says "another launcher" '"prun", neither srun nor mpirun' stderr
job "elsewhere" 2 "" SLURM_SUBMIT_DIR=/nowhere
says "elsewhere" "/nowhere/launch/bind.sh is not there" stderr
runs "no config" 2 bash script
says "no config" "usage" stderr
says "warned early enough" "^#SBATCH --signal=B:USR1@[0-9]+$" script

[ $failures -eq 0 ] || { echo "$failures failures"; exit 1; }
