"""How much do the perturbed updates of BDIA training cost a pretrained language model?

A residual network computes x[k+1] = x[k] + h_k(x[k]). BDIA training replaces it, for k >= 1, by

    x[k+1] = x[k] + h_k(x[k]) + gamma_k (x[k-1] - x[k] + r_k(x[k])),    gamma_k = +-2^-m,

with r = h; any r that can be computed again from x[k] can be inverted as exactly. Every scheme here is

    x[k+1] = x[k] + h_k + g_k (h_k - p_{k+1}(x[k] + h_k)) - gamma_k (x[k] - x[k-1] - p_k(x[k])),

where p_k is nothing, or a linear predictor of h_{k-1}(x[k-1]) from x[k], fitted on other text:

    r = a h          g_k = a gamma_k, no p
    r = p            g_k = 0
    telescoped       g_k = gamma_{k+1}: what a step adds, the next removes, so x[k] is off the sum of all h by
                     gamma_k times a residual, whatever the signs; in the last step g = 0, so x[K] is not off at all

The network (a Llama such as SmolLM2-135M in a GGUF file) is not trained. The penalty is the growth of its loss in
nats per token, each sequence under both signs (two draws and their negatives where blocks draw their own), as mean
and standard error over sequences. "bits" is the base-4 logarithm of (penalty of "shared" at this m / penalty).

    pip install torch numpy gguf tokenizers
    gamma_penalty.py --gguf MODEL.gguf --text TEXT     TEXT: plain, documents separated by lines <|endoftext|>
"""
import argparse
import math
import sys
import time

import gguf
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


