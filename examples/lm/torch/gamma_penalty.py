"""How much do the perturbed updates of BDIA training cost a pretrained language model?

A residual network computes x[k+1] = x[k] + h_k(x[k]). BDIA training replaces it, for k >= 1, by

    x[k+1] = x[k] + h_k(x[k]) + gamma_k (x[k-1] - x[k] + r_k(x[k])),    gamma_k = +-2^-m,

with r = h; any r that can be computed again from x[k] can be inverted as exactly. Every scheme here is

    x[k+1] = x[k] + h_k + g_k (h_k - p_{k+1}(x[k] + h_k)) - gamma_k (x[k] - x[k-1] - p_k(x[k])),

where p_k is nothing, or a linear predictor of h_{k-1}(x[k-1]) from x[k] that was fitted on other text:

    r = a h          g_k = a gamma_k, no p
    r = p            g_k = 0
    telescoped       g_k = c_{k+1} / (1 - c_{k+1}) with c_K = 0, c_k = gamma_k (1 - c_{k+1}): what a step adds, the
                     next removes, for any signs and sizes: y[k] = x[k] - c_k (x[k] - x[k-1] - p_k(x[k])) obeys
                     y[k+1] = y[k] + h_k (to first order in gamma if there is a p), and x[K] = y[K]

The network, a Llama in a GGUF file, is not trained. The penalty is the growth of its loss in nats per token, as mean
and standard error over sequences. A sign for a whole sequence is tried both ways, which is its expectation; where
steps draw their own, a draw and its negative are (for the paper's scheme two). In brackets: the base-4 logarithm of
(penalty of shared signs with a plain last step at the same bits / penalty), with its jackknife error.

    pip install torch numpy gguf tokenizers
    gamma_penalty.py --gguf MODEL.gguf --text TEXT     TEXT: plain, documents separated by lines <|endoftext|>
"""
import argparse
import copy
import math

import gguf
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PREDICTORS = ("full", "full, normed x", "rank 64, normed x", "rank 16, normed x", "rank 1 + mean", "diagonal", "scalar",
              "mean")


