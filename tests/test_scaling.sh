#!/usr/bin/env bash
# launch/scaling.sh and what report makes of steps over ranks: efficiencies recomputed from the JSON, measured and simulated files
# mixed, names that would be markup or commands, runs that fail, all three launchers (srun is a stand-in that starts mpirun).
#   test_scaling.sh MUONSHARD LAUNCH_DIRECTORY
# shellcheck disable=SC2016 # nothing in quotes is to be expanded
set -u

muonshard=$(realpath "$1") || exit 1
launch=$(realpath "$2") || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
# What this runs in must not show through.
for name in $(compgen -e); do
    case $name in SLURM_* | OMPI_* | MUONSHARD*) unset "$name" ;; esac
done
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OPENBLAS_NUM_THREADS=1 MUONSHARD_THREADS=1 MUONSHARD_JOB_TIMEOUT=100 MUONSHARD="$muonshard"

failures=0
ok() { echo "ok    $1"; }
failed() {
    failures=$((failures + 1))
    echo "FAIL  $1"
    sed 's/^/      /' stdout stderr | head -n 60
}
# says NAME PATTERN FILE; never NAME PATTERN FILE: whether a line matches the extended regular expression
says() { if grep -qE -- "$2" "$3"; then ok "$1"; else failed "$1: no line matches $2"; fi; }
never() { if grep -qE -- "$2" "$3"; then failed "$1: a line matches $2"; else ok "$1"; fi; }
# runs NAME CODE COMMAND...
runs() {
    local name=$1 code=$2 got=0
    shift 2
    "$@" >stdout 2>stderr || got=$?
    if [ $got -eq "$code" ]; then ok "$name"; else failed "$name: exit code $got, wanted $code"; fi
}
rows() { grep -cE '^ +[0-9]' "$1"; } # FILE: of a table
median() { awk '/"step_us"/ { inside = 1 } inside && /"median"/ { gsub(/[",]/, ""); print $2; exit }' "$1"; }
# efficient NAME TABLE DIR STEM SCALING MODEL: the model's rows have the efficiencies that the medians in DIR/STEM-SCALING-RANKS.json
# make.
efficient() {
    local ranks wanted got first
    first=$(median "$3/$4-$5-1.json")
    for ranks in 1 2 4; do
        wanted=$(awk -v a="$first" -v b="$(median "$3/$4-$5-$ranks.json")" -v r="$ranks" -v s="$5" \
            'BEGIN { printf "%.1f", 100 * a / b / (s == "weak" ? 1 : r) }')
        got=$(MODEL="$6, $5, measured" awk -v r="$ranks" '
            /^#/ { inside = index($0, ENVIRON["MODEL"]) == 3 }
            inside && $1 == r { print $16 }' "$2")
        if [ "$got" = "$wanted" ]; then
            ok "$1: $ranks ranks, $got %"
        else
            failed "$1: at $ranks ranks the table has '$got', the medians make '$wanted'"
        fi
    done
}

cat >"tiny model's.yaml" <<'YAML'
model: tiny
tensors:
  - {name: w, role: matrix, shape: [4, 64, 96]}
  - {name: b, role: elementwise, shape: [500]}
YAML
hostile='<b>"other"</b> `touch ran` $(touch ran) \ {x}_y^2'
cat >other.yaml <<YAML
model: $hostile
tensors:
  - {name: w, role: matrix, shape: [2, 64, 64], dtype: bf16}
YAML
few=(-n 3 -w 1)

# ---- a sweep, both ways ----
runs "a sweep" 0 "$launch/scaling.sh" --ranks 1,2,4 --both --out sweep "tiny model's.yaml" other.yaml -- "${few[@]}"
cp stdout table
says "progress" "^\[12/12\] other, weak, 4 ranks: [0-9]+ s$" stderr
[ "$(rows table)" -eq 12 ] && ok "a row a run" || failed "$(rows table) rows"
says "columns" "^# +ranks matrices +bytes +type +step +rs +momentum +ns +ag +apply +rs_busbw +ag_busbw +ns +exposed imbalance efficiency +#wrong$" table
says "units" "\(B\) +\(us\) .*\(GB/s\) +\(GB/s\) +\(TFLOP/s\) +\(%\) +\(%\)$" table
says "strong: the same matrices, nothing wrong" "^ +4 +4 +$((4 * (4 * 64 * 96 + 500))) +fp32 .* 0$" table
says "weak: four times as many" "^ +4 +16 +$((16 * (4 * 64 * 96 + 500))) +fp32 .* 0$" table
says "what it was measured on" "^# tiny, strong, measured on $(hostname): .* kernels, threads a rank 1$" table
efficient "strong" table sweep "tiny model's" strong tiny
efficient "weak" table sweep "tiny model's" weak tiny
efficient "another model" table sweep other weak "$hostile"
page=sweep/report.html
# A model: speed-up, efficiency, 2 breakdowns, 6 timelines.
[ "$(grep -c '<svg' $page)" -eq 20 ] && [ "$(grep -c '</svg>' $page)" -eq 20 ] && ok "20 pictures" || failed "$(grep -c '<svg' $page) pictures"
for scaling in strong weak; do
    labels=$(grep -cF "$scaling, measured on $(hostname)" $page)
    [ "$labels" -ge 6 ] && ok "$scaling: labelled in pictures, table and timelines" || failed "$scaling: $labels labels"
done
says "a heading a model, as text" '<h2>Optimizer steps: &lt;b&gt;&quot;other&quot;&lt;/b&gt; `touch ran` \$\(touch ran\) \\ \{x\}_y\^2</h2>' $page
never "no markup from a file" "<b>" $page
never "nothing from elsewhere, no script" "<script|src=|href=.http|url\(http|@import" $page
[ ! -e ran ] && [ ! -e sweep/ran ] && ok "no name was run" || failed "a model's name was run"

# ---- simulated beside measured ----
# simulate IN OUT HOST ORIGIN, as muonshard plan writes it; HOST is JSON
simulate() {
    sed -e 's/"measured": true/"measured": 0, "origin": "'"$4"'"/' -e "s|\"host\": \".*\"|\"host\": \"$3\"|" -e 's/"cpu": ".*"/"cpu": "data sheet"/' \
        -e 's/"kernels": ".*"/"kernels": "simulated"/' -e 's/"blas": ".*"/"blas": ""/' -e 's/"wrong": .*,/"wrong": null,/' "$1" >"$2"
}
for n in 1 2 4; do
    simulate "sweep/tiny model's-strong-$n.json" sheet$n.json 'h<script>alert(1)</script>\\"\\\\`touch ran`' datasheet
    simulate "sweep/tiny model's-strong-$n.json" calibrated$n.json here measured
done
runs "simulated and measured" 0 "$muonshard" report "sweep/tiny model's-strong-"*.json sheet?.json calibrated?.json --out mixed.html
[ "$(rows stdout)" -eq 9 ] && ok "nine rows" || failed "$(rows stdout) rows"
[ "$(grep -c '^# tiny, strong' stdout)" -eq 3 ] && ok "three series" || failed "not three series"
says "measured comes first" "^# tiny, strong, measured on" <(grep '^# tiny' stdout | head -n 1)
says "from a data sheet" '^# tiny, strong, simulated for h<script>alert\(1\)</script>"\\`touch ran` \(datasheet\): data sheet$' stdout
says "from measured rates" '^# tiny, strong, simulated for here \(calibrated\): data sheet$' stdout
says "#wrong is not known" "^ +4 .* -$" stdout
says "dashed and open: in the legend" '<text.*strong, simulated for here \(calibrated\)' mixed.html
says "the label as text" 'simulated for h&lt;script&gt;alert\(1\)&lt;/script&gt;&quot;\\`touch ran` \(datasheet\)' mixed.html
never "no script" "<script" mixed.html
[ "$(grep -c '<svg' mixed.html)" -eq $((2 + 3 + 9)) ] && ok "14 pictures" || failed "$(grep -c '<svg' mixed.html) pictures"
[ ! -e ran ] && ok "no machine's name was run" || failed "a machine's name was run"
sed 's/ns_dtype: fp32/ns_dtype: bf16/' "sweep/tiny model's-strong-2.json" >bf16.json
runs "other settings" 0 "$muonshard" report "sweep/tiny model's-strong-"*.json bf16.json --out bf16.html
says "are another series" "^# tiny, strong, measured on .*, ns_dtype: bf16: " stdout
printf '%s' "$(cat "sweep/tiny model's-strong-2.json")" | sed 's/"model": "tiny"/"model": "a\\u001b[31m\\u009b\\nb"/' >control.json
runs "control characters" 0 "$muonshard" report control.json --out control.html
says "don't reach the terminal" '^# a\?\[31m\?\?b, strong' stdout

sed 's/"agree": .*,/"agree": null,/; s/_gbs": .*,/_gbs": null,/; s/"timeline": \[/"timeline": [], "other": [/' sheet2.json >nulls.json
runs "what isn't known" 0 "$muonshard" report nulls.json --out nulls.html
says "is a dash" "^ +2 .* - +- .* -$" stdout
[ "$(grep -c '<svg' nulls.html)" -eq 1 ] && ok "one rank count: the breakdown alone" || failed "$(grep -c '<svg' nulls.html) pictures"

# refused NAME PATTERN SED-COMMAND
refused() {
    sed "$3" sheet2.json >bad.json
    runs "$1" 12 "$muonshard" report bad.json --out none.html
    says "$1: why" "bad.json: $2" stderr
}
refused "no origin" '"origin" of what is simulated' 's/"origin": "datasheet"/"origin": "guess"/'
refused "neither measured nor not" '"measured"' 's/"measured": 0/"measured": 2/'
refused "another scaling" 'row 0: "scaling"' 's/"scaling": "strong"/"scaling": "sideways"/'
refused "no ranks" 'row 0: "ranks"' 's/   "ranks": 2/   "ranks": 0/'
refused "no time" 'row 0: "step_us.median"' 's/"median": .*,/"median": 0,/'
refused "no host" '"machine.host"' 's/"host": ".*"/"host": ""/'

# ---- a run that fails; plan beside it ----
cat >muonshard.sh <<SH
#!/usr/bin/env bash
case \$1\${OMPI_COMM_WORLD_SIZE-} in
bench2) echo "out of memory, say" >&2; exit 9 ;;
plan)
    [ "\$2" != --help ] || { printf 'Options:\n  -J FILE   write\n'; exit; }
    echo "\$@" >plan.log
    while [ "\$1" != -J ]; do shift; done
    exec cp calibrated4.json "\$2" ;;
