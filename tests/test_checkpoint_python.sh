#!/usr/bin/env bash
# Python's own safetensors opens every file of a checkpoint and finds in them the bytes the program had.
#   test_checkpoint_python.sh MAKE_CHECKPOINT DIRECTORY_FOR_PACKAGES
set -u
make_checkpoint=$(realpath "$1") packages=$2
skip() { echo "SKIPPED: $1; nothing was tested"; exit 77; }
command -v python3 >/dev/null || skip "no python3"
if ! "$packages/bin/python" -c 'import safetensors, numpy' 2>/dev/null; then
    python3 -m venv "$packages" >/dev/null 2>&1 || skip "no venv"
    timeout 90 "$packages/bin/pip" install -q --timeout 15 --retries 1 safetensors numpy >/dev/null 2>&1 ||
        skip "safetensors and numpy can't be installed"
fi
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
"$make_checkpoint" "$work" || exit 1
"$packages/bin/python" - "$work" <<'PYTHON'
import json, pathlib, sys
import numpy, safetensors

BYTES = {"F32": 4, "BF16": 2, "F16": 2}
DTYPE = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
work = pathlib.Path(sys.argv[1])
checkpoint = work / "step-00000002"
manifest = json.loads((checkpoint / "manifest.json").read_text())
assert manifest["muonshard_checkpoint"] == 1 and manifest["step"] == manifest["count"] == 2
assert manifest["world_size"] == len(manifest["files"]) == 3 and manifest["user"] == "line 7 – ü"

found, slices = {}, 0  # KIND, TENSOR -> {FIRST: (dtype, bytes)}
for rank, entry in enumerate(manifest["files"]):
    path = checkpoint / f"rank-{rank:05d}.safetensors"
    data = path.read_bytes()
    assert len(data) == entry["bytes"]
    with safetensors.safe_open(path, framework="np") as file:
        facts, names = file.metadata(), set(file.keys())
        values = {n: file.get_tensor(n) for n in names if n.split(":")[0] in ("momentum", "adam_m", "adam_v", "master")}
    assert int(facts["step"]) == 2 and int(facts["rank"]) == rank and int(facts["world_size"]) == 3
    for name, slice in safetensors.deserialize(data):
        kind, rest = name.split(":", 1)
        tensor, first = rest.rsplit(":", 1)
        assert name in names
        if name in values:
            assert values[name].dtype == numpy.float32 and values[name].tobytes() == bytes(slice["data"])
            assert numpy.isfinite(values[name]).all()
        assert found.setdefault((kind, tensor), {}).setdefault(int(first), (slice["dtype"], bytes(slice["data"])))[1] == slice["data"]
        slices += 1

def whole(kind, tensor):
    """All slices of a tensor, which follow each other without a gap."""
    data, dtypes = b"", set()
    for first, (dtype, part) in sorted(found[kind, tensor].items()):
        assert len(data) == first * BYTES[dtype], (kind, tensor, first)
        data += part
        dtypes.add(dtype)
    assert len(dtypes) == 1
    return dtypes.pop(), data

for tensor in manifest["tensors"]:
    name, elements = tensor["name"], int(numpy.prod(tensor["shape"]))
    dtype, data = whole("param", name)
    assert dtype == DTYPE[tensor["dtype"]] and data == (work / f"{name}.raw").read_bytes(), name
    wanted = {"matrix": ["momentum"], "elementwise": ["adam_m", "adam_v"], "frozen": []}[tensor["role"]]
    if dtype != "F32" and tensor["role"] != "frozen":
        wanted.append("master")
    assert {kind for kind, of in found if of == name} - {"param", "variance"} == set(wanted), name
    for kind in wanted:
        of, state = whole(kind, name)
        assert of == "F32" and len(state) == 4 * elements, (kind, name)
        if kind == "master" and dtype == "F16":
            assert numpy.frombuffer(state, "f4").astype("f2").tobytes() == data, name
print(f"{len(manifest['tensors'])} tensors in {slices} slices of {len(manifest['files'])} files: the same bytes")
PYTHON
