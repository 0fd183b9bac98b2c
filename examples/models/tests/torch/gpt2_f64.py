"""Reference states of one small GPT-2 in float64: standard and BDIA, forward, backward and ten training steps.

Written from the formulas, in plain torch, so that it shares nothing with the program under test.
B samples, T tokens, width d, H heads, V words, K blocks; state X_k is an integer tensor with x_k = 2^-l * X_k.
"""

import argparse
import json
import math
import struct
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save

V, POSITIONS, T, D, K, H, B = 61, 16, 12, 24, 4, 3, 3
EPS = 1e-5        # LayerNorm
IGNORE = -1       # a target that does not count
FRAC_BITS = 14    # l
STEPS = 10
LIMIT = 2 ** 30   # |X| and |Q| stay within it
# Row k: the sign of each sample in the update of block k. Row 0 is unused: block 0 has no gamma.
MIXED_SIGNS = [[1, 1, 1], [1, -1, -1], [-1, -1, 1], [1, 1, -1]]


# ---------------------------------------------------------------- model

def start_parameters(seed=1):
    """All parameters away from the usual initialisation, so that every gradient is non-trivial."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape, std, mean=0.0):
        x = mean + std * torch.randn(*shape, generator=gen, dtype=torch.float64)
        return x.float().double()  # every value is an f32 too: both precisions start from the same point

    def norm(name):
        return {f"{name}.weight": normal(D, std=0.1, mean=1.0), f"{name}.bias": normal(D, std=0.1)}

    def conv1d(name, n_in, n_out):
        return {f"{name}.weight": normal(n_in, n_out, std=0.2), f"{name}.bias": normal(n_out, std=0.1)}

    p = {"wte.weight": normal(V, D, std=0.2), "wpe.weight": normal(POSITIONS, D, std=0.2)}
    for k in range(K):
        p |= norm(f"h.{k}.ln_1") | conv1d(f"h.{k}.attn.c_attn", D, 3 * D) | conv1d(f"h.{k}.attn.c_proj", D, D)
        p |= norm(f"h.{k}.ln_2") | conv1d(f"h.{k}.mlp.c_fc", D, 4 * D) | conv1d(f"h.{k}.mlp.c_proj", 4 * D, D)
    return p | norm("ln_f")


def batch(seed=2, masked=0.25):
    """tokens, targets: [B, T]; about a quarter of the targets is masked."""
    gen = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (B, T), generator=gen)
    targets = torch.randint(V, (B, T), generator=gen)
    targets[torch.rand(B, T, generator=gen) < masked] = IGNORE
    return tokens, targets


def layer_norm(p, name, x):
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred ** 2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + EPS) * p[f"{name}.weight"] + p[f"{name}.bias"]


def conv1d(p, name, x):
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def attention(p, k, x):
    """f, [B, T, d] -> [B, T, d]: causal self-attention behind ln_1."""
    b, t, _ = x.shape
    qkv = conv1d(p, f"h.{k}.attn.c_attn", layer_norm(p, f"h.{k}.ln_1", x))            # [B, T, 3d]
    q, key, v = (u.view(b, t, H, D // H).transpose(1, 2) for u in qkv.split(D, -1))   # [B, H, T, d/H] each
    scores = q @ key.transpose(-1, -2) / math.sqrt(D // H)                            # [B, H, T, T]
    future = torch.ones(t, t, dtype=torch.bool).triu(1)
    weights = torch.softmax(scores.masked_fill(future, -math.inf), -1)
    return conv1d(p, f"h.{k}.attn.c_proj", (weights @ v).transpose(1, 2).reshape(b, t, D))


def mlp(p, k, x):
    """g, [B, T, d] -> [B, T, d]: two layers behind ln_2."""
    hidden = gelu(conv1d(p, f"h.{k}.mlp.c_fc", layer_norm(p, f"h.{k}.ln_2", x)))      # [B, T, 4d]
    return conv1d(p, f"h.{k}.mlp.c_proj", hidden)


def residual(p, k, x):
    """h(x) = f(x) + g(x + f(x))."""
    f = attention(p, k, x)
    return f + mlp(p, k, x + f)


def embed(p, tokens):
    return p["wte.weight"][tokens] + p["wpe.weight"][: tokens.shape[1]]               # [B, T, d]


def head(p, x):
    return layer_norm(p, "ln_f", x) @ p["wte.weight"].T                               # [B, T, V]


def mean_loss(logits, targets):
    """Cross entropy, the mean over the unmasked targets of the whole batch."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


# ---------------------------------------------------------------- standard and BDIA