esac
exec "$muonshard" "\$@"
SH
chmod +x muonshard.sh
touch machine.yaml
MUONSHARD=$work/muonshard.sh runs "a run fails" 1 "$launch/scaling.sh" --ranks 1,2,4 --both --machine machine.yaml --out fails "tiny model's.yaml" -- \
    "${few[@]}" ns_steps=3
says "says so at once" "^\[2/6\] tiny model's, strong, 2 ranks: failed after [0-9]+ s, exit code 9; the end of fails/tiny model's-strong-2.log:$" stderr
says "with the end of its log" "^    out of memory, say$" stderr
says "and at the end" "^scaling.sh: 2 failed:$" stderr
says "by name" "^    tiny model's-weak-2 \(exit code 9\)$" stderr
[ "$(rows stdout)" -eq 5 ] && ok "the others are in the table" || failed "$(rows stdout) rows"
says "plan is asked for the same ranks" "^plan tiny model's.yaml --ranks 1,2,4 --machine machine.yaml -J .* ns_steps=3( threads=1)?$" plan.log
never "and not for what it can't" "--weak" plan.log
says "which is said" "no --weak: weak scaling isn't simulated" stderr
says "simulated rows in the table" "simulated for here \(calibrated\)" stdout
MUONSHARD=/bin/false runs "nothing works" 1 "$launch/scaling.sh" --ranks 1 --out nothing other.yaml
says "no results" "there are no results" stderr

