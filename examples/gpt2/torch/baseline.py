"""The GPT-2 of a run of bdia-gpt2 in PyTorch, on the same tokens: what it learns in a given time.

    python examples/gpt2/torch/baseline.py runs/gpt2 --seconds 120

Eager, f32, AdamW, everything stored. `train.bin`, `validation.bin`, `config.json` and
`tokenizer.json` are those of the run. The learning rate follows about the same curve, over the time
in place of the steps; initial values, weight decay and windows are the same, random numbers are
not.
"""

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = map(split, self.qkv(self.ln_1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    def __init__(self, vocab, positions, width, heads, layers):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.ln_f = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        return self.ln_f(self.blocks(x)) @ self.wte.weight.T


@torch.no_grad()
def bits_per_byte(model, tokens, lengths, context):
    nats = 0.0
    for at in range(0, len(tokens) - 1, context):
        window = tokens[at : at + context + 1]
        logits = model(window[None, :-1])
        nats += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
    return nats / math.log(2) / lengths[tokens].sum().item()


def raw(vocab, tokens):
    """The bytes that tokens stand for: byte-level BPE writes each of them as a character."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in plain]
    byte = {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}
    pieces = {i: b"" if p.startswith("<|") else bytes(byte[c] for c in p) for p, i in vocab.items()}
    return b"".join(pieces[t] for t in tokens.tolist())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    config = json.loads((args.run / "config.json").read_text())
    flags = json.loads((args.run / "run.json").read_text())
    for flag, value in {"accumulate": 1, "clip": 0, "smoothing": 0, "dropout": 0, "optimizer": "adamw"}.items():
        assert flags[flag] == value, f"{flag} of the run is {flags[flag]}, expected {value}"
    tokenizer = (args.run / "tokenizer.json").read_text(encoding="utf-8")
    vocab = json.loads(tokenizer)["model"]["vocab"]
    read = lambda name: torch.from_numpy(np.fromfile(args.run / name, "<u2").astype("int64"))
    train, validation = read("train.bin"), read("validation.bin")
    text = raw(vocab, validation)
    packed = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    print(f"xz -9e: {8 * packed / len(text):.3f} bits per byte of {len(text)}", flush=True)
    # The end of a text is no byte.
    lengths = torch.zeros(config["vocab_size"], dtype=torch.int64)
    for piece, i in vocab.items():
        lengths[i] = 0 if piece.startswith("<|") else len(piece)

    context, batch = config["n_positions"], flags["batch"]
    sizes = [config[key] for key in ("n_embd", "n_head", "n_layer")]
    model = Gpt2(config["vocab_size"], context, *sizes)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    betas = (flags["beta1"], flags["beta2"])
    adamw = torch.optim.AdamW(groups, betas=betas, weight_decay=flags["weight_decay"])

    start, step, share = time.monotonic(), 0, 0.0
    while share < 1.0:
        lr = flags["lr"] * (0.55 + 0.45 * math.cos(math.pi * share))
        for group in adamw.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(1, flags["warmup"]))
        at = torch.randint(len(train) - context, (batch, 1)) + torch.arange(context + 1)
        window = train[at]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        step, share = step + 1, (time.monotonic() - start) / args.seconds
        if step % 100 == 0:
            print(f"step {step:6}  {100 * share:3.0f} %  loss {loss.item():.4f}", flush=True)
    bits = bits_per_byte(model, validation, lengths, context)
    print(f"{step} steps in {args.seconds:.0f} s: {bits:.3f} bits per byte")


main()
