"""Steps of 8-bit AdamW and of Adafactor in float64, for tests/models/optimizers.rs.

8-bit AdamW is bitsandbytes' kOptimizerStatic8bit2StateBlockwise with the tables of create_dynamic_map,
but for one line below; Adafactor is transformers' with scale_parameter=False, relative_step=False, beta1=None. Written from what
these do, with numpy alone. Usage: optimizers.py [--out FOLDER]
"""

import argparse
import pathlib

import numpy as np
from safetensors.numpy import save_file

BLOCK = 256


def dynamic_map(signed, max_exponent_bits=7, total_bits=8):
    """create_dynamic_map: means of neighbouring boundaries, in float32 as there."""
    data = []
    non_sign_bits = total_bits - 1
    for i in range(max_exponent_bits):
        extra = 0 if signed else 1
        items = 2 ** (i + non_sign_bits - max_exponent_bits + extra) + 1
        boundaries = np.linspace(0.1, 1, items, dtype=np.float32)
        means = (boundaries[:-1] + boundaries[1:]) / np.float32(2.0)
        scaled = np.float32(10 ** (-(max_exponent_bits - 1) + i)) * means
        data += scaled.tolist()
        if signed:
            data += (-scaled).tolist()
    data += [0.0, 1.0]
    assert len(data) == 2**total_bits
    return np.array(sorted(data), dtype=np.float32)


class Margin:
    """How near a value that becomes a code comes to the middle between two, relative to it."""

    least = 1.0


def quantize(table, x):
    """The nearest code of every x."""
    table = table.astype(np.float64)
    distance = np.abs(x[:, None] - table[None, :])
    order = np.sort(distance, axis=1)
    gap = (order[:, 1] - order[:, 0]) / np.where(x == 0, 1.0, np.abs(x))
    Margin.least = min(Margin.least, gap[x != 0].min())
    return np.argmin(distance, axis=1)