class Net:
    """A Llama whose blocks can be called one by one."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        field = {name: f.contents for name, f in reader.fields.items()}
        self.w = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()).float()
                  for t in reader.tensors}
        self.depth, self.eps = field["llama.block_count"](), field["llama.attention.layer_norm_rms_epsilon"]()
        self.heads, self.kv = field["llama.attention.head_count"](), field["llama.attention.head_count_kv"]()
        self.rope_base, self.rope_dim = field["llama.rope.freq_base"](), field["llama.rope.dimension_count"]()
        vocab = {token: i for i, token in enumerate(field["tokenizer.ggml.tokens"]())}
        merges = [tuple(m.split(" ")) for m in field["tokenizer.ggml.merges"]()]
        self.tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self.tokenizer.decoder = decoders.ByteLevel()

    def norm(self, x, name):
        return F.rms_norm(x, x.shape[-1:], self.w[name], self.eps)

    def block(self, k, x):
        """h_k(x), without the residual."""
        w, b, (n, t, d) = self.w, f"blk.{k}.", x.shape
        a = self.norm(x, b + "attn_norm.weight")
        q, key, v = (F.linear(a, w[f"{b}attn_{c}.weight"]).view(n, t, -1, self.rope_dim).transpose(1, 2) for c in "qkv")
        rate = self.rope_base ** (-torch.arange(0, self.rope_dim, 2) / self.rope_dim)
        angle = torch.arange(t)[:, None] * rate
        q, key = (self.rotate(z, angle.cos(), angle.sin()) for z in (q, key))
        key, v = (z.repeat_interleave(self.heads // self.kv, 1) for z in (key, v))
        a = F.scaled_dot_product_attention(q, key, v, is_causal=True).transpose(1, 2).reshape(n, t, d)
        f = F.linear(a, w[b + "attn_output.weight"])
        a = self.norm(x + f, b + "ffn_norm.weight")
        a = F.silu(F.linear(a, w[b + "ffn_gate.weight"])) * F.linear(a, w[b + "ffn_up.weight"])
        return f + F.linear(a, w[b + "ffn_down.weight"])

    @staticmethod
    def rotate(z, cos, sin):  # GGUF keeps the two of a pair side by side
        one, two = z[..., 0::2], z[..., 1::2]
        return torch.cat((one * cos - two * sin, one * sin + two * cos), -1)

    def embed(self, ids):
        return self.w["token_embd.weight"][ids]

    def logits(self, x):
        return F.linear(self.norm(x, "output_norm.weight"), self.w["token_embd.weight"])

    def loss(self, x, targets):
        """Mean loss of each sequence."""
        rows, flat = x.flatten(0, 1), targets.flatten()
        parts = [F.cross_entropy(self.logits(rows[i:i + 512]), flat[i:i + 512], reduction="none")
                 for i in range(0, len(flat), 512)]
        return torch.cat(parts).view(targets.shape).double().mean(1)

    def run(self, x, gamma=None, g=None, p=None, first=0, before=None, y=False, visit=None):
        """The last state, from x = x[first] and before = x[first - 1]. gamma, g: [depth, sequence, position or 1]."""
        for k in range(first, self.depth):
            h = self.block(k, x)
            after = x + h
            if visit:
                visit(k, h, after)
            if g is not None and g[k].any():
                add = h if p is None else h - predict(p[k + 1], after)
                after = after + g[k][..., None] * add
            if gamma is not None and gamma[k].any():
                off = x - before if p is None else x - before - predict(p[k], x)
                after = after - gamma[k][..., None] * off
            before, x = x, after
        if y:
            c = (gamma[-1] / (1 + gamma[-1]))[..., None]
            x = x - c * (x - before)
        return x


def unit(x):
    """x over its RMS, and 1 / RMS."""
    s = x.pow(2).mean(-1, keepdim=True).rsqrt()
    return x * s, s


def predict(p, x):
    normed, w, b = p
    x = unit(x)[0] if normed else x
    return (x @ w if w.dim() == 2 else x * w) + b


PREDICTORS = ("full", "full, normed x", "rank 64, normed x", "rank 16, normed x", "diagonal", "scalar", "rank 1 + mean",
              "mean")


def fit(net, ids, ridge=1e-3):
    """For each predictor a list over k; each token counts by 1 / mean(x[k]^2), as the norms of the network see it."""
    d, sums = net.w["output_norm.weight"].numel(), {}

    def visit(k, h, x):
        z, s = (v.flatten(0, 1) for v in unit(x))
        target = h.flatten(0, 1) * s
        for normed, a in ((False, z), (True, z * s)):
            a = torch.cat((a, s), 1)
            for name, m in ((("G", normed, k + 1), a.T @ a), (("C", normed, k + 1), a.T @ target)):
                sums[name] = sums.get(name, 0) + m.double()

    for part in ids.split(16):
        net.run(net.embed(part), visit=visit)
    out = {name: [None] * (net.depth + 1) for name in PREDICTORS}
    for k in range(1, net.depth + 1):
        for normed in (False, True):
            gram, cross = sums["G", normed, k], sums["C", normed, k]
            one, sx, sy = gram[d, d], gram[:d, d], cross[d]
            gc, cc = gram[:d, :d] - torch.outer(sx, sx) / one, cross[:d] - torch.outer(sx, sy) / one

            def put(name, w):
                b = (sy - (w.T @ sx if w.dim() == 2 else w * sx)) / one
                out[name][k] = (normed, w.float(), b.float())

            w = torch.linalg.solve(gc + ridge * torch.diag(gc.diag()), cc)
            vectors = torch.linalg.eigh(w.T @ gc @ w)[1].flip(1)
            put("full, normed x" if normed else "full", w)
            for rank, name in ((64, "rank 64, normed x"), (16, "rank 16, normed x"), (1, "rank 1 + mean")):
                if normed:
                    v = vectors[:, :rank]
                    put(name, w @ v @ v.T)
            if not normed:
                put("diagonal", cc.diag() / gc.diag())
                put("mean", torch.zeros(d, dtype=torch.double))
                a = cross[:d].trace() / gram[:d, :d].trace()
                out["scalar"][k] = (False, a.float().expand(d), torch.zeros(d))
    return out


def greedy_bits(cost, average, low=1, high=8):
    """Bits per step, from the penalty of each step alone at m = 2, which falls by 4 for each bit."""
    bits = [low] * len(cost)
    for _ in range(round((average - low) * len(cost))):
        gain = [c * 4.0 ** (2 - b) if b < high else -1 for c, b in zip(cost, bits)]
        bits[gain.index(max(gain))] += 1
    return bits


class Experiment:
    def __init__(self, net, ids, targets):
        self.net, self.ids, self.targets, self.depth = net, ids, targets, net.depth
        self.x0, self.reference, self.start = net.embed(ids), {}, time.time()
        self.base = net.loss(net.run(self.x0), targets)

    def signs(self, kind):
        """Draws of [depth, sequence, 1]."""
        n = len(self.ids)
        if kind == "block":
            gen = torch.Generator().manual_seed(1)
            draws = [torch.randint(0, 2, (self.depth, n, 1), generator=gen) * 2.0 - 1 for _ in range(2)]
        else:
            flip = -1.0 if kind == "alternating" else 1.0
            draws = [torch.tensor([flip ** k for k in range(self.depth)])[:, None, None].expand(-1, n, -1)]
        return [s * d for d in draws for s in (1.0, -1.0)]

    def penalty(self, m, signs, a=1.0, p=None, tele=False, plain_last=False, y=False, exempt=False, draws=4):
        """m: bits of each step, a number or one for each k = 1 .. depth - 1. Returns the penalty of each sequence."""
        size = torch.as_tensor([0.0] + [2.0 ** -b for b in (m if isinstance(m, list) else [m] * (self.depth - 1))])
        total = 0
        kinds = self.signs(signs)[:draws]
        for s in kinds:
            gamma = size[:, None, None] * s
            if exempt:
                gamma = gamma * (torch.arange(self.ids.shape[1]) > 0)
            if plain_last:
                gamma[-1] = 0
            if tele:
                g = torch.cat((gamma[1:], torch.zeros_like(gamma[:1])))
            else:
                g = gamma * (a if p is None else 0.0)
            if y:
                g = torch.cat((gamma[1:2], g[1:]))
            x = self.net.run(self.x0, gamma, g, p, y=y)
            total = total + self.net.loss(x, self.targets) - self.base
        return total / len(kinds)

    def alone(self, tele):
        """Penalty of gamma = 1/4 in each step alone; telescoped: what step k - 1 adds and step k removes."""
        states, out = [self.x0], []
        self.net.run(self.x0, visit=lambda k, h, x: states.append(x))
        for k in range(1, self.depth):
            total = 0
            for s in (0.25, -0.25):
                gamma = torch.zeros(self.depth, len(self.ids), 1)
                gamma[k] = s
                x, before, g = states[k], states[k - 1], gamma
                if tele:
                    g, x = None, x + s * (x - before)
                    # step k removes exactly what was added, as in the sum over all steps
                    gamma[k] = s / (1 + s)
                x = self.net.run(x, gamma, g, first=k, before=before)
                total = total + (self.net.loss(x, self.targets) - self.base).mean().item() / 2
            out.append(total)
        return out

    def cell(self, m, penalty, reference=False):
        if reference:
            self.reference[m] = penalty
        n, mean = len(penalty), penalty.mean().item()
        text = f"{mean:.5f} ± {penalty.std().item() / n ** 0.5:.5f}"
        if m in self.reference and not reference:
            if mean <= 0:
                return text + " (-)"
            ref = self.reference[m]
            left = [math.log(max(1e-9, (ref.sum() - ref[i]) / max(1e-9, penalty.sum() - penalty[i])), 4)
                    for i in range(n)]
            se = ((n - 1) / n * sum((v - sum(left) / n) ** 2 for v in left)) ** 0.5
            text += f" ({math.log(ref.mean().item() / mean, 4):+.2f} ± {se:.2f})"
        return text

    def row(self, name, ms, reference=False, **how):
        cells = [self.cell(m, self.penalty(m, **how), reference) for m in ms]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        print(f"{time.time() - self.start:.0f} s: {name}", file=sys.stderr, flush=True)


def header(title, columns):
    print(f"\n### {title}\n\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns), flush=True)
