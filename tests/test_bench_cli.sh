#!/usr/bin/env bash
# muonshard bench and report from outside: the tables, the JSON, the page made of it, and what they refuse.
#   test_bench_cli.sh MUONSHARD MPIEXEC
set -u

muonshard=$(realpath "$1") || exit 1
mpiexec=$2
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none OPENBLAS_NUM_THREADS=1

failures=0
failed() {
    failures=$((failures + 1))
    echo "FAIL  $1"
    sed 's/^/      /' stdout stderr | head -n 40
}
# says NAME PATTERN [FILE]: a line of the last output, or of FILE, matches the extended regular expression
says() { if grep -qE -- "$2" "${3-stdout}"; then echo "ok    $1"; else failed "$1: no line matches $2"; fi; }
never() { if grep -qE -- "$2" "$3"; then failed "$1: a line matches $2"; else echo "ok    $1"; fi; }
# runs COMMAND...
runs() { "$@" >stdout 2>stderr || failed "$*: exit code $?"; }
# refused NAME CODE PATTERN COMMAND...
refused() {
    local name=$1 code=$2 pattern=$3
    shift 3
    "$@" >stdout 2>stderr
    local got=$?
    if [ $got -eq "$code" ] && grep -qF -- "$pattern" stderr; then
        echo "ok    $name"
    else
        failed "$name: exit code $got, wanted $code and '$pattern'"
    fi
}

few=(-n 2 -w 1)

# 5 (4 m m n / 2 + m m m + 2 m m n / 2): symmetric products count half.
runs "$muonshard" bench ns "${few[@]}" --shapes 96x96,64x160x3,160x64 threads=2 ns_form=standard -J ns.json
says "ns: a square" "^ +96 +96 +2 +fp32 +standard .* 0$"
says "ns: several" "^ +64 +160 +3 +fp32 +standard .* 0$"
says "ns: tall" "^ +160 +64 +2 +fp32 +standard .* 0$"
flops=$(awk 'BEGIN { m = 96; printf "%d", 2 * 5 * (m * m * m + m * m * m + 2 * m * m * m) }')
says "ns: the operations of two" "\"flops\": $flops(\.0)?," ns.json
for dtype in bf16 fp16 tf32; do
    runs "$muonshard" bench ns "${few[@]}" --shapes 64x160 threads=1 ns_form=standard ns_dtype=$dtype
    says "ns: $dtype" "^ +64 +160 +1 +$dtype +standard .* 0$"
done
runs "$muonshard" bench ns "${few[@]}" --shapes 32x256 threads=1 instructions=portable
says "ns: form and kernels as configured" "portable kernels"
says "ns: gram" "^ +32 +256 +1 +fp32 +gram .* 0$"
runs "$muonshard" bench ns "${few[@]}" -b 32 -e 64 -i 16 -c 0 threads=1
for side in 32 48 64; do says "ns: sides from -b to -e by -i, unchecked" "^ +$side +$side .* -$"; done

runs "$mpiexec" --timeout 100 -n 2 "$muonshard" bench comm "${few[@]}" -b 4K -e 16K -f 4 -J comm.json
for size in 4096 16384; do
    says "comm: reduce-scatter" "^ +$size +$((size / 4)) +fp32 +reduce_scatter .* 0$"
    says "comm: all-gather" "^ +$size +$((size / 4)) +fp32 +all_gather .* 0$"
done
runs "$mpiexec" --timeout 100 -n 3 "$muonshard" bench comm "${few[@]}" -b 12K --op all_gather
says "comm: three ranks" "^ +12288 +3072 +fp32 +all_gather .* 0$"
never "comm: one operation alone" "reduce_scatter .* 0$" stdout

cat >model.yaml <<'YAML'
model: <b>"small"</b> `touch ran` $(touch ran)
tensors:
  - {name: w, role: matrix, shape: [4, 64, 96]}
  - {name: h, role: matrix, shape: [2, 96, 64], dtype: bf16}
  - {name: v, role: matrix, shape: [96, 64], row_splits: [64, 32]}
  - {name: b, role: elementwise, shape: [500]}
YAML
for ranks in 1 2; do
    runs "$mpiexec" --timeout 100 -n $ranks "$muonshard" bench step model.yaml "${few[@]}" threads=1 -J step$ranks.json
    says "step: $ranks ranks" "^ +$ranks +8 +[0-9]+ .* 0$"