class Standard:
    """x_{k+1} = x_k + h_k(x_k), no grid."""

    def logits(self, p, tokens):
        x = embed(p, tokens)
        for k in range(K):
            x = x + residual(p, k, x)
        return head(p, x)


class Bdia:
    """signs: [K, B] of +1 and -1; gamma = sign * 2^-m."""

    def __init__(self, signs, m):
        self.signs, self.m = torch.tensor(signs), m
        self.tie_distance = math.inf  # the smallest distance of any y * 2^l from a rounding tie

    def sigma(self, k):
        return self.signs[k].view(B, 1, 1)

    def gamma(self, k):
        return self.sigma(k).double() / 2 ** self.m

    def quantize(self, y):
        """Q(y) = round_ties_even(y * 2^l), as an integer."""
        scaled = y.detach() * 2 ** FRAC_BITS
        assert bool((scaled.abs() <= LIMIT).all()), "out of range"
        self.tie_distance = min(self.tie_distance, float(((scaled - scaled.floor()) - 0.5).abs().min()))
        return torch.round(scaled).long()

    def bits(self, X):
        """What is stored of X: r = X mod 2^m, 0 <= r < 2^m, also for negative X."""
        return X & (2 ** self.m - 1)

    def side(self, r):
        """s, from the stored r alone: X + s is divisible by 2^m."""
        if self.m == 1:
            return r  # 1 where X is odd
        size, half = 2 ** self.m, 2 ** (self.m - 1)
        index = torch.arange(T * D).view(T, D)          # t * d + c, the element's index within its sample
        tie = torch.where(index % 2 == 0, -half, half)  # even index: down, odd index: up
        return torch.where(r < half, -r, torch.where(r > half, size - r, tie))

    def combination(self, k, x, h):
        """The part of update k that goes through Q."""
        return (1 - self.gamma(k)) * x + (1 + self.gamma(k)) * h

    def states(self, p, tokens):
        """X_0 .. X_K as integers, and x_0 .. x_K with straight-through gradients; each [B, T, d]."""
        def straight_through(X, value):
            # Exactly 2^-l * X (the difference is 0), with the gradient of `value`.
            return X.double() / 2 ** FRAC_BITS + (value - value.detach())

        value = embed(p, tokens)
        X = [self.quantize(value)]
        x = [straight_through(X[0], value)]
        h = residual(p, 0, x[0])
        X.append(X[0] + self.quantize(h))
        x.append(straight_through(X[1], x[0] + h))
        for k in range(1, K):
            y = self.combination(k, x[k], residual(p, k, x[k]))
            even = X[k - 1] + self.side(self.bits(X[k - 1]))
            assert bool((even % 2 ** self.m == 0).all())
            X.append(self.sigma(k) * (even // 2 ** self.m) + self.quantize(y))
            x.append(straight_through(X[k + 1], self.gamma(k) * x[k - 1] + y))
        assert all(bool((u.abs() <= LIMIT).all()) for u in X), "out of range"
        return X, x

    def logits(self, p, tokens):
        return head(p, self.states(p, tokens)[1][K])

    @torch.no_grad()
    def rebuild(self, p, X_last, X_before, bits):
        """X_0 .. X_K from the last two states and the side bits r_0 .. r_{K-2}."""
        X = {K: X_last, K - 1: X_before}
        for k in reversed(range(1, K)):
            x = X[k].double() / 2 ** FRAC_BITS
            y = self.combination(k, x, residual(p, k, x))
            X[k - 1] = self.sigma(k) * 2 ** self.m * (X[k + 1] - self.quantize(y)) - self.side(bits[k - 1])
        return [X[k] for k in range(K + 1)]

    def gradients_by_hand(self, p, tokens, targets):
        """The recurrence of the gradients G_k written out, one vector-Jacobian product a block."""
        with torch.no_grad():
            X, _ = self.states(p, tokens)
        x = [(u.double() / 2 ** FRAC_BITS).requires_grad_() for u in X]
        total = {name: torch.zeros_like(t) for name, t in p.items()}

        def vjp(output, cotangent, wrt):
            names = list(p)
            grads = torch.autograd.grad(output, wrt + [p[n] for n in names], cotangent, allow_unused=True)
            for name, g in zip(names, grads[len(wrt):]):
                if g is not None:
                    total[name] += g
            return grads[: len(wrt)]

        G = [torch.zeros(B, T, D, dtype=torch.float64) for _ in range(K + 1)]
        G[K] += vjp(mean_loss(head(p, x[K]), targets), None, [x[K]])[0]
        for k in reversed(range(1, K)):
            gamma = self.gamma(k)
            G[k] += (1 - gamma) * G[k + 1] + vjp(residual(p, k, x[k]), (1 + gamma) * G[k + 1], [x[k]])[0]
            G[k - 1] += gamma * G[k + 1]
        G[0] += G[1] + vjp(residual(p, 0, x[0]), G[1], [x[0]])[0]
        vjp(embed(p, tokens), G[0], [])
        return total


# ---------------------------------------------------------------- optimizers

class AdamW:
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}

    def __init__(self, p):
        self.t = 0
        self.m = {n: torch.zeros_like(x) for n, x in p.items()}
        self.v = {n: torch.zeros_like(x) for n, x in p.items()}

    def step(self, p, grads):
        lr, b1, b2, eps, wd = self.settings.values()
        self.t += 1
        for n, g in grads.items():
            if p[n].dim() >= 2:
                p[n] -= lr * wd * p[n]
            self.m[n] = b1 * self.m[n] + (1 - b1) * g
            self.v[n] = b2 * self.v[n] + (1 - b2) * g ** 2
            m_hat = self.m[n] / (1 - b1 ** self.t)
            v_hat = self.v[n] / (1 - b2 ** self.t)
            p[n] -= lr * m_hat / (v_hat.sqrt() + eps)


class Sgd:
    settings = {"lr": 0.05, "momentum": 0.9}

    def __init__(self, p):
        self.buf = {n: torch.zeros_like(x) for n, x in p.items()}

    def step(self, p, grads):
        lr, mu = self.settings.values()
        for n, g in grads.items():
            self.buf[n] = mu * self.buf[n] + g
            p[n] -= lr * self.buf[n]


class SetAdam:
    """SET-Adam, arXiv 2302.01029. All sums and the minimum are over one parameter tensor."""
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-18}

    def __init__(self, p):
        self.t = 0
        self.m = {n: torch.zeros_like(x) for n, x in p.items()}
        self.v = {n: torch.zeros_like(x) for n, x in p.items()}

    def step(self, p, grads):
        lr, b1, b2, eps = self.settings.values()
        self.t += 1
        for n, g in grads.items():
            self.m[n] = b1 * self.m[n] + (1 - b1) * g
            self.v[n] = b2 * self.v[n] + (1 - b2) * g ** 2
            v = self.v[n]
            scaled = v * v.sum() ** 2 / (v.numel() * (v ** 2).sum())
            w = torch.sqrt(scaled / (1 - b2 ** self.t) + eps)
            w = w - 0.5 * w.min()
            p[n] -= lr / (1 - b1 ** self.t) * self.m[n] / w


