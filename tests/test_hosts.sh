#!/usr/bin/env bash
# Several hosts for real: three network namespaces on a bridge, each with an address, a host name and an MPI daemon of its own;
# mpirun stands in a fourth. Jobs are started by launch/run_hosts.sh; in the place of ssh there is `ip netns exec`.
#   test_hosts.sh MUONSHARD LAUNCH_DIRECTORY MPIEXEC
# Exit code 77: no namespaces can be made here, nothing was tested.
set -euo pipefail

muonshard=$(realpath "$1")
launch=$(realpath "$2")
PATH=$(dirname "$3"):$PATH
work=$(mktemp -d)
net=muonshard$$ # namespaces of this run begin with it

skip() {
    echo "SKIPPED, nothing was tested on several hosts: $1"
    exit 77
}
left() { # what still runs in the namespaces
    local name
    for name in head host1 host2 host3; do ip netns pids "$net-$name" 2>/dev/null || true; done
}
# shellcheck disable=SC2317 # the trap calls it
clean() {
    local name
    # shellcheck disable=SC2046 # numbers
    kill -9 $(left) 2>/dev/null || true
    for name in head host1 host2 host3; do ip netns delete "$net-$name" 2>/dev/null || true; done
    rm -rf "$work"
}
trap clean EXIT
cd "$work"
command -v ip >/dev/null || skip "there is no ip (package iproute2)"
[ "$(id -u)" -eq 0 ] || skip "only root makes network namespaces"
ip netns add "$net-head" 2>stderr || skip "$(cat stderr)"
unshare --uts true 2>stderr || skip "$(cat stderr)"
ip -n "$net-head" link add bridge type bridge 2>stderr || skip "$(cat stderr)"

# ---- the network ----
subnet=10.77.0 # known inside the namespaces only
address() { echo "$subnet.1$1"; }
ip -n "$net-head" link set lo up
ip -n "$net-head" address add $subnet.1/24 dev bridge
ip -n "$net-head" link set bridge up
mkdir head text
for i in 1 2 3; do
    name=$net-host$i
    ip netns add "$name"
    ip -n "$name" link set lo up
    ip -n "$net-head" link add "port$i" type veth peer name eth0 netns "$name"
    ip -n "$net-head" link set "port$i" master bridge up
    ip -n "$name" address add "$(address "$i")/24" dev eth0
    ip -n "$name" link set eth0 up
    mkdir "host$i"
