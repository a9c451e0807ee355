#!/usr/bin/env python3
"""Runs published optimizers beside `muonshard replay` on the same tensors and prints how far apart they end.

    python3 tests/parity/parity.py --muonshard build/release/launch/muonshard \
        [--source NAME=PATH[#VERSION] ...] [--only NAME,...] [--out FILE.md]

A system that isn't installed is left out, with the reason. Those that are no package come by --source: jordan (muon.py of
KellerJordan/Muon), moonlight (examples/toy_train.py of MoonshotAI/Moonlight), dion and nvidia (checkouts of microsoft/dion and
NVIDIA-NeMo/Emerging-Optimizers). tests/parity/README.md says how to install the rest.

The figure is |W_T - W'_T| / |W_T - W_0| (Frobenius), W from muonshard and W' from the original, the worst tensor's, after 1 and 10
steps. Learning rates are large, so that fp32 rounding of W is no part of it.
"""
import argparse
import ast
import contextlib
import datetime
import importlib
import math
import os
import platform
import subprocess
import sys
import tempfile

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from safetensors.numpy import load_file, save_file

STEPS = 10
LR = 0.05
MATRICES = {"square": (64, 64), "wide": (32, 96), "tall": (96, 32), "wide4": (24, 96), "tall4": (128, 32), "odd": (31, 47),
            "small": (8, 20)}
OTHERS = {"gain": (48,), "bias": (33,), "norm": (5,)}


def make_tensors():
    rng = np.random.default_rng(7)
    shapes = {**MATRICES, **OTHERS}
    params = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    steps = []
    for _ in range(STEPS):
        size = {name: 10.0 ** rng.uniform(-2, 1) for name in shapes}
        steps.append({name: (size[name] * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()})
    return params, steps


def replay(muonshard, folder, params, steps, names, settings):
    """{1: {name: W}, STEPS: {name: W}}"""
    config = os.path.join(folder, "config.yaml")
    with open(config, "w") as out:
        out.write("".join(f"{key}: {value}\n" for key, value in settings.items()))
    save_file({n: params[n] for n in names}, os.path.join(folder, "w0.safetensors"))
    grads = []
    for t, step in enumerate(steps):
        grads.append(os.path.join(folder, f"g{t:02}.safetensors"))
        save_file({n: step[n] for n in names}, grads[-1])
    out = os.path.join(folder, "out.safetensors")
    run = subprocess.run([muonshard, "replay", config, "--params", os.path.join(folder, "w0.safetensors"), "--grads", *grads,
                          "--out", out, "--out-every", "1"], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"muonshard replay failed:\n{run.stderr}")
    return {1: load_file(out.replace(".safetensors", "-000001.safetensors")), STEPS: load_file(out)}


def difference(params, ours, theirs, names):
    worst = 0.0
    for name in names:
        a, b, start = (x.astype(np.float64) for x in (ours[name], theirs[name], params[name]))
        worst = max(worst, np.linalg.norm(a - b) / np.linalg.norm(a - start))
    return worst


# ---- PyTorch ----

@contextlib.contextmanager
def working_in_fp32(wanted):
    """bf16 means fp32: what is left is everything but the working dtype."""
    import torch
    if not wanted:
        yield
        return
    dtype, cast = torch.bfloat16, torch.Tensor.bfloat16
    torch.bfloat16, torch.Tensor.bfloat16 = torch.float32, torch.Tensor.float
    try:
        yield
    finally:
        torch.bfloat16, torch.Tensor.bfloat16 = dtype, cast


def run_torch(make_optimizer, params, steps, names, fp32=False):
    import torch
    torch.set_num_threads(1)
    weights = {n: torch.nn.Parameter(torch.from_numpy(params[n].copy())) for n in names}
    optimizer = make_optimizer(list(weights.values()))
    states = {}
    for t, step in enumerate(steps, 1):
        for name in names:
            weights[name].grad = torch.from_numpy(step[name].copy())
        with working_in_fp32(fp32):
            optimizer.step()
        if t in (1, STEPS):
            states[t] = {n: w.detach().numpy().copy() for n, w in weights.items()}
    return states


def definitions(path, names):
    """Top-level functions and classes of a file, without running the rest of it."""
    import torch
    with open(path) as source:
        tree = ast.parse(source.read())
    kept = [node for node in tree.body if getattr(node, "name", None) in names]
    module = {"torch": torch, "math": math}
    exec(compile(ast.Module(body=kept, type_ignores=[]), path, "exec"), module)
    return module


def from_checkout(folder, module):
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(folder)


def user_source(source, name):
    """Path and version of what came by --source."""
    if name not in source:
        raise ImportError(f"no package; --source {name}=PATH names a copy")
    path, _, version = source[name].partition("#")
    return path, version or "local copy"


# ---- the systems: rows of (what, preset and overrides, states, names) ----

MUON = list(MATRICES)
ADAM = list(OTHERS)


def system_torch(params, steps, source):
    import torch
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"torch {torch.__version__} has no Muon")
    version = f"torch {torch.__version__}"
    base = {"preset": "torch", "lr": LR}
    for adjust, scale in (("original", "shape"), ("match_rms_adamw", "rms")):
        for fp32 in (False, True):
            def make(weights):
                return torch.optim.Muon(weights, lr=LR, adjust_lr_fn=adjust)
            yield (f"{version}, Muon {adjust}" + (", in fp32" if fp32 else ""),
                   {**base, "scale": scale, **({"ns_dtype": "fp32"} if fp32 else {})},
                   run_torch(make, params, steps, MUON, fp32), MUON)
    yield (f"{version}, AdamW", {"preset": "torch", "adam.lr": LR},
           run_torch(lambda w: torch.optim.AdamW(w, lr=LR, weight_decay=0.01), params, steps, ADAM), ADAM)


