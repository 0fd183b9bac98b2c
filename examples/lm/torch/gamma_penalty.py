"""How much do the perturbed updates of BDIA training cost a pretrained language model?

Instead of x[k+1] = x[k] + h_k(x[k]) it computes, for k >= 1, with r = h,

    x[k+1] = x[k] + h_k(x[k]) + gamma_k (x[k-1] - x[k] + r_k(x[k])),    gamma_k = +-2^-m.

Any r that can be computed again from x[k] can be inverted as exactly. Every scheme here is

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

The text is plain, with lines <|endoftext|> between documents. Wants: pip install torch numpy gguf tokenizers
"""
import argparse

import gguf
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PREDICTORS = "full", "full, normed", "rank 64, normed", "rank 16, normed", "diagonal", "scalar", "rank 1 + mean", "mean"


class Net:
    """A Llama whose blocks can be called one by one. With a smaller depth, neighbours count as one block."""

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

    def norm(self, x, w):
        return F.rms_norm(x, x.shape[-1:], w, self.eps)

    def rotate(self, z):  # GGUF keeps the two of a pair side by side
        angle = torch.arange(z.shape[-2])[:, None] * self.rates
        one, two, cos, sin = z[..., 0::2], z[..., 1::2], angle.cos(), angle.sin()
        return torch.cat((one * cos - two * sin, one * sin + two * cos), -1)

    def block(self, k, x):
        """x + h_k(x)."""
        for i in range(k * self.blocks // self.depth, (k + 1) * self.blocks // self.depth):
            w = {name.split(".")[2]: w for name, w in self.w.items() if name.startswith(f"blk.{i}.")}
            a = self.norm(x, w["attn_norm"])
            q, key, v = (F.linear(a, w["attn_" + c]).unflatten(-1, (-1, self.head)).transpose(1, 2) for c in "qkv")
            key, v = (z.repeat_interleave(self.repeat, 1) for z in (self.rotate(key), v))
            a = F.scaled_dot_product_attention(self.rotate(q), key, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + F.linear(a, w["attn_output"])
            a = self.norm(x, w["ffn_norm"])
            x = x + F.linear(F.silu(F.linear(a, w["ffn_gate"])) * F.linear(a, w["ffn_up"]), w["ffn_down"])
        return x

    def embed(self, ids):
        return self.w["token_embd.weight"][ids]

    def logits(self, x):
        return F.linear(self.norm(x, self.w["output_norm.weight"]), self.w["token_embd.weight"])

    def loss(self, x, targets):
        """Mean loss of each sequence."""
        return torch.stack([F.cross_entropy(self.logits(a), t).double() for a, t in zip(x, targets)])

    def run(self, x, gamma=None, g=None, p=None, first=0, before=None, y=False, visit=lambda k, h, after: None):
        """The last state, from x = x[first] and before = x[first - 1]."""
        for k in range(first, self.depth):
            after = plain = self.block(k, x)
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
            found = {PREDICTORS[i]: w @ v[:, :r] @ v[:, :r].T for i, r in ((1, d), (2, 64), (3, 16), (6, 1))}
        else:
            found = {"full": w, "diagonal": cc.diag() / gc.diag(), "mean": torch.zeros(d).double()}
            out["scalar"][k] = False, (cross[:d].trace() / gram[:d, :d].trace()).float().expand(d), torch.zeros(d)
        for name, w in found.items():
            b = (sy - (w.T @ sx if w.dim() == 2 else w * sx)) / one
            out[name][k] = normed, w.float(), b.float()
    return out


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

    def penalty(self, m, signs="shared", a=1.0, p=None, tele=False, plain_last=False, y=False, exempt=False, pairs=1):
        """Of each sequence. m: bits of each step, a number or one for each k = 1 .. depth - 1."""
        gen, depth, (n, length, _) = torch.Generator().manual_seed(1), self.net.depth, self.x0.shape
        size = torch.tensor([0.0] + [2.0 ** -b for b in (m if isinstance(m, list) else [m] * (depth - 1))])
        size = size.view(-1, 1, 1, 1).repeat(1, 1, length, 1)
        size[-1] *= not plain_last
        size[:, :, 0] *= not exempt
        size[1::2] *= -1 if signs == "alternating" else 1
        total = 0
        for _ in range(pairs):
            draw = torch.randint(0, 2, (depth, n, 1, 1), generator=gen) * 2.0 - 1 if signs == "block" else 1.0
            for gamma in (size * draw, -size * draw):
                g = telescope(gamma) if tele else gamma * (0.0 if p else a)
                g[0] += gamma[1] * y
                total = total + self.net.loss(self.net.run(self.x0, gamma, g, p, y=y), self.targets)
        return total / (2 * pairs) - self.base

    def alone(self, p):
        """Penalty of m = 2 in each step alone: r = h, or telescoped what step k - 1 adds and step k removes."""
        states, out = [self.x0], []
        self.net.run(self.x0, visit=lambda k, h, x: states.append(x))
        for k in range(1, self.net.depth):
            out.append(-self.base.mean().item())
            for s in (0.25, -0.25):
                gamma = torch.zeros(self.net.depth, 1, 1, 1)
                gamma[k] = s
                before, x = states[k - 1:k + 1]
                x = x + s / (1 - s) * (x - before - predict(p, k, x)) if p else x
                x = self.net.run(x, gamma, None if p else gamma, p, first=k, before=before)
                out[-1] += self.net.loss(x, self.targets).mean().item() / 2
        return out

    def cell(self, m, penalty):
        n, mean, ref = len(penalty), penalty.mean(), self.reference.get(m)
        text = f"{mean:.5f} ± {penalty.std() / n ** 0.5:.5f}"
        if ref is None or mean <= 0:
            return text
        left = ((ref.sum() - ref) / (penalty.sum() - penalty)).clamp(1e-9, 1e9).log2() / 2
        return text + f" ({(ref.mean() / mean).log2() / 2:+.2f} ± {((n - 1) * left.var(correction=0)).sqrt():.2f})"

    def row(self, name, ms, columns=(), group=1, reference=False, **how):
        found = {m: self.penalty(group * m, **how) for m in ms}
        line(name, *(self.cell(m, found[m]) if m in ms else "" for m in columns or ms))
        self.reference |= found if reference else {}


def line(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def table(title, *columns):
    print(f"\n### {title}\n")
    line(*columns)
    line(*["---"] * len(columns))


def held_out(exp, p):
    table("Share of the energy of h[k-1] that p_k explains on held-out text (each token by 1 / mean(x[k]^2)), and the "
          "first position's share of that energy", "k", *PREDICTORS, "full, normed, without first position",
          "first position, weighted", "first position, unweighted")

    def visit(k, h, x):
        if k + 1 < exp.net.depth:
            w, energy = unit(x)[1].pow(2), h.pow(2)
            left = {name: (h - predict(p[name], k + 1, x)).pow(2) * w for name in PREDICTORS}
            cells = [1 - e.sum() / (energy * w).sum() for e in left.values()]
            cells += [1 - left["full, normed"][:, 1:].sum() / (energy * w)[:, 1:].sum()]
            line(k + 1, *(f"{c:.3f}" for c in cells), *(f"{e[:, 0].sum() / e.sum():.3f}" for e in (energy * w, energy)))

    exp.net.run(exp.x0, visit=visit)


def allocations(exp, other, p):
    for name, q in (("r = h", None), ("telescoped, full", p)):
        cost = other.alone(q)
        bits = {m: [1] * len(cost) for m in (2, 3)}
        for m, b in bits.items():
            while sum(b) < m * len(cost):  # a bit more where it gains most, if each takes off three quarters
                b[max(range(len(cost)), key=lambda i: cost[i] / 4 ** b[i])] += 1
        table(f"Penalty of m = 2 in step k alone, {name}, on other text; greedy bits", "k", *range(1, len(cost) + 1))
        line("penalty", *(f"{c:.4f}" for c in cost))
        for m in bits:
            line(f"mean {m}", *bits[m])
        table("Greedy bits, shared signs", "scheme", *(f"mean {m}" for m in bits))
        line(name, *(exp.cell(m, exp.penalty(b, tele=bool(q), p=q, plain_last=not q)) for m, b in bits.items()))


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
    exp.row("shared signs, last step plain", ms, reference=True, plain_last=True)
    exp.row("paper: a sign per block", ms[:4], ms, signs="block", pairs=2)
    exp.row("shared signs, head reads y", ms[:3], ms, y=True)
    exp.row("alternating signs, last step plain", ms[:3], ms, signs="alternating", plain_last=True)
    p = fit(net, other[:, :-1])
    held_out(exp, p)
    table("Telescoped", "scheme", *(f"m = {m}" for m in ms[:3]))
    for name in ("no p", *PREDICTORS):
        some = ms[:3] if name in ("no p", "full", "full, normed", "diagonal") else [2]
        exp.row(f"{name}, shared signs", some, ms[:3], tele=True, p=p.get(name))
    for name in ("no p", "full, normed", "diagonal"):
        exp.row(f"{name}, a sign per block", [2], ms[:3], signs="block", tele=True, p=p.get(name))
    bits = (0.5, 1, 2)
    table("Telescoped, groups of blocks as one block, shared signs, m = bits per block times group", "group",
          *(f"{b} bits per block" for b in bits))
    for size, some, name in ((2, bits, ""), (2, bits, "diagonal"), (2, (2,), "full"), (3, (1, 2), ""), (6, (0.5,), "")):
        net.depth = net.blocks // size
        q = fit(net, other[:, :-1])[name] if name else None
        exp.row(f"{size}, {name or 'no p'}", some, bits, size, tele=True, p=q)
    net.depth = net.blocks
    table("Not telescoped, m = 2", "scheme", "shared signs, last step plain", "a sign per block")
    rows = [(f"r = {a} h", {"a": a}) for a in (0.0, 0.5, 0.9)]
    for name, how in rows + [(f"r = p: {name}", {"p": p[name]}) for name in ("full", "rank 64, normed", "diagonal")]:
        line(name, exp.cell(2, exp.penalty(2, plain_last=True, **how)), exp.cell(2, exp.penalty(2, "block", **how)))
    table("First position not perturbed", "scheme", "m = 2")
    exp.row("shared signs, last step plain", [2], plain_last=True, exempt=True)
    exp.row("telescoped, full, shared signs", [2], tele=True, p=p["full"], exempt=True)
    allocations(exp, Experiment(net, other[:4, :-1], other[:4, 1:]), p["full"])


if __name__ == "__main__":
    main()