OPTIMIZERS = {"adamw": AdamW, "sgd": Sgd, "set_adam": SetAdam}


# ---------------------------------------------------------------- runs

def leaves(p):
    return {n: x.clone().requires_grad_() for n, x in p.items()}


def evaluate(model, p, tokens, targets):
    """logits, loss, gradients by name."""
    q = leaves(p)
    logits = model.logits(q, tokens)
    loss = mean_loss(logits, targets)
    grads = torch.autograd.grad(loss, list(q.values()))
    return logits.detach(), loss.detach(), dict(zip(q, grads))


def train(model, p, tokens, targets, optimizer):
    """Ten steps on the same batch (and, for BDIA, the same signs); each loss is taken before its update."""
    p = {n: x.clone() for n, x in p.items()}
    opt = optimizer(p)
    losses = []
    for _ in range(STEPS):
        _, loss, grads = evaluate(model, p, tokens, targets)
        losses.append(loss)
        opt.step(p, grads)
    return torch.stack(losses)


def train_torch_optim(model, p, tokens, targets, name):
    q = leaves(p)
    if name == "adamw":
        s = AdamW.settings
        groups = [{"params": [x for x in q.values() if x.dim() >= 2], "weight_decay": s["weight_decay"]},
                  {"params": [x for x in q.values() if x.dim() < 2], "weight_decay": 0.0}]
        opt = torch.optim.AdamW(groups, lr=s["lr"], betas=(s["beta1"], s["beta2"]), eps=s["eps"])
    else:
        opt = torch.optim.SGD(q.values(), **Sgd.settings)
    losses = []
    for _ in range(STEPS):
        opt.zero_grad()
        loss = mean_loss(model.logits(q, tokens), targets)
        losses.append(loss.detach())
        loss.backward()
        opt.step()
    return torch.stack(losses)


def save_state(path, tensors, metadata):
    """A safetensors file with a sorted header: the same numbers give the same bytes."""
    raw = save({n: t.contiguous() for n, t in tensors.items()}, {n: str(v) for n, v in metadata.items()})
    size, = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size:])
    assert all(torch.equal(t, tensors[n]) for n, t in load_file(path).items())