def system_optax(params, steps, source):
    import jax
    import jax.numpy as jnp
    import optax
    version = f"optax {optax.__version__}"

    def run(**settings):
        names = MUON + ADAM
        optimizer = optax.contrib.muon(LR, **settings)
        weights = {n: jnp.asarray(params[n]) for n in names}
        state = optimizer.init(weights)
        states = {}
        with jax.default_matmul_precision("highest"):
            for t, step in enumerate(steps, 1):
                updates, state = optimizer.update({n: jnp.asarray(step[n]) for n in names}, state, weights)
                weights = optax.apply_updates(weights, updates)
                if t in (1, STEPS):
                    states[t] = {n: np.asarray(w) for n, w in weights.items()}
        return states

    plain = run()
    yield f"{version}, contrib.muon, matrices", {"preset": "optax", "lr": LR}, plain, MUON
    yield f"{version}, contrib.muon, the rest", {"preset": "optax", "lr": LR}, plain, ADAM
    yield (f"{version}, contrib.muon, weight decay 0.1, no Nesterov",
           {"preset": "optax", "lr": LR, "weight_decay": 0.1, "nesterov": "false"},
           run(weight_decay=0.1, nesterov=False), MUON)


def system_jordan(params, steps, source):
    path, version = user_source(source, "jordan")
    module = definitions(path, {"zeropower_via_newtonschulz5", "muon_update", "adam_update", "SingleDeviceMuonWithAuxAdam"})
    version = f"KellerJordan/Muon {version}"

    def make(muon):
        return lambda weights: module["SingleDeviceMuonWithAuxAdam"](
            [dict(params=weights, use_muon=True, lr=LR, weight_decay=0.1)] if muon else
            [dict(params=weights, use_muon=False, lr=LR, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)])

    settings = {"preset": "jordan", "lr": LR, "weight_decay": 0.1}
    yield f"{version}, Muon", settings, run_torch(make(True), params, steps, MUON), MUON
    yield (f"{version}, Muon, in fp32", {**settings, "ns_dtype": "fp32"},
           run_torch(make(True), params, steps, MUON, True), MUON)
    yield (f"{version}, Adam", {"preset": "jordan", "adam.lr": LR, "adam.weight_decay": 0.1},
           run_torch(make(False), params, steps, ADAM), ADAM)


def system_moonlight(params, steps, source):
    path, version = user_source(source, "moonlight")
    module = definitions(path, {"zeropower_via_newtonschulz5", "Muon"})
    version = f"Moonlight {version}"
    settings = {"preset": "moonlight", "lr": LR}
    make = lambda weights: module["Muon"](lr=LR, wd=0.1, muon_params=weights)
    yield f"{version}, Muon", settings, run_torch(make, params, steps, MUON), MUON
    yield (f"{version}, Muon, in fp32", {**settings, "ns_dtype": "fp32"},
           run_torch(make, params, steps, MUON, True), MUON)
    yield (f"{version}, AdamW", settings,
           run_torch(lambda w: module["Muon"](lr=LR, wd=0.1, muon_params=[], adamw_params=w), params, steps, ADAM), ADAM)


def system_dion(params, steps, source):
    path, version = user_source(source, "dion")
    muon = from_checkout(path, "dion.muon").Muon
    version = f"microsoft/dion {version}"
    settings = {"preset": "dion_repo", "lr": LR}
    for what, options, ours in (("Muon", {}, {}), ("Muon, cautious", {"cautious_wd": True, "weight_decay": 0.5},
                                                 {"decay": "cautious", "weight_decay": 0.5})):
        make = lambda weights: muon([dict(params=weights)], lr=LR, **options)
        yield f"{version}, {what}", {**settings, **ours}, run_torch(make, params, steps, MUON), MUON
        yield (f"{version}, {what}, in fp32", {**settings, **ours, "ns_dtype": "fp32"},
               run_torch(make, params, steps, MUON, True), MUON)
    for algorithm in ("adamw", "lion"):
        make = lambda weights: muon([dict(params=weights, algorithm=algorithm)], lr=LR)
        yield (f"{version}, {algorithm}", {**settings, "elementwise": algorithm},
               run_torch(make, params, steps, ADAM), ADAM)