class AdamW8bit:
    def __init__(self, n, lr, beta1, beta2, eps):
        self.lr, self.beta1, self.beta2, self.eps = lr, beta1, beta2, eps
        self.map1, self.map2 = dynamic_map(True), dynamic_map(False)
        self.c1, self.c2 = np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.int32)
        blocks = -(-n // BLOCK)
        self.absmax1, self.absmax2 = np.zeros(blocks), np.zeros(blocks)
        self.t = 0

    def step(self, p, g):
        self.t += 1
        correction1 = 1 - self.beta1**self.t
        correction2 = np.sqrt(1 - self.beta2**self.t)
        step_size = -self.lr * correction2 / correction1
        for b in range(len(self.absmax1)):
            at = slice(b * BLOCK, (b + 1) * BLOCK)
            grad = g[at]
            s1 = self.map1[self.c1[at]].astype(np.float64) * self.absmax1[b]
            s2 = self.map2[self.c2[at]].astype(np.float64) * self.absmax2[b]
            s2 = s2 * self.beta2 + (1 - self.beta2) * grad * grad
            s1 = s1 * self.beta1 + (1 - self.beta1) * grad
            self.absmax1[b], self.absmax2[b] = np.abs(s1).max(), np.abs(s2).max()
            p[at] = p[at] + step_size * (s1 / (np.sqrt(s2) + correction2 * self.eps))
            c1 = quantize(self.map1, s1 / self.absmax1[b])
            # The state keeps its sign.
            other = np.signbit(self.map1[c1]) != np.signbit(s1)
            c1 = np.where(other, np.where(s1 > 0, c1 + 1, c1 - 1), c1)
            c2 = quantize(self.map2, s2 / self.absmax2[b])
            # Not bitsandbytes': a second moment stays above 0, or m/(0 + eps) would follow.
            c2 = np.where(s2 > 0, np.maximum(c2, 1), c2)
            self.c1[at], self.c2[at] = c1, c2


def rms(x):
    return np.sqrt((x * x).sum()) / x.size**0.5


class Adafactor:
    def __init__(self, shape, lr, weight_decay, decay_rate=-0.8, eps=1e-30, clip_threshold=1.0):
        self.lr, self.weight_decay = lr, weight_decay
        self.decay_rate, self.eps, self.clip_threshold = decay_rate, eps, clip_threshold
        self.factored = len(shape) >= 2
        if self.factored:
            self.row, self.col = np.zeros(shape[:-1]), np.zeros(shape[:-2] + shape[-1:])
        else:
            self.full = np.zeros(shape)
        self.t = 0

    def step(self, p, g):
        self.t += 1
        beta2t = 1.0 - self.t**self.decay_rate
        update = g**2 + self.eps
        if self.factored:
            self.row = self.row * beta2t + update.mean(axis=-1) * (1.0 - beta2t)
            self.col = self.col * beta2t + update.mean(axis=-2) * (1.0 - beta2t)
            r_factor = 1 / np.sqrt(self.row / self.row.mean(axis=-1, keepdims=True))[..., None]
            c_factor = 1 / np.sqrt(self.col)[..., None, :]
            update = r_factor * c_factor * g
        else:
            self.full = self.full * beta2t + update * (1.0 - beta2t)
            update = 1 / np.sqrt(self.full) * g
        update = update / max(1.0, rms(update) / self.clip_threshold) * self.lr
        p -= self.weight_decay * self.lr * p
        p -= update


def main():
    parser = argparse.ArgumentParser()
    default = pathlib.Path(__file__).resolve().parent.parent / "data" / "optimizers"
    parser.add_argument("--out", type=pathlib.Path, default=default)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)

    # 17 whole blocks and one of 44; magnitudes differ within a block, and a third of the gradients
    # is 0 in each step after the first, so that second moments of 0 stand beside first ones.
    n, steps = 17 * BLOCK + 44, 3
    g = rng.standard_normal((steps, n)) * 10.0 ** rng.uniform(-5, 0, n)
    g[1:][rng.random((steps - 1, n)) < 1 / 3] = 0.0
    g = g.astype(np.float32)
    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    optimizer, p = AdamW8bit(n, **hyper), np.zeros(n)
    for step in range(steps):
        optimizer.step(p, g[step].astype(np.float64))
    tensors = {"g": g, "p": p, "map1": optimizer.map1, "map2": optimizer.map2}
    tensors |= {"c1": optimizer.c1, "c2": optimizer.c2}
    tensors |= {"absmax1": optimizer.absmax1, "absmax2": optimizer.absmax2}
    # Far above what the tables, which are rounded to float32 here, make of it.
    assert Margin.least > 2e-6, Margin.least
    print("steps of at most", np.abs(p).max(), "nearest to a tie", Margin.least)
    meta = {key: str(value) for key, value in hyper.items()} | {"steps": str(steps)}
    meta["tie_distance"] = str(Margin.least)
    save_file(tensors, out / "adamw8bit.safetensors", metadata=meta)

    steps, tensors = 5, {}
    hyper = {"lr": 0.02, "weight_decay": 0.1}
    shapes = {"matrix": (6, 10), "vector": (17,), "row": (1, 9), "column": (9, 1)}
    for name, shape in shapes.items():
        p = rng.standard_normal(shape)
        tensors[f"{name}.start"] = p.copy()
        # Of one step the squares are a hundred times larger: its update is clipped.
        g = rng.standard_normal((steps, *shape)) * rng.uniform(0.01, 1, shape)
        g[3] *= 10
        g[:, 0] = 0 if shape[0] > 1 else g[:, 0]
        optimizer, after = Adafactor(shape, **hyper), []
        for step in range(steps):
            optimizer.step(p, g[step])
            after.append(p.copy())
        tensors[f"{name}.g"], tensors[f"{name}.p"] = g, np.stack(after)
        if optimizer.factored:
            tensors[f"{name}.rows"], tensors[f"{name}.cols"] = optimizer.row, optimizer.col
        else:
            tensors[f"{name}.full"] = optimizer.full
    meta = {key: str(value) for key, value in hyper.items()} | {"steps": str(steps)}
    save_file(tensors, out / "adafactor.safetensors", metadata=meta)


if __name__ == "__main__":
    main()