def config_metadata(mode):
    meta = {"mode": mode, "vocab_size": V, "n_positions": POSITIONS, "n_embd": D, "n_layer": K, "n_head": H,
            "layer_norm_epsilon": EPS, "activation_function": "gelu_new", "tie_word_embeddings": "true",
            "batch": B, "seq_len": T, "ignore_index": IGNORE, "dropout": 0.0, "steps": STEPS, "torch": torch.__version__}
    for name, optimizer in OPTIMIZERS.items():
        meta |= {f"{name}.{key}": value for key, value in optimizer.settings.items()}
    return meta


def state(model, p, tokens, targets):
    """The tensors that every file has."""
    logits, loss, grads = evaluate(model, p, tokens, targets)
    tensors = {"tokens": tokens.int(), "targets": targets.int(), "logits": logits, "loss": loss.view(1)}
    tensors |= {f"param.{n}": x for n, x in p.items()} | {f"grad.{n}": g for n, g in grads.items()}
    for name, optimizer in OPTIMIZERS.items():
        tensors[f"losses.{name}"] = train(model, p, tokens, targets, optimizer)
        assert tensors[f"losses.{name}"][-1] < loss, "the loss does not fall"
    return tensors


def report(path, tensors, extra=""):
    losses = " ".join(f"{name} {float(tensors['losses.' + name][-1]):.4f}" for name in OPTIMIZERS)
    print(f"{path.name:27} {path.stat().st_size:7} bytes  loss {float(tensors['loss']):.6f}"
          f"  after {STEPS - 1} steps: {losses}  {extra}")


def largest_difference(a, b):
    return max(float((a[n] - b[n]).abs().max()) for n in b)


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "../data/gpt2")
    out = args.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    p = start_parameters()
    tokens, targets = batch()

    standard = state(Standard(), p, tokens, targets)
    for name in ("adamw", "sgd"):
        theirs = train_torch_optim(Standard(), p, tokens, targets, name)
        assert torch.allclose(standard[f"losses.{name}"], theirs, rtol=1e-12, atol=0), name
    path = out / "standard_f64.safetensors"
    save_state(path, standard, config_metadata("standard"))
    report(path, standard)

    plus, minus = [[1] * B] * K, [[-1] * B] * K
    for name, signs, m in (("bdia", MIXED_SIGNS, 1), ("bdia_plus", plus, 1), ("bdia_minus", minus, 1),
                           ("bdia_m2", plus, 2)):
        tensors = state(Bdia(signs, m), p, tokens, targets)

        model = Bdia(signs, m)  # a fresh one: its tie distance is that of the start parameters
        with torch.no_grad():
            X, _ = model.states(p, tokens)
        tie_distance = model.tie_distance
        bits = [model.bits(X[k]) for k in range(K - 1)]
        rebuilt = model.rebuild(p, X[K], X[K - 1], bits)
        assert all(torch.equal(a, b) for a, b in zip(X, rebuilt)), "the inverse is not exact"

        by_hand = model.gradients_by_hand(leaves(p), tokens, targets)
        difference = largest_difference({n: tensors[f"grad.{n}"] for n in by_hand}, by_hand)
        assert difference < 1e-14, difference
        assert 1e-4 < abs(float(tensors["loss"] - standard["loss"])) < 0.5

        tensors["signs"] = model.signs.int()
        tensors |= {f"X.{k}": u.int() for k, u in enumerate(X)}
        side_info = "s = 1 where X is odd, else 0" if m == 1 else \
            "r = X mod 4; s = -r if r < 2; 4 - r if r > 2; at r = 2: -2 if (t*d + c) is even, else +2"
        meta = config_metadata("bdia") | {
            "frac_bits": FRAC_BITS, "m": m, "gamma_abs": 2.0 ** -m, "side_information": side_info,
            "signs": "row k is the update of block k, column b is sample b; row 0 is unused; "
                     "the same signs in all steps",
            "tie_distance": f"{tie_distance:.3e}"}
        path = out / f"{name}_f64.safetensors"
        save_state(path, tensors, meta)
        ties = sum(int((r == 2 ** (m - 1)).sum()) for r in bits)
        report(path, tensors, f"max |X| {max(int(u.abs().max()) for u in X)}, tie distance {tie_distance:.1e}, "
                              f"r = {2 ** (m - 1)}: {ties} of {sum(r.numel() for r in bits)}, gradients {difference:.0e}")


if __name__ == "__main__":
    main()
