"""BDIA training in PyTorch: a stack of residual blocks that keeps two integer activations and one
bit per value.

    X_0     = Q(embedding)          X_1 = X_0 + Q(h_0(x_0))
    X_{k+1} = s * (X_{k-1} + bit) / 2 + Q((1 - g) x_k + (1 + g) h_k(x_k))
    g       = s / 2, s = +-1 per sample and block

with x = 2^-l X and Q(y) = round(2^l y). The blocks 0 .. K-2 are one autograd function whose
backward rebuilds their inputs; the last block is ordinary autograd, so K-1 blocks are computed
twice and none more often. Written from the formulas, apart from the Rust code; the signs come from
the same counter-based generator, so that losses can be compared.
"""

import torch

MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(key, counter):
    """Philox 4x32-10 (Salmon et al., 2011): four words from a 64-bit key and four counter words."""
    k0, k1 = key & WORD, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & WORD, (a >> 32) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def signs(seed, step, batch, block):
    """[batch, 1, 1] of +1 and -1 for one block."""
    words = [philox(seed, (step, sample, block << 8, 0))[0] for sample in range(batch)]
    return torch.tensor([1 - 2 * (w & 1) for w in words], dtype=torch.int32).view(-1, 1, 1)


def pack(X):
    """The lowest bit of every value, eight to a byte."""
    bits = torch.zeros(X.numel() // 8, dtype=torch.uint8)
    lanes = X.view(-1, 8)
    for i in range(8):
        bits |= (lanes[:, i] & 1).to(torch.uint8) << i
    return bits


def unpack(bits, shape):
    out = torch.empty(bits.numel(), 8, dtype=torch.int32)
    for i in range(8):
        out[:, i] = (bits >> i) & 1
    return out.view(shape)


class Stack:
    """`residuals[k](x)` is h_k. `verify` keeps all X_k and counts the values that the backward pass
    rebuilt differently."""

    def __init__(self, residuals, frac_bits, seed, verify=False):
        self.residuals, self.scale = residuals, float(2**frac_bits)
        self.seed, self.verify = seed, verify
        self.step, self.mismatches = 0, 0

    def quantize(self, y):
        return torch.round(y * self.scale).to(torch.int32)

    def value(self, X):
        return X.to(torch.float32) / self.scale

    def q(self, sigma, x, h):
        """Q((1 - g) x + (1 + g) h)."""
        gamma = sigma.to(torch.float32) / 2
        return self.quantize((1 - gamma) * x + (1 + gamma) * h)

    def advance(self, sigma, X_before, q):
        return ((X_before + (X_before & 1)) >> 1) * sigma + q

    def __call__(self, x):
        """x_K from the embedding, [B, T, d]."""
        last = len(self.residuals) - 1
        if last == 0:
            x0 = Grid.apply(x, self.value(self.quantize(x)))
            h = self.residuals[0](x0)
            return Grid.apply(x0 + h, self.value(self.quantize(x0) + self.quantize(h)))
        before, x = Reversible.apply(x, self)
        sigma = signs(self.seed, self.step, x.shape[0], last)
        gamma = sigma.to(torch.float32) / 2
        h = self.residuals[last](x)
        with torch.no_grad():
            X = self.advance(sigma, self.quantize(before), self.q(sigma, x, h))
            value = self.value(X)
        return Grid.apply(gamma * before + ((1 - gamma) * x + (1 + gamma) * h), value)


class Grid(torch.autograd.Function):
    """The value on the grid with the gradient of the value before rounding (straight through)."""

    @staticmethod
    def forward(ctx, smooth, value):
        return value

    @staticmethod
    def backward(ctx, g):
        return g, None


class Reversible(torch.autograd.Function):
    """x_0 -> (x_{K-2}, x_{K-1}): blocks 0 .. K-2."""

    @staticmethod
    def forward(ctx, x, stack):
        blocks, batch = len(stack.residuals) - 1, x.shape[0]
        ctx.stack, ctx.side, ctx.random, ctx.kept = stack, [], [], []
        X = [stack.quantize(x), None]
        for k in range(blocks):
            ctx.random.append(torch.get_rng_state())
            if stack.verify:
                ctx.kept.append(X[k % 2].clone())
            cur = stack.value(X[k % 2])
            h = stack.residuals[k](cur)
            if k == 0:
                X[1] = X[0] + stack.quantize(h)
            else:
                sigma = signs(stack.seed, stack.step, batch, k)
                far = X[(k + 1) % 2]
                ctx.side.append(pack(far))
                X[(k + 1) % 2] = stack.advance(sigma, far, stack.q(sigma, cur, h))
        ctx.X = X
        return stack.value(X[(blocks - 1) % 2]), stack.value(X[blocks % 2])

    @staticmethod
    def backward(ctx, g_before, g_last):
        stack, X = ctx.stack, ctx.X
        blocks, batch = len(stack.residuals) - 1, g_last.shape[0]
        after = torch.get_rng_state()
        g_next, g_cur = g_last, g_before.clone()
        for k in reversed(range(blocks)):
            torch.set_rng_state(ctx.random[k])
            cur = stack.value(X[k % 2]).requires_grad_()
            with torch.enable_grad():
                h = stack.residuals[k](cur)
            if k == 0:
                torch.autograd.backward(h, g_next)
                g = g_cur + g_next + cur.grad
                break
            sigma = signs(stack.seed, stack.step, batch, k)
            gamma = sigma.to(torch.float32) / 2
            far = X[(k + 1) % 2]
            bit = unpack(ctx.side.pop(), far.shape)
            X[(k + 1) % 2] = (far - stack.q(sigma, cur.detach(), h.detach())) * sigma * 2 - bit
            if stack.verify:
                stack.mismatches += int((X[(k + 1) % 2] != ctx.kept[k - 1]).sum())
            torch.autograd.backward(h, (1 + gamma) * g_next)
            g_cur.add_((1 - gamma) * g_next).add_(cur.grad)
            g_next, g_cur = g_cur, gamma * g_next
        torch.set_rng_state(after)
        ctx.X = ctx.kept = None
        return g, None
