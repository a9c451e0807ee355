#!/usr/bin/env bash
# Runs a rank's command close to its GPU: bind.sh COMMAND [ARGUMENT...], started by mpirun or srun once a rank.
# The GPU is the one the library will take: of the visible ones, that of the rank's number on this host. All stay visible, because the
# library chooses itself and sees by their UUIDs whether two ranks have the same. Without a GPU this only runs the command.
#   MUONSHARD_BIND_VERBOSE=1  says in a line what was done
#   MUONSHARD_SYSFS           where /sys is (for tests)
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: bind.sh COMMAND [ARGUMENT...]" >&2
    exit 2
fi
sysfs=${MUONSHARD_SYSFS:-/sys}
rank=${OMPI_COMM_WORLD_LOCAL_RANK:-${SLURM_LOCALID:-0}}

say() { [ "${MUONSHARD_BIND_VERBOSE-}" != 1 ] || echo "bind.sh: $HOSTNAME, local rank $rank: $1" >&2; }
run_unbound() {
    say "$1"
    shift
    exec "$@"
}

gpus=$(nvidia-smi --query-gpu=index,uuid,pci.bus_id --format=csv,noheader 2>/dev/null) || gpus=
[ -n "$gpus" ] || run_unbound "no GPU, nothing bound" "$@"
# The order of nvidia-smi; CUDA's own begins with the fastest.
export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID}
if [ "$CUDA_DEVICE_ORDER" != PCI_BUS_ID ]; then
    run_unbound "nothing bound, for CUDA_DEVICE_ORDER is $CUDA_DEVICE_ORDER" "$@"
fi

# Index or UUID of the rank's GPU.
if [ -n "${CUDA_VISIBLE_DEVICES-}" ]; then
    IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
else
    mapfile -t visible < <(cut -d, -f1 <<<"$gpus")
fi
gpu=${visible[rank % ${#visible[@]}]// /}
bus=$(awk -F', *' -v g="$gpu" '$1 == g || (g ~ /^GPU-/ && index($2, g) == 1) { print tolower($3); exit }' <<<"$gpus")
bus=0000:${bus#*:}
[ -e "$sysfs/bus/pci/devices/$bus" ] || run_unbound "nothing bound, for $sysfs does not know GPU $gpu" "$@"

node_of() { cat "$1/numa_node" 2>/dev/null || echo -1; } # -1: the machine does not say

# The nearest of the NICs that have a working port: more of the way from the root of PCI in common, then the same NUMA node. Ranks
# to which several are as near take them by turns. Where there is InfiniBand, Ethernet is another network and left alone.
gpu_path=$(realpath "$sysfs/bus/pci/devices/$bus")
node=$(node_of "$gpu_path")
nearest_nic() {
    local nic path port layer common near
    for nic in "$sysfs"/class/infiniband/*; do
        for port in "$nic"/ports/*; do
            grep -q ACTIVE "$port/state" 2>/dev/null || continue
            path=$(realpath "$nic/device")
            layer=$(cat "$port/link_layer" 2>/dev/null) || layer=InfiniBand
            common=$(awk -v a="${gpu_path#"$(realpath "$sysfs")"/}" -v b="${path#"$(realpath "$sysfs")"/}" 'BEGIN {
                n = split(a, x, "/"); split(b, y, "/"); i = 0
                while (i < n && x[i + 1] == y[i + 1]) i++
                print (i > 1 ? i - 1 : 0) }') # "devices" is common to all
            near=0
            [ "$node" -lt 0 ] || [ "$(node_of "$path")" -ne "$node" ] || near=1
            [ $((common + near)) -eq 0 ] || echo "$layer $((2 * common + near)) ${nic##*/}:${port##*/}"
        done
    done | awk -v rank="$rank" '
        { layer[NR] = $1; score[NR] = $2; name[NR] = $3; if ($1 == "InfiniBand") fabric = 1 }
        END {
            for (i = 1; i <= NR; i++)
                if ((!fabric || layer[i] == "InfiniBand") && score[i] >= best) {
                    if (score[i] > best) n = 0
                    best = score[i]; list[n++] = name[i]
                }
            if (n) print list[rank % n]
        }'
}
nic=$(nearest_nic)
did="GPU $gpu at $bus, NUMA node $node"
if [ -n "${UCX_NET_DEVICES-}" ]; then
    did+=", UCX_NET_DEVICES was $UCX_NET_DEVICES"
elif [ -n "$nic" ]; then
    export UCX_NET_DEVICES=$nic
    did+=", NIC $nic"
else
    did+=", no NIC near"
fi

# CPUs of the GPU's node, of those the launcher left to this rank. If it left none there, it knows why.
expand() { tr ',' '\n' | awk -F- '{ for (i = $1; i <= $NF; i++) print i }' | sort; }
mine=$(taskset -cp $$ | sed 's/.*: //')
near=
if [ "$node" -ge 0 ]; then
    near=$(comm -12 <(expand <<<"$mine") <(expand <"$sysfs/devices/system/node/node$node/cpulist") | sort -n | paste -sd,)
fi
if [ -n "$near" ]; then
    taskset -cp "$near" $$ >/dev/null
    say "$did, CPUs $near"
else
    say "$did, CPUs $mine as they were"
fi
exec "$@"
