#!/usr/bin/env python3
"""Why 16-bit originals differ from `muonshard`: Newton-Schulz in bf16, written out with their roundings one by one.

    python3 tests/parity/causes.py --muonshard PATH

Two things are varied: whether the norm is taken before or after the cast to bf16, and what is rounded on its own: bA, cA, (cA)A, aX,
BX and the sums (`apart`); all of these but (cA)A made of AA (`aa`); or each product with its sum once (`fused`), as muonshard does.
Printed is the relative difference of one update, the worst of parity.py's matrices.
"""
import argparse
import tempfile

import numpy as np
import parity
import torch

SIMPLE = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [(8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]
BF16 = torch.bfloat16


def product(a, b):
    return a.float() @ b.float()


def newton_schulz(g, rows, cast_first, rounding, safety, eps):
    x = g if g.shape[0] <= g.shape[1] else g.T
    if cast_first:
        x = x.to(BF16)
        x = x / (x.norm() * safety + eps)
    else:
        x = (x.double() / (x.double().norm() * safety + eps)).float().to(BF16)
    for a, b, c in rows:
        gram = product(x, x.T).to(BF16)
        if rounding == "apart":
            poly = b * gram + c * gram @ gram
        elif rounding == "aa":
            poly = b * gram + c * (gram @ gram)
        else:
            poly = (b * gram.float() + c * product(gram, gram)).to(BF16)
        x = (a * x.float() + product(poly, x)).to(BF16) if rounding == "fused" else a * x + poly @ x
    return (x if g.shape[0] <= g.shape[1] else x.T).float()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--muonshard", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    params, steps = parity.make_tensors()
    zeros = {name: np.zeros_like(params[name]) for name in parity.MUON}
    parity.STEPS = 1
    for preset, rows, safety, eps in (("jordan", SIMPLE, 1.0, 1e-7), ("dion_repo", POLAR_EXPRESS, 1.02, 1e-8)):
        settings = {"preset": preset, "lr": 1, "weight_decay": 0, "scale": "none", "nesterov": "false", "momentum": 0}
        with tempfile.TemporaryDirectory() as folder: # W = 0 - 1 U
            ours = parity.replay(args.muonshard, folder, zeros, steps[:1], parity.MUON, settings)[1]
        for cast_first in (True, False):
            for rounding in ("apart", "aa", "fused"):
                worst = 0.0
                for name in parity.MUON:
                    theirs = newton_schulz(torch.from_numpy(steps[0][name]), rows, cast_first, rounding, safety, eps).numpy()
                    worst = max(worst, np.linalg.norm(theirs + ours[name]) / np.linalg.norm(theirs))
                print(f"{preset:10} {'cast, then norm' if cast_first else 'norm, then cast'}  {rounding:6} {worst:.1e}")


if __name__ == "__main__":
    main()