done
# In the place of ssh: agent ADDRESS COMMAND...
cat >agent <<SH
#!/usr/bin/env bash
name=host\${1#$subnet.1}
shift
export TMPDIR=$work/\$name
exec ip netns exec "$net-\$name" unshare --uts bash -c 'hostname "\$0"; eval "\$*"' "\$name" "\$@"
SH
chmod +x agent
export OMPI_MCA_plm_rsh_agent=$work/agent OMPI_MCA_oob_tcp_if_include=$subnet.0/24 OMPI_MCA_btl_tcp_if_include=$subnet.0/24
export OMPI_MCA_pml=ob1 OMPI_MCA_btl=tcp,vader,self MUONSHARD_THREADS=1 MUONSHARD_JOB_TIMEOUT=100
# As from a shell on the machine of mpirun.
from_head() {
    # shellcheck disable=SC2016 # the inner shell reads it
    TMPDIR=$work/head ip netns exec "$net-head" unshare --uts bash -c 'hostname head; exec "$@"' _ "$@"
}

# ---- checks ----
failures=0
failed() {
    failures=$((failures + 1))
    echo "FAIL  $1"
    sed 's/^/      /' stdout stderr
}
says() { if grep -qE -- "$2" "$3"; then echo "ok    $1"; else failed "$1: no line matches $2"; fi; }
# hosts NAME RANKS_PER_HOST HOST,HOST... COMMAND...: has to succeed
hosts() {
    local name=$1 ranks=$2 list=$3 code=0
    shift 3
    from_head "$launch/run_hosts.sh" --ranks-per-host "$ranks" --hosts "$list" "$@" >stdout 2>stderr || code=$?
    [ $code -eq 0 ] || failed "$name: exit code $code"
}
within() { # SECONDS, from $start, until COMMAND prints nothing
    local until=$((start + $1))
    shift
    while [ -n "$("$@")" ]; do
        [ "$(date +%s)" -lt $until ] || return 1
        sleep 0.2
    done
}
nothing_left() { # NAME SECONDS
    start=$(date +%s)
    if within "$2" left; then echo "ok    $1: nothing is left running"; else failed "$1: left running: $(left)"; fi
}
two=$(address 1),$(address 2)
three=$two,$(address 3)

# shellcheck disable=SC2016 # a rank's shell reads it
hosts "hosts" 2 "$two" bash -c 'echo "$(hostname) $(hostname -I) rank $OMPI_COMM_WORLD_RANK, $OMPI_COMM_WORLD_LOCAL_RANK of $OMPI_COMM_WORLD_LOCAL_SIZE"'
for rank in 0 1 2 3; do
    host=$((rank / 2 + 1))
    says "rank $rank is on host $host" "^host$host $(address $host) +rank $rank, $((rank % 2)) of 2$" stdout
done

cat >model.yaml <<'YAML'
model: small
tensors:
  - {name: w, role: matrix, shape: [7, 96, 64]}
  - {name: v, role: matrix, shape: [2, 64, 160]}
  - {name: b, role: elementwise, shape: [3000]}
YAML
hosts "bench, 3 hosts" 1 "$three" "$muonshard" bench step model.yaml -n 3 -w 1
says "bench step on 3 hosts: nothing wrong" "^ +3 +9 .* 0$" stdout
hosts "bench, 2 hosts of 2" 2 "$two" "$muonshard" bench step model.yaml -n 3 -w 1
says "bench step on 2 hosts of 2 ranks: nothing wrong" "^ +4 +9 .* 0$" stdout

for i in $(seq 1 2000); do
    echo "Line $i: $((i * 7919 % 1009)) green bottles hang on wall number $((i % 12))."
done >text/bottles.txt
cat >tiny.yaml <<'YAML'
preset: jordan
ns_dtype: fp32
adam.lr: 3e-3
model: {layers: 2, width: 32, heads: 2, context: 32}
data: {files: ["text/*.txt"], val_fraction: 0.1}
train: {steps: 30, batch: 12, warmup: 3, eval_every: 10, eval_windows: 20}
YAML
losses() { sed -n 's/^{"step":\([0-9]*\),.*"train_loss":\([^,}]*\).*/\1 \2/p' "$1"; }
hosts "train, 1 host" 2 "$(address 1)" "$muonshard" train tiny.yaml train.log=one.jsonl
hosts "train, 2 hosts" 1 "$two" "$muonshard" train tiny.yaml train.log=two.jsonl
if [ "$(losses one.jsonl | wc -l)" -eq 30 ] && cmp -s <(losses one.jsonl) <(losses two.jsonl); then
    echo "ok    train: 2 ranks on 2 hosts have the losses of 2 ranks on one, to the last digit"
else
    failed "train: other losses on 2 hosts: $(diff <(losses one.jsonl) <(losses two.jsonl) | head -n 4)"
fi
nothing_left "jobs that finished" 10

# ---- a host that is cut off ----
ranks_on() { # HOST: processes of muonshard there
    local pid
    for pid in $(ip netns pids "$net-host$1"); do
        [ "$(cat "/proc/$pid/comm" 2>/dev/null)" != muonshard ] || echo "$pid"
    done
}
steps() { grep -c '"step"' endless.jsonl 2>/dev/null || true; }
# cut NAME SECONDS key=value...: the third host is cut off while it trains; the job has to fail within so many seconds
cut() {
    local name=$1 limit=$2 job code=0 waited
    shift 2
    rm -f endless.jsonl
    from_head "$launch/run_hosts.sh" --ranks-per-host 1 --hosts "$three" "$muonshard" train tiny.yaml train.steps=1000000 \
        train.eval_every=0 train.log=endless.jsonl train.progress=off "$@" >stdout 2>stderr &
    job=$!
    for _ in $(seq 300); do
        [ "$(steps || true)" = "" ] || [ "$(steps)" -lt 5 ] || break
        sleep 0.1
    done
    [ "$(ranks_on 3 | wc -l)" -eq 1 ] || failed "$name: no rank on host 3"
    start=$(date +%s)
    ip -n "$net-head" link set port3 down
    wait $job 2>>stderr || code=$?
    waited=$(($(date +%s) - start))
    if [ $code -ne 0 ] && [ $waited -le "$limit" ]; then
        echo "ok    $name: ended after $waited s with $code"
    else
        failed "$name: ended after $waited s with $code"
    fi
    if within "$limit" ranks_on 3; then echo "ok    $name: the rank there ended"; else failed "$name: a rank is left there"; fi
}

# The library is the first to see it: its deadline is shorter than the launcher's.
MUONSHARD_HOST_TIMEOUT=7 cut "a short deadline" 25 timeout=3 first_timeout=3
says "a short deadline: who was where" "^muonshard: rank [01] of 3 .*host[12].*: no completion within 3 s; .*the ranks of this host are well: who is missing is on another" stderr
says "a short deadline: mpirun is not waited for" "^run_hosts.sh: no answer from $(address 3) " stderr
# The daemon there has an answer outstanding, too; it sees what happened when the network is back.
ip -n "$net-head" link set port3 up
nothing_left "a short deadline" 60

# MPI's daemons are the first. On both sides: nothing is left even while the host is away.
MUONSHARD_HOST_TIMEOUT=4 cut "a long deadline" 20 timeout=100 first_timeout=100
says "a long deadline: mpirun names the host" "$(address 3)" stderr
nothing_left "a long deadline" 20

[ $failures -eq 0 ] || { echo "$failures failures"; exit 1; }
