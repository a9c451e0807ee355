#!/usr/bin/env bash
# The muonshard command on bad input (one clear line, the documented exit code, nothing written) and on good input.
#   test_cli.sh MUONSHARD MAKE_SAFETENSORS [MPIEXEC]
set -u

muonshard=$1
maker=$2
mpiexec=${3:-mpirun}
configs=$(cd "$(dirname "$0")/../configs" && pwd) || exit 1
export OPENBLAS_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
mkdir out

cases=0
failures=0
passed() {
    cases=$((cases + 1))
    echo "ok    $1"
}
failed() { # NAME WHY
    cases=$((cases + 1))
    failures=$((failures + 1))
    echo "FAIL  $1: $2"
    sed 's/^/      stderr: /' stderr
}

alone() { timeout 60 "$@"; }
ranks() { # N COMMAND...
    local n=$1
    shift
    "$mpiexec" --timeout 60 -n "$n" "$@"
}

# refused NAME CODE PATTERN[|PATTERN...] COMMAND...: exit CODE; one line on stderr, with every pattern in it; nothing written.
refused() {
    local name=$1 code=$2 patterns=$3 rest
    shift 3
    "$@" >stdout 2>stderr
    local got=$?
    # mpirun has words of its own about an exit code
    rest=$(grep -c '^muonshard' stderr)
    [ "$1" = ranks ] || rest=$(wc -l <stderr)
    [ $got -eq "$code" ] || { failed "$name" "exit code $got, not $code"; return; }
    [ "$rest" -eq 1 ] || { failed "$name" "$rest lines on stderr, not 1"; return; }
    [ ! -s stdout ] || [ "$1" = ranks ] || { failed "$name" "something on stdout"; return; }
    local IFS='|' pattern
    for pattern in $patterns; do
        grep '^muonshard' stderr | grep -qF -- "$pattern" || { failed "$name" "no \"$pattern\""; return; }
    done
    [ -z "$(ls -A out)" ] || { failed "$name" "wrote $(ls -A out)"; rm -rf out/*; return; }
    passed "$name"
}

# runs NAME COMMAND...: exit 0
runs() {
    local name=$1
    shift
    "$@" >stdout 2>stderr
    local got=$?
    [ $got -eq 0 ] || { failed "$name" "exit code $got"; return 1; }
    passed "$name"
}

same() { # NAME FILE FILE
    if cmp "$2" "$3" 2>stderr >&2; then passed "$1"; else failed "$1" "the files differ"; fi
}

near() { # NAME FILE FILE BOUND
    local difference
    difference=$("$maker" differ "$2" "$3" 2>stderr)
    if [ -n "$difference" ] && awk "BEGIN { exit !($difference <= $4) }"; then
        passed "$1 ($difference)"
    else
        failed "$1" "largest difference $difference, above $4"
    fi
}

says() { # NAME TEXT FILE
    if grep -qF -- "$2" "$3"; then passed "$1"; else failed "$1" "no \"$2\""; fi
}

# ---- input ----------------------------------------------------------------------------------------------

model="wte=16x4 h.qkv=2x6x4 h.odd=5x3 h.wide=2x7 norm=4 bias=5"
"$maker" make in.safetensors 1 $model || exit 1
for step in 1 2 3; do
    "$maker" make g$step.safetensors $((10 + step)) $model || exit 1
    for rank in 0 1; do
        "$maker" make g$step-$rank.safetensors $((100 * step + rank)) $model || exit 1
    done
    "$maker" mean m$step.safetensors g$step-0.safetensors g$step-1.safetensors || exit 1
    for rank in 0 1; do
        "$maker" cast b$step-$rank.safetensors g$step-$rank.safetensors BF16 || exit 1
    done
    "$maker" mean mb$step.safetensors b$step-0.safetensors b$step-1.safetensors || exit 1
done
cat >good.yaml <<'END'
preset: jordan
ns_dtype: fp32 # so that what differs in the last bit stays small
clip_norm: 2.5
groups:
  - match: [wte, "*norm*"]
    role: elementwise
  - match: h.qkv
    role: matrix
    row_splits: [2, 2, 2]
END
grads="g1.safetensors g2.safetensors g3.safetensors"

# With everything but what the case is about.
replay() { alone "$muonshard" replay good.yaml --params in.safetensors --grads $grads --out out/o.safetensors "$@"; }
with_config() { alone "$muonshard" replay "$1" --params in.safetensors --grads $grads --out out/o.safetensors; }
with_params() { alone "$muonshard" replay good.yaml --params "$1" --grads $grads --out out/o.safetensors; }
with_grads() { alone "$muonshard" replay good.yaml --params in.safetensors --grads "$@" --out out/o.safetensors; }
with_out() { alone "$muonshard" replay good.yaml --params in.safetensors --grads $grads --out "$@"; }

# ---- the command itself ---------------------------------------------------------------------------------

refused "unknown command" 2 'unknown command "repaly"|"replay"' alone "$muonshard" repaly
refused "help on an unknown command" 2 'unknown command "inof"|"info"' alone "$muonshard" help inof
runs "--version" alone "$muonshard" --version && says "it has a number" "muonshard 0." stdout
runs "--help" alone "$muonshard" --help && says "it lists the commands" "  replay " stdout
runs "replay --help" alone "$muonshard" replay --help
says "options are in it" "--out-every K" stdout
says "its own key is in it" "null_grad=error|zero|skip" stdout
says "the library's keys are in it" "clip_norm" stdout
cp stdout help
runs "help replay" alone "$muonshard" help replay && same "it is the same text" help stdout
runs "info" alone "$muonshard" info
says "info names the backend" "backend host" stdout
says "info names MPI" "MPI: " stdout
says "info names BLAS" "BLAS: OpenBLAS" stdout
refused "info with an argument" 11 "unexpected argument x" alone "$muonshard" info x
alone "$muonshard" --help >/dev/full 2>stderr
if [ $? -eq 15 ]; then passed "a full disk is no success"; else failed "a full disk is no success" "exit code"; fi

# ---- bad config -----------------------------------------------------------------------------------------

config() { # NAME PATTERNS LINE...: good.yaml with more lines
    local name=$1 patterns=$2
    shift 2
    { cat good.yaml; printf '%s\n' "$@"; } >bad.yaml
    refused "$name" 12 "bad.yaml:|$patterns" with_config bad.yaml
}
config "unknown key" "momentun|momentum" "momentun: 0.9"
config "repeated key" "clip_norm" "clip_norm: 1"
config "wrong type" "ns_steps" "ns_steps: many"
config "out of range" "momentum|1.5" "momentum: 1.5"
config "not one of the choices" "reduce|mean" "reduce: average"
config "not YAML" "" "a: [1"
refused "unknown override" 12 "clipnorm|clip_norm" replay clipnorm=1
refused "override out of range" 12 "ns_steps|1000" replay ns_steps=1000
refused "missing config" 15 "none.yaml" with_config none.yaml
refused "config is a directory" 15 "out" with_config out
refused "rule with an unknown word" 12 'groups: rule 1|rolle' replay "groups=match=wte rolle=matrix"
refused "rule with a bad value" 12 'groups: rule 1|role is "big"' replay "groups=match=wte role=big"
refused "row_splits that do not add up" 12 'groups: rule 1 (match=h.odd row_splits=2,2)|add up to 4|"h.odd" has 5 rows' \
    replay "groups=match=h.odd role=matrix row_splits=2,2"
refused "a rule about nothing" 12 'groups: rule 1 has no match, shape or dims' replay "groups=role=matrix lr=1"
refused "a rule's schedule" 12 'groups: rule 1|lr_schedule is "0:1,x"' \
    replay "groups=match=* role=matrix lr_schedule=0:1,x"
refused "a rule's schedule and the number of files" 12 'groups: rule 1|"end:1,2:0" fall where total_steps is 3' \
    replay "groups=match=h.odd role=matrix lr_schedule=end:1,2:0"
refused "a schedule" 12 'lr_schedule: point "x:1"' replay lr_schedule=x:1
refused "momentum of what has none" 12 'momentum is for role=matrix only' \
    replay "groups=match=wte role=elementwise momentum=0.5"
refused "a vector as matrix" 12 'groups: rule 1 (match=b*)|"bias"' replay "groups=match=b* role=matrix"

# ---- bad arguments --------------------------------------------------------------------------------------

refused "no arguments" 11 "usage: muonshard replay" alone "$muonshard" replay
refused "unknown option" 11 "--outt" replay --outt x
refused "no --out" 11 "--out" alone "$muonshard" replay good.yaml --params in.safetensors --grads $grads
refused "no --grads" 11 "--grads" alone "$muonshard" replay good.yaml --params in.safetensors --out out/o.safetensors
refused "--out twice" 11 "--out" replay --out out/p.safetensors
refused "two configs" 11 "unexpected argument" alone "$muonshard" replay good.yaml good.yaml \
    --params in.safetensors --grads $grads --out out/o.safetensors
refused "--out-every 0" 11 '--out-every is "0"' replay --out-every 0
refused "--out-every 2x" 11 '--out-every is "2x"' replay --out-every 2x

# ---- bad files ------------------------------------------------------------------------------------------

bad() { # NAME CODE PATTERNS: bad.safetensors as parameters, then as the last gradient
    refused "$1: parameters" "$2" "bad.safetensors: |$3" with_params bad.safetensors
    refused "$1: gradient" "$2" "bad.safetensors: |$3" with_grads g1.safetensors g2.safetensors bad.safetensors
}
rm -f bad.safetensors
bad "missing" 15 "No such file"
mkdir bad.safetensors
bad "a directory" 15 "is a directory"
rmdir bad.safetensors
: >bad.safetensors
bad "empty" 16 "0 bytes"
head -c 500 in.safetensors >bad.safetensors
bad "truncated header or data" 16 "truncated?"
head -c -4 in.safetensors >bad.safetensors
bad "truncated by 4 bytes" 16 "the data, but the file has only"
{ cat in.safetensors; printf 'more'; } >bad.safetensors
bad "longer than its tensors" 16 "belong to no tensor"
entry() { printf '"%s":{"dtype":"%s","shape":%s,"data_offsets":%s}' "$@"; }
"$maker" raw bad.safetensors "{$(entry a F32 '[4]' '[0,16]')}" 16 9999
bad "header length past the end" 16 "header length 9999"
"$maker" raw bad.safetensors "{$(entry a F32 '[4]' '[0,16]')}" 16 18446744073709551615
bad "header length beyond all limits" 16 "header length 18446744073709551615"
"$maker" raw bad.safetensors "{$(entry a F32 '[4]' '[0,16]')}" 16 20
bad "header length too short" 16 "not valid JSON"
"$maker" raw bad.safetensors "{$(entry a F32 '[4]' '[0,16]'),$(entry b F32 '[4]' '[8,24]')}" 24
bad "overlapping offsets" 16 '"a" and "b" overlap'
"$maker" raw bad.safetensors "{$(entry a F32 '[4]' '[0,16]'),$(entry a F32 '[4]' '[16,32]')}" 32
bad "two tensors of one name" 16 "duplicate"
"$maker" raw bad.safetensors "{$(entry a F32 '[5]' '[0,16]')}" 16
bad "shape and offsets disagree" 16 'tensor "a"|20 bytes'
"$maker" raw bad.safetensors "{$(entry a FP32 '[4]' '[0,16]')}" 16
bad "unknown dtype" 16 'tensor "a"|"FP32"'
"$maker" raw bad.safetensors "{$(entry w I32 '[4,2]' '[0,32]')}" 32
refused "parameters in integers" 21 'bad.safetensors: tensor "w" is I32|F32, BF16 and F16|role=frozen' \
    with_params bad.safetensors

"$maker" make bad.safetensors 5 ${model/h.odd=5x3/h.odd=3x5}
refused "gradient of another shape" 11 'bad.safetensors: tensor "h.odd" is [3, 5]; expected [5, 3]' \
    with_grads g1.safetensors bad.safetensors
"$maker" make bad.safetensors 5 ${model/h.odd=5x3/h.odd=5x3:I32}
refused "gradient in integers" 21 'bad.safetensors: tensor "h.odd" is I32; gradients are F32, BF16 or F16' \
    with_grads bad.safetensors
"$maker" make bad.safetensors 5 ${model/h.odd=5x3/h.odd=5x3:F16}
refused "gradient of another dtype" 11 'bad.safetensors: tensor "h.odd" is F16; expected F32 as in the files before' \
    with_grads g1.safetensors bad.safetensors
"$maker" make bad.safetensors 5 ${model/h.odd=5x3/}
refused "gradient that is missing" 11 'bad.safetensors: tensor "h.odd"|missing' with_grads g1.safetensors bad.safetensors
"$maker" make bad.safetensors 5 $model extra=2
refused "gradient of nothing" 11 'bad.safetensors: tensor "extra" is not in in.safetensors' \
    with_grads g1.safetensors bad.safetensors
refused "a rank's gradients are missing" 15 "g9-0.safetensors" ranks 2 "$muonshard" replay good.yaml \
    --params in.safetensors --grads 'g9-%r.safetensors' --out out/o.safetensors
cp g1-0.safetensors half-0.safetensors
refused "one rank's gradients are missing" 15 "half-1.safetensors" ranks 2 "$muonshard" replay good.yaml \
    --params in.safetensors --grads 'half-%r.safetensors' --out out/o.safetensors

refused "the directory of --out is missing" 15 "none/o.safetensors" with_out none/o.safetensors
refused "--out is a directory" 15 "out" with_out out
refused "--out is special" 15 "/dev/null" with_out /dev/null
refused "--out is --params" 11 "in.safetensors: would overwrite --params" with_out in.safetensors
refused "--out is a gradient" 11 "g2.safetensors: would overwrite" with_out ./g2.safetensors

# ---- good input -----------------------------------------------------------------------------------------

mkdir good
run() { # RANKS OUT ARGUMENTS...
    local n=$1 out=$2
    shift 2
    ranks "$n" "$muonshard" replay good.yaml --params in.safetensors --out "good/$out.safetensors" "$@"
}
runs "without mpirun" alone "$muonshard" replay good.yaml --params in.safetensors --grads $grads \
    --out good/alone.safetensors --out-every 2
says "the table: a rule" "h.qkv   [2, 6, 4]  F32    matrix              6  2: match=h.qkv row_splits=2,2,2" stderr
says "the table: no rule" "h.odd   [5, 3]     F32    matrix              1  none" stderr
says "the table: element-wise" "wte     [16, 4]    F32    elementwise         -  1: match=wte,*norm*" stderr
if [ "$(ls good)" = "$(printf 'alone-000002.safetensors\nalone.safetensors')" ]; then
    passed "--out-every 2 of 3 steps"
else
    failed "--out-every 2 of 3 steps" "$(ls good)"
fi
if [ "$("$maker" differ in.safetensors good/alone.safetensors)" != 0.000e+00 ]; then
    passed "parameters changed"
else
    failed "parameters changed" "they did not"
fi
runs "two of three steps" run 1 two --grads g1.safetensors g2.safetensors
same "they are what --out-every wrote" good/alone-000002.safetensors good/two.safetensors
runs "mpirun, 1 rank" run 1 one --grads $grads && same "same bits" good/alone.safetensors good/one.safetensors
# The mean of equal gradients is exact where N is a power of two.
runs "2 ranks, the same gradients" run 2 n2 --grads $grads && same "same bits" good/alone.safetensors good/n2.safetensors
runs "4 ranks, the same gradients" run 4 n4 --grads $grads && same "same bits" good/alone.safetensors good/n4.safetensors
runs "3 ranks, the same gradients" run 3 n3 --grads $grads && near "close" good/alone.safetensors good/n3.safetensors 1e-5
runs "the mean of two gradients, 1 rank" run 1 mean --grads m1.safetensors m2.safetensors m3.safetensors
runs "2 ranks, a gradient each" run 2 own --grads 'g1-%r.safetensors' 'g2-%r.safetensors' 'g3-%r.safetensors' &&
    same "same bits" good/mean.safetensors good/own.safetensors
runs "the other order of keys and options" alone "$muonshard" replay clip_norm=2.5 --out=good/order.safetensors \
    --grads $grads preset=jordan --params in.safetensors good.yaml && same "same bits" good/alone.safetensors good/order.safetensors
runs "an override" run 1 slow --grads $grads lr=0.01
if cmp -s good/alone.safetensors good/slow.safetensors; then failed "it has an effect" "same bits"; else passed "it has an effect"; fi

"$maker" make nan.safetensors 7 ${model/5x3/5x3xnan}
runs "a step with NaN" run 2 skip --grads g1.safetensors nan.safetensors g2.safetensors g3.safetensors
says "it is reported" "warning: step 2 (nan.safetensors) skipped" stderr
same "and changes nothing" good/alone.safetensors good/skip.safetensors

"$maker" make lack.safetensors 8 ${model/h.odd=5x3/}
moved() { # NAME yes|no FILE TENSOR [FILE]: whether it differs from the input, or the other file
    local difference
    difference=$("$maker" differ "${5:-in.safetensors}" "$3" "$4" 2>stderr)
    case "$2:$difference" in
    yes: | no:) failed "$1" "cannot be compared" ;;
    yes:0.000e+00) failed "$1" "it did not change" ;;
    yes:* | no:0.000e+00) passed "$1" ;;
    *) failed "$1" "it changed by $difference" ;;
    esac
}
odd="groups=match=h.odd role=matrix null_grad"
runs "null_grad=skip" run 2 skip --grads lack.safetensors "$odd=skip" weight_decay=0.5
moved "skip leaves the tensor" no good/skip.safetensors h.odd
moved "and no other" yes good/skip.safetensors h.wide
runs "null_grad=zero" run 2 zero --grads lack.safetensors "$odd=zero" weight_decay=0.5
moved "zero lets it decay" yes good/zero.safetensors h.odd
runs "frozen" run 1 frozen --grads $grads "groups=match=* role=frozen"
same "nothing changes" in.safetensors good/frozen.safetensors
runs "a rule that decides about nothing" run 1 unused --grads g1.safetensors "groups=match=nothing role=frozen"
says "is told" "warning: groups: rule 1 (match=nothing) decides about no tensor" stderr

# ---- 16 bits --------------------------------------------------------------------------------------------

says_equal() { # NAME FILE FILE TENSOR: the tensor is the same in both
    local difference
    difference=$("$maker" differ "$2" "$3" "$4" 2>stderr)
    if [ "$difference" = 0.000e+00 ]; then passed "$1"; else failed "$1" "they differ by $difference"; fi
}
from() { # RANKS PARAMS OUT ARGUMENTS...
    local n=$1 in=$2 out=$3
    shift 3
    ranks "$n" "$muonshard" replay good.yaml --params "$in.safetensors" --out "good/$out.safetensors" "$@"
}
own="b1-%r.safetensors b2-%r.safetensors b3-%r.safetensors"
means="mb1.safetensors mb2.safetensors mb3.safetensors"
runs "gradients in BF16, a file a rank" from 2 in bf16-own --grads $own
says "the parameters' dtype is in the table" "  F32  " stderr
runs "their mean in F32, 1 rank" from 1 in bf16-mean --grads $means &&
    same "same bits" good/bf16-mean.safetensors good/bf16-own.safetensors
# fp32 is kept by the owner, and 16 bits are its rounding: what fp32 parameters become, rounded once.
for dtype in BF16 F16; do
    "$maker" cast start.safetensors in.safetensors $dtype
    "$maker" cast start32.safetensors start.safetensors F32
    runs "parameters in $dtype, gradients in BF16, 2 ranks" from 2 start $dtype --grads $own
    says "$dtype is in the table" "  $dtype" stderr
    runs "1 rank, gradients in F32" from 1 start $dtype-1 --grads $means &&
        same "same bits" good/$dtype.safetensors good/$dtype-1.safetensors
    runs "the same start in F32" from 1 start32 $dtype-32 --grads $means
    "$maker" cast rounded.safetensors good/$dtype-32.safetensors $dtype
    same "rounded, they are the same bits" rounded.safetensors good/$dtype.safetensors
    "$maker" cast h1.safetensors g1.safetensors F16
    "$maker" cast h32.safetensors h1.safetensors F32
    runs "gradients in F16" from 3 start $dtype-h --grads h1.safetensors &&
        runs "in F32" from 3 start $dtype-h32 --grads h32.safetensors &&
        same "same bits" good/$dtype-h.safetensors good/$dtype-h32.safetensors
done
"$maker" make mixed.safetensors 1 wte=16x4:BF16 h.qkv=2x6x4:F16 h.odd=5x3 h.wide=2x7:BF16 norm=4:F16 bias=5
"$maker" make mixed-g.safetensors 2 wte=16x4:F16 h.qkv=2x6x4 h.odd=5x3:BF16 h.wide=2x7:BF16 norm=4 bias=5:F16
runs "every dtype beside every other" from 3 mixed mixed --grads mixed-g.safetensors mixed-g.safetensors
if "$maker" differ mixed.safetensors good/mixed.safetensors >stdout 2>stderr; then
    passed "dtypes stay as they are"
else
    failed "dtypes stay as they are" "they did not"
fi
"$maker" make carried.safetensors 1 $model step=1:I32
runs "a frozen integer" from 2 carried carried --grads $grads "groups=match=step role=frozen"
says_equal "it is carried" carried.safetensors good/carried.safetensors step

# ---- groups ---------------------------------------------------------------------------------------------

# group TENSOR RULE KEY=VALUE...: what a rule gives its tensor is what the keys give every tensor, and others stay.
group() {
    local name=$1 rule=$2
    shift 2
    runs "groups=$rule" run 2 rule --grads $grads $common "groups=$rule"
    runs "$*" run 1 all --grads $grads $common "$@" "groups=$roles"
    says_equal "they give $name the same bits" good/rule.safetensors good/all.safetensors "$name"
    runs "neither" run 1 neither --grads $grads $common "groups=$roles"
    says_equal "and leave h.wide alone" good/rule.safetensors good/neither.safetensors h.wide
    moved "the rule has an effect" yes good/rule.safetensors "$name" good/neither.safetensors
}
roles="match=nothing role=frozen"
common="weight_decay=0.1 adam.weight_decay=0.2 adam.lr=0.05"
group h.odd "match=h.odd role=matrix lr=0.005" lr=0.005
group h.odd "shape=5,* role=matrix momentum=0.5" momentum=0.5
group h.odd "dims=2 shape=5,3 role=matrix weight_decay=0.4" weight_decay=0.4
group h.odd "match=h.odd role=matrix lr_schedule=0:1,cosine,end:0" "lr_schedule=0:1 cosine 3:0"
group h.odd "match=h.odd role=matrix momentum_schedule=0:0.5,2:0.9" "momentum_schedule=0:0.5 2:0.9"
group h.odd "match=h.odd role=matrix weight_decay_schedule=0:1,2:5" "weight_decay_schedule=0:1 2:5"
group norm "match=norm role=elementwise lr=0.01 weight_decay=0.5" adam.lr=0.01 adam.weight_decay=0.5
group norm "match=norm role=elementwise lr_schedule=0:1,end:0" "lr_schedule=0:1 3:0"
common="$common lr_schedule=0:1,2:0.5"
group h.odd "match=h.odd role=matrix lr=0.005" lr=0.005
cat >groups.yaml <<'END'
preset: jordan
ns_dtype: fp32
groups:
  - shape: [5, "*"]
    role: matrix
    lr: 5e-3
    lr_schedule: [0:0, 1:1, cosine, end:0.1]
  - {dims: 1, role: elementwise, lr_multiplier: 0.5}
END
runs "rules in YAML" alone "$muonshard" replay groups.yaml --params in.safetensors --grads $grads --out good/yaml.safetensors
says "they are in the table" "1: shape=5,* lr=5e-3 lr_schedule=0:0,1:1,cosine,end:0.1" stderr
gpt2="wpe=8x6 h.0.ln_1.weight=6 wte=50257x2 h.0.attn.qkv.weight=2304x6 conv.weight=4x3x2x2 experts.up=2x4x6"
"$maker" make gpt2.safetensors 1 $gpt2 h.0.attn.masked_bias=1:I32
"$maker" make gpt2-1.safetensors 2 $gpt2
"$maker" make gpt2-2.safetensors 3 ${gpt2/conv.weight=4x3x2x2/}
runs "configs/parity.yaml" alone "$muonshard" replay "$configs/parity.yaml" --params gpt2.safetensors \
    --grads gpt2-1.safetensors gpt2-2.safetensors --out good/gpt2.safetensors
if grep -q -e warning -e "  none$" stderr; then failed "its rules all decide" "not all"; else passed "its rules all decide"; fi

echo "$cases cases, $failures failures"
[ $failures -eq 0 ]