done
says "step: dtypes, memory and scaling of a row" '"dtype": "mixed",' step2.json
says "step: state, momentum in fp32 and AdamW's two" '"state": [1-9][0-9]+,' step2.json
says "step: strong" '"scaling": "strong"' step2.json
runs "$mpiexec" --timeout 100 -n 2 "$muonshard" bench step model.yaml "${few[@]}" threads=1 --weak -J weak2.json
says "step: weak, twice the matrices and bytes" "^ +2 +16 +$((2 * (24576 * 4 + 12288 * 2 + 6144 * 4 + 500 * 4))) +mixed .* 0$"
says "step: weak" '"scaling": "weak"' weak2.json
# A model of shapes: the same matrices; what was called by the host is no more than the step.
for ranks in 1 2; do
    runs "$mpiexec" --timeout 100 -n $ranks "$muonshard" bench step --shapes 64x96x4,96x64 --dtype bf16 --grad-dtype fp32 \
        "${few[@]}" threads=1 -J shapes$ranks.json
    says "step of shapes: $ranks ranks" "^ +$ranks +5 +61440 +bf16 .* 0$"
done
says "step of shapes: what they are" 'model: \\"64x96x4,96x64\\"' shapes1.json
says "step of shapes: their dtypes" 'name=w0 role=matrix shape=4,64,96 dtype=bf16 grad_dtype=fp32' shapes1.json
says "step: rates of passes" '"momentum": [0-9.]+,' shapes1.json
says "step: no device" '"device": null' shapes1.json
# number FILE KEY [KEY]: of the first object that has it, or of one inside it
number() { awk -v key="\"$2\":" -v inner="\"${3-}\":" '$1 == key { if (inner == "\"\":") { print $2 + 0; exit } inside = 1 }
    inside && $1 == inner { print $2 + 0; exit }' "$1"; }
# holds NAME EXPRESSION: of awk
holds() { if awk "BEGIN { exit !($2) }"; then echo "ok    $1"; else failed "$1: $2"; fi; }
for file in shapes1.json step2.json; do
    holds "step: the call is part of it" \
        "0 < $(number $file host_us min) && $(number $file host_us median) <= $(number $file step_us median)"
done
# Gradients and momentum are read and written in fp32, 16 bytes an element, of which there are 30720 at one rank.
gbs=$(number shapes1.json phases_gbs momentum) us=$(number shapes1.json phases_us momentum)
holds "step: the rate of a pass" "$gbs > 0 && ($gbs * $us / (16 * 30720e-3) - 1) ^ 2 < 1e-6"
says "step: no bytes, no rate" '"take": null' shapes2.json
cat >layers.yaml <<'YAML'
model: deep
tensors:
  - {name: w, role: matrix, shape: [4, 64, 96], axes: [layer]}
  - {name: b, role: elementwise, shape: [4, 8], axes: [layer]}
  - {name: e, role: elementwise, shape: [500]}
YAML
runs "$muonshard" bench step layers.yaml --layers 3 "${few[@]}" threads=1 -J layers.json
says "step: some layers" "^ +1 +3 +$((4 * (3 * 6144 + 24 + 500))) +fp32 .* 0$"
says "step: some layers, named" '"model": "deep, 3 of 4 layers"' layers.json
# 2 ranks, the bytes of a step at 1 GB/s: busy for as long as the link says; the backward pass hides most of it.
runs "$mpiexec" --timeout 100 -n 2 "$muonshard" bench step model.yaml "${few[@]}" threads=1 --link 0.01,100 --backward 50
says "step: over a link" "^# the link is in use for [0-9.]+ us a step"
[ ! -e ran ] || failed "a model's name was run"

runs "$muonshard" report ns.json comm.json step1.json step2.json --out page.html
runs "$muonshard" report shapes1.json shapes2.json --out shapes.html
says "report: a model of shapes" "64x96x4,96x64" shapes.html
pictures=$(grep -c '<svg' page.html)
[ "$pictures" -eq 8 ] && echo "ok    report: a picture each" || failed "report: $pictures pictures"
says "report: figures in the table" "<td>96</td><td>96</td><td>2</td><td class=\"text\">fp32</td>" page.html
says "report: names are text" "&lt;b&gt;&quot;small&quot;&lt;/b&gt;" page.html
never "report: no markup from a file" "<b>" page.html
never "report: no script, nothing from elsewhere" "<script|src=|href=.http|url\(http" page.html
[ ! -e ran ] || failed "report ran a model's name"
sed 's/"wrong": 0[.0]*/"wrong": 3/' comm.json >wrong.json
runs "$muonshard" report wrong.json --out wrong.html
says "report: wrong rows are marked" '<tr class="wrong">' wrong.html

sed 's/"schema": 2/"schema": 3/' ns.json >schema.json
sed 's/"schema": 2/"schema": 1/' ns.json >earlier.json
sed 's/"kind": "ns"/"kind": "nt"/' ns.json >kind.json
sed 's/"gflops"/"gflips"/' ns.json >missing.json
sed 's/"dtype": "fp32"/"dtype": 7/' ns.json >type.json
head -c 300 ns.json >short.json
echo '{"schema": 2, "kind": "ns", "rows": []}' >empty.json
refused "report: no file" 15 "absent.json" "$muonshard" report ns.json absent.json --out none.html
refused "report: schema" 12 'schema.json: "schema" has to be 2' "$muonshard" report schema.json --out none.html
refused "report: an earlier schema" 12 'earlier.json: "schema" is 1' "$muonshard" report earlier.json --out none.html
refused "report: kind" 12 'kind.json: "kind"' "$muonshard" report kind.json --out none.html
refused "report: a number is missing" 12 '"gflops" is missing' "$muonshard" report missing.json --out none.html
refused "report: of another type" 12 '"dtype" is no text' "$muonshard" report type.json --out none.html
refused "report: cut off" 12 "short.json:" "$muonshard" report short.json --out none.html
refused "report: no rows" 12 "no results" "$muonshard" report empty.json --out none.html
refused "report: no gnuplot" 20 "gnuplot" env PATH=/nowhere "$muonshard" report ns.json --out none.html
refused "report: nowhere to write" 15 "nowhere" "$muonshard" report ns.json --out nowhere/page.html
[ -z "$(find . -name 'none.html*')" ] && echo "ok    report: nothing is left of a page that failed" || failed "something is left"

refused "bench: no kind" 11 "too few arguments" "$muonshard" bench
refused "bench: another kind" 11 "'nx'" "$muonshard" bench nx
refused "bench: a shape" 11 "--shapes: 'x3'" "$muonshard" bench ns --shapes 4x4,x3
refused "bench: an operation" 11 "--op is 'reduce'" "$muonshard" bench comm --op reduce
refused "bench: a size" 11 "-b is '1Q'" "$muonshard" bench comm -b 1Q
refused "bench: a count" 11 "-n is '0'" "$muonshard" bench ns -n 0
refused "bench: step without a model" 11 "step needs a model file" "$muonshard" bench step
refused "bench: a model and shapes" 11 "not both" "$muonshard" bench step model.yaml --shapes 4x4
refused "bench: a step of no shape" 11 "--shapes: '4x'" "$muonshard" bench step --shapes 4x
refused "bench: a dtype" 11 "--dtype is 'fp8'" "$muonshard" bench step --shapes 4x4 --dtype fp8
refused "bench: a dtype beside a model" 11 "--dtype" "$muonshard" bench step model.yaml --dtype bf16
refused "bench: too many layers" 11 "it has 4" "$muonshard" bench step layers.yaml --layers 5
refused "bench: layers of shapes" 11 "--layers" "$muonshard" bench step --shapes 4x4 --layers 1
refused "bench: a part of a model" 21 "set expert_parallel=1 pipeline_parallel=1" "$muonshard" bench step model.yaml expert_parallel=2
refused "bench: a link" 11 "--link is '0'" "$muonshard" bench step model.yaml --link 0
refused "bench: a key" 12 "ns_stops" "$muonshard" bench ns ns_stops=4
refused "bench: instructions" 12 "instructions" "$muonshard" bench ns instructions=avx1024
refused "bench: a file that can't be written" 15 "nowhere/x.json" "$muonshard" bench ns "${few[@]}" --shapes 4x4 -J nowhere/x.json

echo "$failures failed"
[ $failures -eq 0 ]
