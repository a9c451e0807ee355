#!/usr/bin/env bash
# Prints two numbers: the cores this process may use, and as how many cores they count where a container has only a share of their time.
# Cores, not hardware threads.
set -euo pipefail

cpus=$(nproc)
cores=$(taskset -cp $$ | sed 's/.*: //' | tr ',' '\n' | awk -F- '{ for (i = $1; i <= $NF; i++) print i }' |
    sed 's,.*,/sys/devices/system/cpu/cpu&/topology/thread_siblings_list,' | xargs cat 2>/dev/null | sort -u | wc -l) || cores=0
[ "$cores" -gt 0 ] || cores=$cpus
counted=$cores
if read -r quota period 2>/dev/null <"${MUONSHARD_SYSFS:-/sys}/fs/cgroup/cpu.max" && [ "$quota" != max ]; then
    time=$(((quota + period - 1) / period))
    [ "$time" -ge "$cores" ] || counted=$time
fi
echo "$cores $counted"
