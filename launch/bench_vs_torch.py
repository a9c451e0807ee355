#!/usr/bin/env python3
"""PyTorch's Muon beside ours, in turns in one run, on the same shapes.

    python3 -m venv /tmp/torch && /tmp/torch/bin/pip install torch numpy
    /tmp/torch/bin/python launch/bench_vs_torch.py [--device cpu|cuda] [--threads N] [--rounds R] [--budget SECONDS]
                                                   [--muonshard COMMAND] [--model FILE[:LAYERS]] [--shapes LIST]
                                                   [--json FILE] [key=value...]

cpu: single shapes, torch.optim.Muon's step on one parameter against `muonshard bench ns` of one matrix, and the whole step of a
model, torch.optim.Muon on the matrices and AdamW on the rest, against `muonshard bench step`; the same threads for both.

cuda: whole steps only, of so many matrices of a shape and of models, against torch.optim.Muon as it ships, and against a step
written by hand over torch: matrices of a shape stacked, batched Newton-Schulz in bf16, everything else with _foreach functions.

Ours runs once with each setting of --ours; key=value goes to all of them. Each round measures all of them; what is printed are
medians over the rounds, each of which is a median of steps. Targets are what this project wants against torch.optim.Muon; nothing
is asserted. --budget drops rounds and iterations so that all of it takes about so long; every case gets one round at least.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OURS = {"cpu": ["preset=torch", "preset=torch ns_form=auto", "preset=torch ns_dtype=fp32 ns_form=auto"],
        "cuda": ["preset=torch", "preset=torch ns_form=gram ns_dtype=fp16"],  # with bf16, auto is the standard form there
        "hopper": ["preset=torch gemm_kernels=hopper", "preset=torch ns_form=auto ns_dtype=fp16 gemm_kernels=hopper"]}
SHAPES = {"cpu": "768x768,768x3072,1024x4096", "cuda": "768x768x48,768x3072x24,4096x4096,4096x14336,2048x7168x24"}
MODELS = {"cpu": ["configs/models/gpt2-124m.yaml"], "cuda": ["configs/models/gpt2-124m.yaml", "configs/models/llama-7b.yaml:8"]}
TARGETS = {"768x768x48": 10.0, "768x3072x24": 7.0, "4096x4096": 1.9, "4096x14336": 2.7, "2048x7168x24": 3.0}  # fp32 parameters
WARMUP = 3  # of ours, of which the second is recorded as graphs
BEGIN = time.monotonic()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--torch-device", help="torch's, where it is not --device: to try the script where there is no card")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, help="of a round, of which the median counts; default 5, on cuda 20")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds for all of it; 0: what it takes")
    parser.add_argument("--muonshard", default=shlex.quote(os.path.join(HERE, "build/release/launch/muonshard")),
                        help="the command, as a shell would read it: 'env LD_LIBRARY_PATH=... muonshard' does")
    parser.add_argument("--model", action="append", help="a model file, or FILE:LAYERS for so many of its layers; may be repeated; "
                        "empty: none; default: " + "; ".join(f"{d}: {', '.join(m)}" for d, m in MODELS.items()))
    parser.add_argument("--shapes", help="ROWSxCOLS[xCOUNT] separated by commas (COUNT on cuda); empty: none; default: "
                        + "; ".join(f"{d}: {s}" for d, s in SHAPES.items()))
    parser.add_argument("--dtype", action="append", choices=["fp32", "bf16"],
                        help="cuda: of parameters and gradients of --shapes; may be repeated; default fp32")
    parser.add_argument("--ours", action="append", help="settings to run ours with, may be repeated; default: "
                        + "; ".join(f"{d}: {', '.join(o)}" for d, o in OURS.items()))
    parser.add_argument("--hopper", action="store_true", help="ours with its own kernels for sm_90 as well")
    parser.add_argument("--bench", default="", help="more words for muonshard bench")
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("overrides", nargs="*", help="key=value for ours")
    args = parser.parse_args()
    args.torch_device = args.torch_device or args.device
    args.iterations = args.iterations or (20 if args.device == "cuda" else 5)
    args.ours = (args.ours or OURS[args.device]) + (OURS["hopper"] if args.hopper else [])
    args.shapes = SHAPES[args.device] if args.shapes is None else args.shapes
    args.model = [m for m in args.model if m] if args.model else [os.path.join(HERE, m) for m in MODELS[args.device]]
    args.dtype = args.dtype or ["fp32"]
    return args


def progress(text):
    print(f"[{time.monotonic() - BEGIN:4.0f} s] {text}", file=sys.stderr, flush=True)


class Failed(Exception):
    pass


def run_muonshard(args, words):
    """The JSON that `muonshard WORDS -J` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "out.json")
        command = [*shlex.split(args.muonshard), *words, "-J", path]
        environment = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        limit = max(60.0, args.budget) if args.budget else None
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"{' '.join(command)}: no end after {limit:.0f} s")
        if done.returncode:
            raise Failed(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        with open(path) as file:
            return json.load(file)


def bench(args, kind, extra, settings, iterations):
    """The first row of one run of `muonshard bench`."""
    return run_muonshard(args, ["bench", kind, *extra, "-n", str(iterations), "-w", str(WARMUP), "-c", "0", *shlex.split(args.bench),
                                f"threads={args.threads}", *settings.split(), *args.overrides])["rows"][0]


# ---- tensors: (matrix?, shape, dtype), stacks and row splits taken apart, as Muon sees them ----

def tensors_of_model(args, path, layers):
    """Those of a model file, as the command reads it."""
    plan = run_muonshard(args, ["plan", path, "--ranks", "1", "--machine", os.path.join(HERE, "configs/machines/h200-sxm-400g.yaml")])
    for line in plan["tensors"].splitlines():
        words = dict(word.split("=", 1) for word in line.split())
        shape = [int(size) for size in words["shape"].split(",")]
        if layers and words.get("axes", "").startswith("layer"):
            shape[0] = min(shape[0], layers)
        dtype = words.get("dtype", "fp32")
        if words["role"] != "matrix":
            yield False, shape, dtype
            continue
        batch = 1
        for size in shape[:-2]:
            batch *= size
        splits = [int(rows) for rows in words["row_splits"].split(",")] if "row_splits" in words else [shape[-2]]
        for _ in range(batch):
            for rows in splits:
                yield True, [rows, shape[-1]], dtype


def tensors_of_shape(text, dtype):
    sides = [int(side) for side in text.split("x")]
    return [(True, sides[:2], dtype)] * (sides[2] if len(sides) > 2 else 1)


def gradients(torch, args, tensors):
    """Nearly what a step meets: random numbers; zeros would cost less power, and so less time."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return [(matrix, 1e-3 * torch.randn(shape, dtype=dtypes[dtype], device=args.torch_device)) for matrix, shape, dtype in tensors]


def parameters(torch, grads):
    """Zeros, so that after the first step updates can be compared."""
    params = []
    for matrix, grad in grads:
        p = torch.nn.Parameter(torch.zeros_like(grad))
        p.grad = grad
        params.append((matrix, p))
    return [p for matrix, p in params if matrix], [p for matrix, p in params if not matrix]


# ---- steps of torch ----

def shipped(torch, args, grads):
    """torch.optim.Muon and AdamW with their defaults: what preset=torch stands for."""
    matrices, rest = parameters(torch, grads)
    optimizers = [torch.optim.Muon(matrices)] + ([torch.optim.AdamW(rest)] if rest else [])

    def step():
        for optimizer in optimizers:
            optimizer.step()

    return step, matrices


def by_hand(torch, args, grads, lr=1e-3, decay=0.1, momentum=0.95, coefficients=(3.4445, -4.7750, 2.0315), steps=5, eps=1e-7):
    """The same numbers as torch.optim.Muon, without a loop over matrices; AdamW is torch's, fused where it can be."""
    matrices, rest = parameters(torch, grads)
    gradient = [p.grad for p in matrices]
    buffers = [torch.zeros_like(p) for p in matrices]
    params = [p.detach() for p in matrices]
    groups = {}
    for i, p in enumerate(matrices):
        groups.setdefault(tuple(p.shape), []).append(i)
    stacks = {shape: torch.empty((len(members), *shape), dtype=torch.bfloat16, device=args.torch_device)
              for shape, members in groups.items()}
    places = {shape: list(stack.unbind()) for shape, stack in stacks.items()}
    of_shape = {shape: [params[i] for i in members] for shape, members in groups.items()}
    adamw = torch.optim.AdamW(rest, fused=args.torch_device == "cuda" or None) if rest else None
    a, b, c = coefficients

    def step():
        torch._foreach_lerp_(buffers, gradient, 1 - momentum)
        updates = torch._foreach_lerp(gradient, buffers, momentum)
        torch._foreach_mul_(params, 1 - lr * decay)
        for shape, members in groups.items():
            stack = stacks[shape]
            torch._foreach_copy_(places[shape], [updates[i] for i in members])
            x = stack.mT if shape[0] > shape[1] else stack
            x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
            for _ in range(steps):
                gram = torch.bmm(x, x.mT)
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            x = (x.mT if shape[0] > shape[1] else x).to(matrices[members[0]].dtype).contiguous()
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_add_(of_shape[shape], list(x.unbind()), alpha=-lr * scale)
        if adamw:
            adamw.step()

    return step, matrices


def seconds_of(torch, args, step, iterations):
    """Each from one synchronisation to the next."""
    synchronize = torch.cuda.synchronize if args.torch_device == "cuda" else lambda: None
    seconds = []
    for _ in range(iterations):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


# ---- a case ----

class Case:
    def __init__(self, name, tensors, kind, extra, dtype=None, target=None):
        self.name, self.tensors, self.kind, self.extra, self.dtype, self.target = name, tensors, kind, extra, dtype, target


def cases_of(args):
    found = []
    for shape in filter(None, args.shapes.split(",")):
        if args.device == "cpu":
            found.append(Case(shape, tensors_of_shape(shape, "fp32"), "ns", ["--shapes", f"{shape}x1"]))
            continue
        for dtype in args.dtype:
            found.append(Case(shape, tensors_of_shape(shape, dtype), "step", ["--shapes", shape, "--dtype", dtype], dtype,
                              TARGETS.get(shape) if dtype == "fp32" else None))
    for model in args.model:
        path, layers = re.fullmatch(r"(.*?)(?::(\d+))?", model).groups()
        name = os.path.splitext(os.path.basename(path))[0]
        try:
            tensors = list(tensors_of_model(args, path, int(layers or 0)))
        except (OSError, Failed) as error:
            print(f"{name:22s} failed: {str(error).strip().splitlines()[0]}", flush=True)
            continue
        dtypes = {dtype for _, _, dtype in tensors}
        found.append(Case(f"{name}, {layers} layers" if layers else name, tensors, "step",
                          [path] + (["--layers", layers] if layers else []), dtypes.pop() if len(dtypes) == 1 else "mixed"))
    return found


class Torch:
    """What is compared with, ready for a case: names and steps, and how far their first updates are apart."""

    def __init__(self, torch, args, case):
        grads = gradients(torch, args, case.tensors)
        makers = {"torch": shipped} | ({"by_hand": by_hand} if args.device == "cuda" else {})
        self.steps, first, self.warm = {}, {}, {}
        for name, make in makers.items():
            self.steps[name], matrices = make(torch, args, grads)
            seconds_of(torch, args, self.steps[name], 1)
            first[name] = matrices[0].detach().float().clone()
            self.warm[name] = seconds_of(torch, args, self.steps[name], 1)[0]
        self.apart = (float((first["by_hand"] - first["torch"]).norm() / first["torch"].norm()) if "by_hand" in first else None)


def iterations_within(args, seconds, share):
    """As many as were asked for, or as fit into a twentieth of the case's time; three at least."""
    return args.iterations if not share else max(3, min(args.iterations, int(0.05 * share / max(seconds, 1e-6))))


def measure(torch, args, case, share, errors):
    """{contender: [median of a round]}, {settings: last row of ours}, how far torch's two are apart."""
    found, last, begin = {}, {}, time.monotonic()
    others = Torch(torch, args, case)
    fastest = min(others.warm.values())
    for number in range(args.rounds):
        round_begin = time.monotonic()
        progress(f"{case.name} {case.dtype or ''}: round {number + 1} of {args.rounds}")
        for name, step in others.steps.items():
            n = iterations_within(args, others.warm[name], share)
            seconds_of(torch, args, step, 2)  # clocks and caches as they are in a run of steps
            found.setdefault(name, []).append(statistics.median(seconds_of(torch, args, step, n)))
        if args.torch_device == "cuda":
            torch.cuda.empty_cache()  # ours is another process
        for settings in args.ours:
            if settings in errors:
                continue
            try:
                last[settings] = bench(args, case.kind, case.extra, settings, iterations_within(args, fastest, share))
                time_us = last[settings]["step_us" if case.kind == "step" else "time_us"]
                found.setdefault(settings, []).append(1e-6 * time_us["median"])
            except Failed as error:
                errors[settings] = str(error)
                progress(f"{case.name}, {settings}: {str(error).strip().splitlines()[-1]}")
        now = time.monotonic()
        if share and now - begin + (now - round_begin) > share:
            break
    return found, last, others.apart


def spread(seconds):
    return f"{100 * (max(seconds) - min(seconds)) / statistics.median(seconds):.0f} %" if len(seconds) > 1 else "-"


def print_row(case, settings, found, row):
    def ratio(name):
        return f"{row['ratio' if name == 'torch' else 'ratio_by_hand']:.2f}" if name in found else "-"

    def milliseconds(name):
        return f"{1e3 * statistics.median(found[name]):.3f}" if name in found else "-"

    target = f">= {case.target:g}" if case.target else "-"
    host = f"{row['host_us']:.0f}" if row.get("host_us") is not None else "-"
    print(f"{case.name:22s} {case.dtype or '':5s} {settings:60s} {milliseconds('torch'):>11s} {milliseconds('by_hand'):>11s} "
          f"{milliseconds(settings):>11s} {spread(found[settings]):>7s} {ratio('torch'):>8s} {ratio('by_hand'):>8s} {target:>7s} "
          f"{host:>9s}   {row['rounds']}", flush=True)


def compare(torch, args, case, share):
    """Prints and returns the rows of a case; False: something of it failed."""
    errors, rows = {}, []
    try:
        found, last, apart = measure(torch, args, case, share, errors)
    except (RuntimeError, OSError, Failed) as error:  # torch's out of memory is one of the first
        print(f"{case.name:22s} {case.dtype or '':5s} failed: {str(error).splitlines()[0]}", flush=True)
        return [{"what": case.name, "dtype": case.dtype, "error": str(error)}], False
    if apart is not None and not apart < 0.05:
        print(f"# {case.name}: the first update by hand is {apart:.2g} of torch's away from it", flush=True)
    for settings in args.ours:
        if settings in errors and settings not in found:
            print(f"{case.name:22s} {case.dtype or '':5s} {settings:60s} failed", flush=True)
            rows.append({"what": case.name, "dtype": case.dtype, "settings": settings, "error": errors[settings]})
            continue
        own = statistics.median(found[settings])
        row = {"what": case.name, "dtype": case.dtype, "settings": settings, "rounds": len(found[settings]), "target": case.target,
               "torch_s": found["torch"], "ours_s": found[settings], "ratio": statistics.median(found["torch"]) / own}
        if "by_hand" in found:
            row |= {"by_hand_s": found["by_hand"], "ratio_by_hand": statistics.median(found["by_hand"]) / own, "torch_apart": apart}
        if case.kind == "step":
            row |= {key: last[settings][key] for key in ("step_us", "phases_us", "phases_gbs", "ns_gflops", "device", "memory")}
            row["host_us"] = last[settings]["host_us"]["median"]
        print_row(case, settings, found, row)
        rows.append(row)
    return rows, not errors


def main():
    args = arguments()
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.device == "cuda":
        args.overrides = ["backend=cuda", *args.overrides]
    on = torch.cuda.get_device_name() if args.torch_device == "cuda" else torch.backends.cpu.get_cpu_capability()
    print(f"# torch {torch.__version__} ({on}), {args.threads} threads, up to {args.rounds} rounds of {args.iterations} in turns"
          + (f", {args.budget:.0f} s for all" if args.budget else ""))
    print(f"# {'':20s} {'':5s} {'ours':60s} {'torch':>11s} {'by hand':>11s} {'ours':>11s} {'spread':>7s} {'over':>8s} {'over':>8s} "
          f"{'target':>7s} {'host':>9s}")
    print(f"# {'':20s} {'':5s} {'':60s} {'(ms)':>11s} {'(ms)':>11s} {'(ms)':>11s} {'':>7s} {'torch':>8s} {'by hand':>8s} {'':>7s} "
          f"{'(us)':>9s}   rounds")
    rows, good = [], True
    cases = cases_of(args)
    asked = len([s for s in args.shapes.split(",") if s]) * (len(args.dtype) if args.device == "cuda" else 1) + len(args.model)
    for number, case in enumerate(cases):
        left = args.budget - (time.monotonic() - BEGIN)
        share = max(left / (len(cases) - number), 1.0) if args.budget else 0.0
        found, fine = compare(torch, args, case, share)
        rows += found
        good = good and fine
        if args.torch_device == "cuda":
            torch.cuda.empty_cache()
        if args.json:  # what there is, should the rest be cut off
            with open(args.json, "w") as file:
                json.dump({"schema": 2, "torch": torch.__version__, "device": args.device, "torch_device": args.torch_device,
                           "on": on, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": " ".join(sys.argv),
                           "threads": args.threads, "rows": rows}, file, indent=1)
    progress("done")
    return 0 if good and len(cases) == asked else 1


if __name__ == "__main__":
    sys.exit(main())