# ---- launchers ----
printf 'localhost slots=2\n' >hosts
runs "hosts" 0 "$launch/scaling.sh" --hosts hosts --out on_hosts other.yaml -- "${few[@]}"
[ "$(rows stdout)" -eq 2 ] && ok "to the slots there are" || failed "$(rows stdout) rows"
runs "more than the hosts have" 2 "$launch/scaling.sh" --hosts hosts --ranks 4 --out on_hosts other.yaml
mkdir bin
cat >bin/srun <<'SH'
#!/usr/bin/env bash
echo "$@" >>srun.log
while [[ $1 == -* ]]; do
    case $1 in --ntasks=*) ranks=${1#*=} ;; esac
    shift
done
exec mpirun --timeout 100 -n "$ranks" --bind-to none "$@"
SH
chmod +x bin/srun
PATH=$work/bin:$PATH SLURM_NTASKS=3 SLURM_JOB_NUM_NODES=2 SLURM_CPUS_ON_NODE=8 SLURM_JOB_ID=7 runs "srun" 0 "$launch/scaling.sh" --out slurm \
    other.yaml -- "${few[@]}"
[ "$(rows stdout)" -eq 3 ] && ok "1, 2 and the 3 tasks there are" || failed "$(rows stdout) rows"
says "on as few nodes as hold them" "^--mpi=pmix --ntasks=2 --nodes=1 .*$launch/bind.sh $muonshard bench step other.yaml" srun.log
says "all nodes" "^--mpi=pmix --ntasks=3 --nodes=2 --ntasks-per-node=2 --cpus-per-task=1 --kill-on-bad-exit=1 $launch/bind.sh" srun.log

runs "no model" 2 "$launch/scaling.sh"
runs "an unknown option" 2 "$launch/scaling.sh" --rank 2 other.yaml
runs "no such launcher" 2 "$launch/scaling.sh" --launcher ssh other.yaml
runs "ranks that are none" 2 "$launch/scaling.sh" --ranks 1,,2 other.yaml
runs "no such model" 2 "$launch/scaling.sh" absent.yaml
MUONSHARD=./absent runs "no command" 2 "$launch/scaling.sh" other.yaml

echo "$failures failed"
[ $failures -eq 0 ]
