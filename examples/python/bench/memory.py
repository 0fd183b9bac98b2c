"""Peak memory of one training step: plain autograd, torch.utils.checkpoint, and bdia, at several depths.

    python bench/memory.py --csv memory.csv --svg memory.svg      # every configuration in a process of its own, and a table
    python bench/memory.py --depths 6 12   # fewer

The model is a stack of pre-norm transformer blocks. Measured is VmHWM, the operating system's own peak, above what the
process holds before the step: the parameters, and what one step before has left. Gradients are freed between the steps,
as optimizers' `zero_grad` does, and count; with `--hold-gradients` they are kept, and what is left is the activations.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

WAYS = ["autograd", "checkpoint 1", "checkpoint sqrt", "bdia", "bdia, one sample a chunk"]


def status(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def trim():
    """Gives back what the allocator has free, so that it does not count."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def one(way, depth, batch, tokens, width, held):
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint, checkpoint_sequential

    import bdia

    torch.set_num_threads(2)
    torch.manual_seed(0)
    blocks = [
        nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        for _ in range(depth)
    ]
    model = nn.Sequential(*blocks).train()
    if way.startswith("bdia"):
        model = bdia.ReversibleSequence(blocks, chunk=1 if "chunk" in way else None).train()

    def step():
        x = torch.randn(batch, tokens, width, requires_grad=True)
        if way == "checkpoint 1":
            y = x
            for block in blocks:
                y = checkpoint(block, y, use_reentrant=False)
        elif way == "checkpoint sqrt":
            y = checkpoint_sequential(model, max(1, round(depth**0.5)), x, use_reentrant=False)
        else:
            y = model(x)
        y.pow(2).mean().backward()

    step()
    for p in model.parameters():
        if held:
            p.grad.zero_()
        else:
            p.grad = None
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
    before = status("VmRSS")
    step()
    peak = status("VmHWM") - before
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    side = model.plan((batch, tokens, width))["side_bits"] if way.startswith("bdia") else 0
    print(json.dumps({"way": way, "depth": depth, "peak": peak, "gradients": gradients, "side_bits": side}))


def svg(rows, depths, title):
    """Lines over depth, logarithmic downwards and across."""
    import math

    w, h, left, right, top, bottom = 720, 420, 70, 190, 40, 50
    peaks = [r["peak"] for r in rows]
    low, high = math.log2(min(peaks)) - 0.2, math.log2(max(peaks)) + 0.2
    first, last = math.log2(depths[0]), math.log2(depths[-1])
    x = lambda d: left + (math.log2(d) - first) / max(last - first, 1e-9) * (w - left - right)
    y = lambda p: top + (high - math.log2(p)) / (high - low) * (h - top - bottom)
    colours = ["#888888", "#d08000", "#b03060", "#0060c0", "#009060"]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" font-family="sans-serif" font-size="13">',
        f'<rect width="{w}" height="{h}" fill="white"/><text x="{left}" y="22">{title}</text>',
    ]
    mib = 2 ** math.ceil(low - 20)
    while mib * 2**20 <= 2**high:
        out.append(f'<line x1="{left}" x2="{w - right}" y1="{y(mib * 2**20):.1f}" y2="{y(mib * 2**20):.1f}" stroke="#dddddd"/>')
        out.append(f'<text x="{left - 8}" y="{y(mib * 2**20) + 4:.1f}" text-anchor="end">{mib} MiB</text>')
        mib *= 2
    for d in depths:
        out.append(f'<text x="{x(d):.1f}" y="{h - bottom + 20}" text-anchor="middle">{d}</text>')
    out.append(f'<text x="{(left + w - right) / 2}" y="{h - 10}" text-anchor="middle">blocks</text>')
    for way, colour in zip(WAYS, colours):
        points = sorted((r["depth"], r["peak"]) for r in rows if r["way"] == way)
        line = " ".join(f"{x(d):.1f},{y(p):.1f}" for d, p in points)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x(d):.1f}" cy="{y(p):.1f}" r="3" fill="{colour}"/>' for d, p in points]
        out.append(f'<text x="{w - right + 10}" y="{y(points[-1][1]) + 4:.1f}" fill="{colour}">{way}</text>')
    return "\n".join([*out, "</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24, 48])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--way", choices=WAYS, help="measure in this process: for the program itself")
    parser.add_argument("--hold-gradients", action="store_true", help="with --way: gradients are there before the step")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--svg", type=Path)
    a = parser.parse_args()
    if a.way:
        return one(a.way, a.depths[0], a.batch, a.tokens, a.width, a.hold_gradients)
    rows = []
    print(f"| blocks | {' | '.join(WAYS)} | of which gradients | side bits |\n|{'---|' * (len(WAYS) + 3)}")
    for depth in a.depths:
        line = []
        for way in WAYS:
            sizes = ["--batch", a.batch, "--tokens", a.tokens, "--width", a.width, "--depths", depth, "--way", way]
            out = subprocess.run([sys.executable, __file__, *map(str, sizes)], check=True, capture_output=True, text=True)
            line.append(json.loads(out.stdout.splitlines()[-1]))
        rows += line
        cells = " | ".join(f"{r['peak'] / 2**20:.0f} MiB" for r in line)
        print(f"| {depth} | {cells} | {line[-1]['gradients'] / 2**20:.1f} MiB | {line[-1]['side_bits'] / 2**20:.1f} MiB |", flush=True)
    if a.csv:
        with a.csv.open("w", newline="") as file:
            table = csv.DictWriter(file, ["depth", "way", "peak", "gradients", "side_bits"], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    if a.svg:
        title = f"Peak of a training step above parameters ({a.batch} x {a.tokens} x {a.width}, f32)"
        a.svg.write_text(svg(rows, a.depths, title))


if __name__ == "__main__":
    main()
