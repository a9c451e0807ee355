#!/usr/bin/env python3
"""PyTorch's Muon beside ours, in turns in one run, with the same threads.

    python3 -m venv /tmp/torch && /tmp/torch/bin/pip install torch numpy pyyaml
    /tmp/torch/bin/python launch/bench_vs_torch.py [--threads N] [--rounds R] [--muonshard COMMAND]
                                                   [--model FILE] [--shapes LIST] [--json FILE] [key=value...]

Single shapes: torch.optim.Muon's step on one parameter against `muonshard bench ns` of one matrix. The whole step: torch.optim.Muon
on the matrices of the model file and AdamW on the rest against `muonshard bench step`. Ours runs once with each setting of
--ours; key=value goes to all of them. Each round measures both; what is printed is the median over the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

OURS = ["preset=torch", "preset=torch ns_form=auto", "preset=torch ns_dtype=fp32 ns_form=auto"]


def arguments():
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=5, help="of a round, of which the median counts")
    parser.add_argument("--muonshard", default=os.path.join(here, "build/release/launch/muonshard"))
    parser.add_argument("--model", default=os.path.join(here, "configs/models/gpt2-124m.yaml"))
    parser.add_argument("--shapes", default="768x768,768x3072,1024x4096", help="ROWSxCOLS separated by commas; empty: none")
    parser.add_argument("--ours", action="append", help="settings to run ours with, may be repeated; default: " + "; ".join(OURS))
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("overrides", nargs="*", help="key=value for ours")
    return parser.parse_args()


def ours(args, kind, extra, settings):
    """The rows of one run of `muonshard bench`."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "out.json")
        command = [args.muonshard, "bench", kind, *extra, "-n", str(args.iterations), "-w", "2", "-J", path,
                   f"threads={args.threads}", *settings.split(), *args.overrides]
        environment = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        with open(path) as file:
            return json.load(file)


def median_seconds(iterations, step):
    step()
    step()
    seconds = []
    for _ in range(iterations):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def parameter(torch, shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = 1e-3 * torch.randn(shape)
    return p


def tensors_of(path):
    """(role, shape) of every matrix and every other tensor; stacks and row splits taken apart, as Muon sees them."""
    import yaml

    with open(path) as file:
        for tensor in yaml.safe_load(file)["tensors"]:
            shape = tensor["shape"]
            if tensor["role"] != "matrix":
                yield tensor["role"], shape
                continue
            batch = 1
            for size in shape[:-2]:
                batch *= size
            for _ in range(batch):
                for rows in tensor.get("row_splits", [shape[-2]]):
                    yield "matrix", [rows, shape[-1]]


def torch_step(torch, path):
    matrices, rest = [], []
    for role, shape in tensors_of(path):
        (matrices if role == "matrix" else rest).append(parameter(torch, shape))
    muon = torch.optim.Muon(matrices)
    adamw = torch.optim.AdamW(rest)

    def step():
        muon.step()
        adamw.step()

    return step


def print_row(what, settings, theirs, own, spread):
    print(f"{what:14s} {settings:42s} {1e3 * theirs:10.2f} {1e3 * own:10.2f} {theirs / own:8.2f}   {spread}", flush=True)


def compare(name, rounds, theirs, variants, rows):
    """theirs() and each of variants[settings]() in turns."""
    found = {settings: [] for settings in variants}
    other = []
    for _ in range(rounds):
        other.append(theirs())
        for settings, run in variants.items():
            found[settings].append(run())
    for settings, seconds in found.items():
        ratios = sorted(a / b for a, b in zip(other, seconds))
        print_row(name, settings, statistics.median(other), statistics.median(seconds), f"{ratios[0]:.2f}..{ratios[-1]:.2f}")
        rows.append({"what": name, "settings": settings, "torch_s": other, "ours_s": seconds,
                     "ratio": statistics.median(other) / statistics.median(seconds)})


def main():
    args = arguments()
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    settings = args.ours or OURS
    rows = []
    print(f"# torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), {args.threads} threads, "
          f"{args.rounds} rounds of {args.iterations} in turns")
    print(f"{'':14s} {'ours':42s} {'torch (ms)':>10s} {'ours (ms)':>10s} {'ratio':>8s}   of the rounds")
    for shape in filter(None, args.shapes.split(",")):
        rows_cols = [int(side) for side in shape.split("x")]
        muon = torch.optim.Muon([parameter(torch, rows_cols)])
        compare(shape, args.rounds, lambda: median_seconds(args.iterations, muon.step),
                {s: lambda s=s: 1e-6 * ours(args, "ns", ["--shapes", f"{shape}x1", "-c", "0"], s)["rows"][0]["time_us"]["median"]
                 for s in settings}, rows)
    if args.model:
        step = torch_step(torch, args.model)
        compare("whole step", args.rounds, lambda: median_seconds(args.iterations, step),
                {s: lambda s=s: 1e-6 * ours(args, "step", [args.model, "-c", "0"], s)["rows"][0]["step_us"]["median"]
                 for s in settings}, rows)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "threads": args.threads, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