def system_nvidia(params, steps, source):
    path, version = user_source(source, "nvidia")
    module = from_checkout(path, "emerging_optimizers.orthogonalized_optimizers.muon")
    version = f"NVIDIA Emerging-Optimizers {version}"
    for scale, ours in (("spectral", "spectral"), ("shape_scaling", "shape"), ("unit_rms_norm", "ratio")):
        make = lambda weights: module.Muon(weights, lr=LR, scale_mode=scale, fp32_matmul_prec="highest")
        yield (f"{version}, Muon {scale}, highest", {"preset": "nvidia", "lr": LR, "scale": ours, "ns_dtype": "fp32"},
               run_torch(make, params, steps, MUON), MUON)
    for kind, ours in (("polar_express", {"coefficients": "polar_express_nvidia", "ns_steps": 8}),
                       ("cans", {"coefficients": "cans"}), ("simple", {"coefficients": "simple"})):
        make = lambda weights: module.Muon(weights, lr=LR, coefficient_type=kind, num_ns_steps=ours.get("ns_steps", 5),
                                           fp32_matmul_prec="highest")
        yield (f"{version}, Muon {kind}, highest", {"preset": "nvidia", "lr": LR, "ns_dtype": "fp32", **ours},
               run_torch(make, params, steps, MUON), MUON)
    make = lambda weights: module.Muon(weights, lr=LR, fp32_matmul_prec="medium")
    yield (f"{version}, Muon, medium (as this CPU takes it)", {"preset": "nvidia", "lr": LR},
           run_torch(make, params, steps, MUON), MUON)


def system_pytorch_optimizer(params, steps, source):
    import importlib.metadata
    import pytorch_optimizer
    import torch
    from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5 as newton_schulz
    version = f"pytorch_optimizer {importlib.metadata.version('pytorch_optimizer')}"
    settings = {"preset": "jordan", "lr": LR, "weight_decay": 0.1}
    make = lambda weights: pytorch_optimizer.Muon([dict(params=weights, use_muon=True)], lr=LR, weight_decay=0.1)
    yield f"{version}, Muon", settings, run_torch(make, params, steps, MUON), MUON
    shipped = newton_schulz.__defaults__
    newton_schulz.__defaults__ = tuple(torch.float32 if d is torch.bfloat16 else d for d in shipped)
    yield f"{version}, Muon, in fp32", {**settings, "ns_dtype": "fp32"}, run_torch(make, params, steps, MUON), MUON
    newton_schulz.__defaults__ = shipped


def system_gram(params, steps, source):
    import importlib.metadata
    import gram_newton_schulz
    version = f"gram-newton-schulz {importlib.metadata.version('gram-newton-schulz')}"
    for algorithm, form in (("gram_newton_schulz", "gram"), ("standard_newton_schulz", "standard")):
        make = lambda weights: gram_newton_schulz.Muon(weights, lr=LR, ns_use_kernels=False, ns_algorithm=algorithm,
                                                       gram_newton_schulz_restart_iterations=[2])
        yield (f"{version}, Muon {algorithm}", {"preset": "gram", "lr": LR, "ns_form": form},
               run_torch(make, params, steps, MUON), MUON)


SYSTEMS = {"torch": system_torch, "optax": system_optax, "jordan": system_jordan, "moonlight": system_moonlight,
           "dion": system_dion, "nvidia": system_nvidia, "pytorch_optimizer": system_pytorch_optimizer,
           "gram": system_gram}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--muonshard", required=True)
    parser.add_argument("--source", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", default=",".join(SYSTEMS))
    parser.add_argument("--out")
    args = parser.parse_args()
    source = dict(item.split("=", 1) for item in args.source)
    params, steps = make_tensors()
    rows, left_out = [], []
    for name in args.only.split(","):
        try:
            for what, settings, theirs, names in SYSTEMS[name](params, steps, source):
                with tempfile.TemporaryDirectory() as folder:
                    ours = replay(args.muonshard, folder, params, steps, names, settings)
                figures = [difference(params, ours[t], theirs[t], names) for t in (1, STEPS)]
                overrides = ", ".join(f"{k}={v}" for k, v in settings.items() if k != "preset")
                rows.append((what, settings["preset"], overrides, *figures))
                print(f"{what:72} {settings['preset']:12} {figures[0]:9.1e} {figures[1]:9.1e}  {overrides}", flush=True)
        except Exception as error:
            left_out.append((name, f"{type(error).__name__}: {error}"))
            print(f"{name}: left out: {left_out[-1][1]}", flush=True)
    if args.out:
        with open(args.out, "w") as out:
            out.write(f"# Published optimizers beside `muonshard replay`, {datetime.date.today()}\n\n"
                      f"`python3 tests/parity/parity.py`, Python {platform.python_version()}, {platform.machine()}. Figures: "
                      f"relative difference of the displacement, worst of {len(MATRICES)} matrices or {len(OTHERS)} vectors, "
                      f"after 1 and {STEPS} steps.\n\n| system | preset | overrides | 1 step | {STEPS} steps |\n|---|---|---|---|---|\n")
            for what, preset, overrides, one, ten in rows:
                out.write(f"| {what} | `{preset}` | {overrides} | {one:.1e} | {ten:.1e} |\n")
            for name, reason in left_out:
                out.write(f"\nLeft out: {name} ({reason}).\n")


if __name__ == "__main__":
    main()