class Net:
    """A Llama whose blocks can be called one by one, or in groups of some as one."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        get = {name.split(".", 1)[1]: field.contents for name, field in reader.fields.items()}
        self.w = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
        self.blocks = self.depth = get["block_count"]()
        self.repeat = get["attention.head_count"]() // get["attention.head_count_kv"]()
        self.eps, self.head = get["attention.layer_norm_rms_epsilon"](), get["rope.dimension_count"]()
        self.rates = get["rope.freq_base"]() ** (-torch.arange(0, self.head, 2) / self.head)
        vocab = {token: i for i, token in enumerate(get["ggml.tokens"]())}
        merges = [tuple(m.split(" ")) for m in get["ggml.merges"]()]
        self.tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self.tokenizer.decoder = decoders.ByteLevel()

    def grouped(self, size):
        net = copy.copy(self)
        net.depth = self.blocks // size
        return net

    def norm(self, x, name):
        return F.rms_norm(x, x.shape[-1:], self.w[name], self.eps)

    def rotate(self, z):  # GGUF keeps the two of a pair side by side
        angle = torch.arange(z.shape[-2])[:, None] * self.rates
        one, two, cos, sin = z[..., 0::2], z[..., 1::2], angle.cos(), angle.sin()
        return torch.cat((one * cos - two * sin, one * sin + two * cos), -1)

    def block(self, k, x):
        """x + h_k(x)."""
        for i in range(k * self.blocks // self.depth, (k + 1) * self.blocks // self.depth):
            w = {name: self.w[f"blk.{i}.{name}.weight"] for name in ("ffn_gate", "ffn_up", "ffn_down", "attn_output")}
            a = self.norm(x, f"blk.{i}.attn_norm.weight")
            q, key, v = (F.linear(a, self.w[f"blk.{i}.attn_{c}.weight"]).unflatten(-1, (-1, self.head)).transpose(1, 2)
                         for c in "qkv")
            key, v = (z.repeat_interleave(self.repeat, 1) for z in (self.rotate(key), v))
            a = F.scaled_dot_product_attention(self.rotate(q), key, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + F.linear(a, w["attn_output"])
            a = self.norm(x, f"blk.{i}.ffn_norm.weight")
            x = x + F.linear(F.silu(F.linear(a, w["ffn_gate"])) * F.linear(a, w["ffn_up"]), w["ffn_down"])
        return x

    def embed(self, ids):
        return self.w["token_embd.weight"][ids]

    def logits(self, x):
        return F.linear(self.norm(x, "output_norm.weight"), self.w["token_embd.weight"])

    def loss(self, x, targets):
        """Mean loss of each sequence."""
        return torch.stack([F.cross_entropy(self.logits(a), t).double() for a, t in zip(x, targets)])

    def run(self, x, gamma=None, g=None, p=None, first=0, before=None, y=False, visit=None):
        """The last state, from x = x[first] and before = x[first - 1]. gamma, g: [depth, sequence, position or 1, 1]."""
        for k in range(first, self.depth):
            after = plain = self.block(k, x)
            if visit:
                visit(k, plain - x, plain)
            if g is not None and g[k].any():
                after = after + g[k] * (plain - x - predict(p, k + 1, plain))
            if gamma is not None and gamma[k].any():
                after = after - gamma[k] * (x - before - predict(p, k, x))
            before, x = x, after
        return x - gamma[-1] / (1 + gamma[-1]) * (x - before) if y else x


def unit(x):
    """x over its RMS, and 1 / RMS."""
    s = x.pow(2).mean(-1, keepdim=True).rsqrt()
    return x * s, s


def predict(p, k, x):
    if p is None:
        return 0
    normed, w, b = p[k]
    x = unit(x)[0] if normed else x
    return (x @ w if w.dim() == 2 else x * w) + b


def fit(net, ids, ridge=1e-3):
    """Each predictor for all k. A token counts by 1 / mean(x[k]^2), as the norms of the network see it."""
    d, sums, out = net.w["output_norm.weight"].numel(), {}, {name: {} for name in PREDICTORS}

    def visit(k, h, x):
        z, s = (v.flatten(0, 1) for v in unit(x))
        for normed, a in ((False, z), (True, z * s)):
            a = torch.cat((a, s), 1)
            gram, cross = sums.get((k + 1, normed), (0, 0))
            sums[k + 1, normed] = gram + (a.T @ a).double(), cross + (a.T @ (h.flatten(0, 1) * s)).double()

    for part in ids.split(16):
        net.run(net.embed(part), visit=visit)
    for (k, normed), (gram, cross) in sums.items():
        one, sx, sy = gram[d, d], gram[:d, d], cross[d]
        gc, cc = gram[:d, :d] - torch.outer(sx, sx) / one, cross[:d] - torch.outer(sx, sy) / one
        w = torch.linalg.solve(gc + ridge * torch.diag(gc.diag()), cc)
        if normed:  # and reduced rank regression
            v = torch.linalg.eigh(w.T @ gc @ w)[1].flip(1)
            ranks = zip(PREDICTORS[2:5], (64, 16, 1))
            found = {"full, normed x": w, **{name: w @ v[:, :r] @ v[:, :r].T for name, r in ranks}}
        else:
            found = {"full": w, "diagonal": cc.diag() / gc.diag(), "mean": torch.zeros(d).double()}
            out["scalar"][k] = False, (cross[:d].trace() / gram[:d, :d].trace()).float().expand(d), torch.zeros(d)
        for name, w in found.items():
            b = (sy - (w.T @ sx if w.dim() == 2 else w * sx)) / one
            out[name][k] = normed, w.float(), b.float()
    return out


def greedy_bits(cost, average):
    """Bits of each step, from its penalty alone at m = 2, taken to fall by 4 for each bit."""
    bits = [1] * len(cost)
    for _ in range(round((average - 1) * len(cost))):
        gain = [c * 4.0 ** (2 - b) if b < 8 else -1 for c, b in zip(cost, bits)]
        bits[gain.index(max(gain))] += 1
    return bits


def telescope(gamma):
    g, c = torch.zeros_like(gamma), torch.zeros_like(gamma[0])
    for k in reversed(range(len(gamma))):
        g[k] = c / (1 - c)
        c = gamma[k] * (1 - c)
    return g


class Experiment:
    def __init__(self, net, ids, targets):
        self.net, self.targets, self.reference, self.x0 = net, targets, {}, net.embed(ids)
        self.base = net.loss(net.run(self.x0), targets)

    def growth(self, x):
        return self.net.loss(x, self.targets) - self.base

    def penalty(self, m, signs="shared", a=1.0, p=None, tele=False, plain_last=False, y=False, exempt=False, pairs=1):
        """Of each sequence. m: bits of each step, a number or one for each k = 1 .. depth - 1."""
        gen, depth, (n, length, _) = torch.Generator().manual_seed(1), self.net.depth, self.x0.shape
        size = torch.tensor([0.0] + [2.0 ** -b for b in (m if isinstance(m, list) else [m] * (depth - 1))])
        size = size[:, None, None, None].expand(depth, n, length if exempt else 1, 1).clone()
        if exempt:
            size[:, :, 0] = 0
        if plain_last:
            size[-1] = 0
        if signs == "alternating":
            size[1::2] *= -1
        total = 0
        for _ in range(pairs):
            draw = torch.randint(0, 2, (depth, n, 1, 1), generator=gen) * 2.0 - 1 if signs == "block" else 1.0
            for gamma in (size * draw, -size * draw):
                g = telescope(gamma) if tele else gamma * (0.0 if p else a)
                if y:
                    g[0] = gamma[1]
                total = total + self.growth(self.net.run(self.x0, gamma, g, p, y=y)) / (2 * pairs)
        return total

    def alone(self, tele, p=None):
        """Penalty of gamma = 1/4 in each step alone; telescoped: what step k - 1 adds and step k removes."""
        states, out = [self.x0], []
        self.net.run(self.x0, visit=lambda k, h, x: states.append(x))
        for k in range(1, self.net.depth):
            out.append(0)
            for s in (0.25, -0.25):
                gamma = torch.zeros(self.net.depth, 1, 1, 1)
                gamma[k] = s
                before, x = states[k - 1:k + 1]
                if tele:
                    x = x + s / (1 - s) * (x - before - predict(p, k, x))
                x = self.net.run(x, gamma, None if tele else gamma, p, first=k, before=before)
                out[-1] += self.growth(x).mean().item() / 2
        return out

    def cell(self, m, penalty):
        n, mean, ref = len(penalty), penalty.mean().item(), self.reference.get(m)
        text = f"{mean:.5f} ± {penalty.std().item() / n ** 0.5:.5f}"
        if ref is None or mean <= 0:
            return text
        left = ((ref.sum() - ref) / (penalty.sum() - penalty)).clamp(1e-9, 1e9).log() / math.log(4)
        error = ((n - 1) * left.var(correction=0).item()) ** 0.5
        return text + f" ({math.log(ref.mean().item() / mean, 4):+.2f} ± {error:.2f})"

    def row(self, name, ms, columns=(), group=1, **how):
        line(name, [self.cell(m, self.penalty(group * m, **how)) if m in ms else "" for m in columns or ms])

    def baseline(self, ms):
        found = {m: self.penalty(m, plain_last=True) for m in ms}
        line("shared signs, last step plain", [self.cell(*pair) for pair in found.items()])
        self.reference |= found


def line(name, cells):
    print("|", " | ".join([str(name), *cells]), "|", flush=True)


def table(title, *columns):
    print(f"\n### {title}\n\n| " + " | ".join(map(str, columns)) + " |\n|" + " --- |" * len(columns))


def held_out(exp, p):
    table("Share of the energy of h[k-1] that p_k explains on held-out text (each token by 1 / mean(x[k]^2)), and the "
          "first position's share of that energy", "k", *PREDICTORS, "full, normed x, without first position",
          "first position, weighted", "first position, unweighted")

    def visit(k, h, x):
        if k + 1 < exp.net.depth:
            w, energy = unit(x)[1].pow(2), h.pow(2)
            left = {name: (h - predict(p[name], k + 1, x)).pow(2) * w for name in PREDICTORS}
            cells = [1 - e.sum() / (energy * w).sum() for e in left.values()]
            cells += [1 - left["full, normed x"][:, 1:].sum() / (energy * w)[:, 1:].sum()]
            line(k + 1, [f"{c:.3f}" for c in cells + [e[:, 0].sum() / e.sum() for e in (energy * w, energy)]])

    exp.net.run(exp.x0, visit=visit)


def allocations(exp, other, p):
    means = (1.5, 2, 2.5, 3)
    for name, tele, q in (("telescoped", True, None), ("telescoped, diagonal", True, p), ("r = h", False, None)):
        cost = other.alone(tele, q)
        bits = {a: greedy_bits(cost, a) for a in means}
        table(f"Penalty of gamma = 1/4 in step k alone, {name}, on other text; greedy bits", "k", *range(1, len(cost) + 1))
        line("penalty", [f"{c:.4f}" for c in cost])
        for a in means:
            line(f"mean {a}", map(str, bits[a]))
        table("Greedy bits, shared signs", "scheme", *(f"mean {a}" for a in means))
        line(name, [exp.cell(a, exp.penalty(bits[a], tele=tele, p=q, plain_last=not tele)) for a in means])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("gguf", "text"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("sequences", 16), ("length", 256), ("fit-sequences", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    net = Net(args.gguf)
    ids = net.tokenizer.encode("The capital of France is").ids
    for _ in range(8):
        ids.append(net.logits(net.run(net.embed(torch.tensor([ids])))[:, -1])[0].argmax().item())
    print(f"Greedy: {net.tokenizer.decode(ids)!r}")

    # Token 0, <|endoftext|>, stands before each sequence. Evaluation and fit share no document.
    with open(args.text, encoding="utf-8") as text:
        docs = [net.tokenizer.encode(doc.strip()).ids for doc in text.read().split("<|endoftext|>\n")]
    docs = [doc for doc in docs if len(doc) >= args.length]
    chosen = range(len(docs))[::len(docs) // args.sequences][:args.sequences]
    own = torch.tensor([[0] + docs[i][:args.length] for i in chosen])
    rest = [[0] + doc[a:a + args.length] for i, doc in enumerate(docs) if i not in chosen
            for a in range(0, len(doc) - args.length + 1, args.length)]
    other = torch.tensor(rest[::max(1, len(rest) // args.fit_sequences)][:args.fit_sequences])
    exp = Experiment(net, own[:, :-1], own[:, 1:])
    print(f"Unperturbed: {exp.base.mean():.4f} over {own[:, 1:].numel()} targets; fit on {other[:, 1:].numel()} tokens")

    ms = [1, 2, 3, 4, 5, 6]
    table("r = h", "scheme", *(f"m = {m}" for m in ms))
    exp.baseline(ms)
    exp.row("paper: a sign per block", ms[:4], ms, signs="block", pairs=2)
    exp.row("shared signs, head reads y", ms[:3], ms, y=True)
    exp.row("alternating signs, last step plain", ms[:3], ms, signs="alternating", plain_last=True)

    p = fit(net, other[:, :-1])
    some = {"no p": None, **{name: p[name] for name in ("full, normed x", "diagonal")}}
    held_out(exp, p)
    table("Telescoped", "scheme", *(f"m = {m}" for m in ms[:3]))
    for name in ("no p", *PREDICTORS):
        exp.row(f"{name}, shared signs", ms[:3] if name in some else [2], ms[:3], tele=True, p=p.get(name))
    for name, q in some.items():
        exp.row(f"{name}, a sign per block", [2], ms[:3], signs="block", tele=True, p=q)

    bits = (0.5, 1, 2)
    table("Telescoped, groups of blocks as one block, shared signs, m = bits per block times group", "group",
          *(f"{a} bits per block" for a in bits))
    for size, which, name in ((2, bits, None), (2, bits, "diagonal"), (3, (1, 2), None), (6, (0.5,), None)):
        exp.net = net.grouped(size)
        q = fit(exp.net, other[:, :-1])[name] if name else None
        exp.row(f"{size}, {name or 'no p'}", which, bits, size, tele=True, p=q)
    exp.net = net

    table("Not telescoped, m = 2", "scheme", "shared signs, last step plain", "a sign per block")
    rows = [(f"r = {a} h", {"a": a}) for a in (0.0, 0.25, 0.5, 0.75, 0.9)]
    for name, how in rows + [(f"r = p: {name}", {"p": p[name]}) for name in PREDICTORS]:
        line(name, [exp.cell(2, exp.penalty(2, plain_last=True, **how)), exp.cell(2, exp.penalty(2, "block", **how))])

    table("First position not perturbed", "scheme", "m = 2")
    exp.row("shared signs, last step plain", [2], plain_last=True, exempt=True)
    exp.row("paper: a sign per block", [2], signs="block", exempt=True)
    for name, q in some.items():
        exp.row(f"telescoped, {name}, shared signs", [2], tele=True, p=q, exempt=True)

    table("Sizes between", "scheme", "m = 1.5", "m = 2.5")
    exp.baseline([1.5, 2.5])
    allocations(exp, Experiment(net, other[:8, :-1], other[:8, 1:]), p["diagonal"])


if __name__ == "__main__":
    main()
