"""The sequence against plain autograd over the same recurrence, and what it promises besides."""

import copy
import gc
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bdia
from bdia import _core


class Quantize(torch.autograd.Function):
    """round(y * 2**l) / 2**l with a straight-through gradient."""

    @staticmethod
    def forward(ctx, y, l):
        return torch.round(y * 2.0**l) * 2.0**-l

    @staticmethod
    def backward(ctx, g):
        return g, None


def plain(residuals, x, sigma, gamma, l, seed=None):
    """The recurrence written down once more, everything stored, by torch alone: X_{k+1} from X_{k-1}, X_k.

    The side information makes (X + s)/2^m whole: X rounded to a multiple of 2^m, which for m = 1 means up.
    """
    unit = 2.0**-l
    m = round(-math.log2(gamma))
    q = Quantize.apply
    shape = (-1,) + (1,) * (x.dim() - 1)

    def residual(k, y):
        if seed is not None:
            torch.manual_seed(_core.block_seed(seed, 0, k))
        return residuals[k](y)

    xs = [q(x, l)]
    xs.append(xs[0] + q(residual(0, xs[0]), l))
    for k in range(1, len(residuals)):
        g = gamma * sigma[k].to(x.dtype).view(shape)
        old = (xs[k - 1].detach() / unit).long()
        r = old % 2**m
        if m == 1:
            s = r
        else:
            index = torch.arange(old[0].numel()).view(old.shape[1:]).expand_as(old)
            down = (r < 2 ** (m - 1)) | ((r == 2 ** (m - 1)) & (index % 2 == 0))
            s = torch.where(down, -r, 2**m - r)
        xs.append(g * (xs[k - 1] + s * unit) + q((1 - g) * xs[k] + (1 + g) * residual(k, xs[k]), l))
    return xs[-1]


class Block(nn.Module):
    """A residual block: returns x + h(x)."""

    def __init__(self, d=6, dropout=0.0):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.drop = nn.Dropout(dropout)

    def h(self, x):
        return self.drop(self.down(torch.tanh(self.up(self.norm(x)))))

    def forward(self, x):
        return x + self.h(x)


def blocks(n, d=6, dropout=0.0, dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    return nn.ModuleList(Block(d, dropout) for _ in range(n)).to(dtype).train()


def drawn_seed(at):
    """The seed that a training call draws after manual_seed(at)."""
    torch.manual_seed(at)
    return int(torch.randint(2**63 - 1, ()))


def relative(a, b):
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("returns", ["sum", "residual"])
@pytest.mark.parametrize("gamma, sign", [(0.5, "random"), (0.25, "random"), (0.0625, "shared"), (0.5, "minus")])
@pytest.mark.parametrize("depth", [1, 2, 3, 7])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_plain_autograd_in_double(returns, gamma, sign, depth, dropout):
    layers = blocks(depth, dropout=dropout, dtype=torch.float64)
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 5, 6, dtype=torch.float64)
    modules = layers if returns == "sum" else [HOnly(b) for b in layers]
    sequence = bdia.ReversibleSequence(modules, returns=returns, gamma=gamma, sign=sign, verify=True).train()

    torch.manual_seed(9)
    y = sequence(x)
    (y - target).pow(2).sum().backward()
    mine = [x.grad.clone(), *(p.grad.clone() for p in layers.parameters())]
    assert sequence.mismatches == 0

    x.grad = None
    layers.zero_grad()
    seed = drawn_seed(9)
    sigma = bdia.signs(seed, 4, depth, sign)
    assert sign == "random" or (sigma == sigma[0]).all()
    z = plain([b.h for b in layers], x, sigma, gamma, 14, seed)
    (z - target).pow(2).sum().backward()
    assert torch.equal(y, z) or relative(y, z) < 1e-12
    for a, b in zip(mine, [x.grad, *(p.grad for p in layers.parameters())], strict=True):
        assert relative(a, b) < 1e-11


def test_gamma_changes_between_steps():
    layers = blocks(4)
    sequence = bdia.ReversibleSequence(layers, gamma=0.0625, sign="shared", verify=True).train()
    assert "gamma=0.0625, sign='shared'" in repr(sequence)
    x = torch.randn(4, 5, 6)
    bits = sequence.plan(x.shape)["side_bits"]
    torch.manual_seed(9)
    y = sequence(x)
    sequence.gamma = 0.25  # a pass that is on keeps its own
    y.sum().backward()
    assert sequence.mismatches == 0
    assert sequence.plan(x.shape)["side_bits"] < bits
    mine = [p.grad.clone() for p in layers.parameters()]
    layers.zero_grad()
    torch.manual_seed(9)
    sequence(x).sum().backward()
    assert sequence.mismatches == 0
    assert not all(torch.equal(a, p.grad) for a, p in zip(mine, layers.parameters(), strict=True))


class HOnly(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block.h(x)


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_float32_is_near_double_and_chunks_change_rounding_only(chunk):
    layers = blocks(6)
    x, target = torch.randn(5, 5, 6), torch.randn(5, 5, 6)
    sequence = bdia.ReversibleSequence(layers, frac_bits=20, chunk=chunk, verify=True).train()
    torch.manual_seed(2)
    (sequence(x) - target).pow(2).sum().backward()
    assert sequence.mismatches == 0
    wide = copy.deepcopy(layers).double()
    wide.zero_grad()
    seed = drawn_seed(2)
    z = plain([b.h for b in wide], x.double(), bdia.signs(seed, 5, 6), 0.5, 20)
    (z - target).pow(2).sum().backward()
    for a, b in zip(layers.parameters(), wide.parameters(), strict=True):
        assert relative(a.grad, b.grad) < 1e-4


def test_eval_is_the_plain_sequential():
    layers = blocks(4, dropout=0.5).eval()
    sequence = bdia.ReversibleSequence(layers).eval()
    plain_ = nn.Sequential(*layers)
    x = torch.randn(3, 2, 6, requires_grad=True)
    assert torch.equal(sequence(x), plain_(x))
    assert list(sequence.state_dict()) == list(plain_.state_dict())
    sequence(x).sum().backward()
    assert x.grad is not None


def test_dropout_repeats_and_the_generator_goes_on_as_if_one_number_was_drawn():
    sequence = bdia.ReversibleSequence(blocks(5, dropout=0.4), verify=True)
    x = torch.randn(4, 3, 6)
    torch.manual_seed(5)
    y = sequence(x)
    after = torch.rand(3)
    y.sum().backward()
    assert sequence.mismatches == 0
    drawn_seed(5)
    assert torch.equal(after, torch.rand(3))
    torch.manual_seed(5)
    assert torch.equal(sequence(x), y)
    assert not torch.equal(sequence(x), y)
    # The backward pass leaves the generator where it was.
    torch.manual_seed(5)
    y = sequence(x)
    state = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(state, torch.get_rng_state())


class Forgetful(nn.Module):
    """Draws from somewhere that is not replayed."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return x + self.scale * 0.1 * torch.rand(x.shape, generator=self.generator)


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_block_that_does_not_repeat_itself_is_named_and_no_gradient_is_changed(at):
    layers = list(blocks(5))
    layers[at] = Forgetful()
    sequence = bdia.ReversibleSequence(layers)
    y = sequence(torch.randn(4, 3, 6))
    with pytest.raises(bdia.ChecksumError) as e:
        y.sum().backward()
    assert e.value.block == at and f"block {at}" in str(e.value)
    assert all(p.grad is None for p in sequence.parameters())


def test_a_parameter_changed_between_forward_and_backward_is_found():
    sequence = bdia.ReversibleSequence(blocks(4))
    y = sequence(torch.randn(4, 3, 6))
    with torch.no_grad():
        sequence[2].down.bias[1] += 0.01
    with pytest.raises(bdia.ChecksumError) as e:
        y.sum().backward()
    assert e.value.block == 2


def test_one_flipped_bit_is_found():
    sequence = bdia.ReversibleSequence(blocks(6))
    y = sequence(torch.randn(4, 3, 6))
    y.grad_fn.step.pass_.flip(6, 17)
    with pytest.raises(bdia.ChecksumError) as e:
        y.sum().backward()
    assert e.value.block == 5


def test_values_out_of_range_are_named():
    class Wild(nn.Module):
        def forward(self, x):
            y = x.clone()
            y[2] = float("inf")
            return y

    sequence = bdia.ReversibleSequence([*blocks(3), Wild()])
    with pytest.raises(bdia.RangeError) as e:
        sequence(torch.randn(4, 3, 6))
    assert (e.value.block, e.value.sample) == (3, 2)
    x = torch.randn(4, 3, 6)
    x[1] = float("nan")
    with pytest.raises(bdia.RangeError) as e:
        sequence(x)
    assert (e.value.block, e.value.sample) == (None, 1)


def test_gradients_that_are_not_finite_are_named():
    sequence = bdia.ReversibleSequence(blocks(4))
    y = sequence(torch.randn(4, 3, 6))
    gradient = torch.ones_like(y)
    gradient[2, 1, 0] = float("nan")
    with pytest.raises(bdia.GradientError) as e:
        y.backward(gradient)
    assert (e.value.block, e.value.sample) == (None, 2)
    assert all(p.grad is None for p in sequence.parameters())


def test_gradients_of_further_arguments():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Linear(6, 6), nn.Linear(3, 6)

        def forward(self, x, bias, context=None):
            return x + torch.tanh(self.w(x) + bias + self.v(context))

    torch.manual_seed(0)
    layers = nn.ModuleList(Cross() for _ in range(4)).double()
    x = torch.randn(5, 2, 6).double()
    bias = torch.randn(6).double().requires_grad_()
    base = torch.randn(5, 1, 3).double().requires_grad_()
    sequence = bdia.ReversibleSequence(layers, chunk=2, per_sample=("context",), verify=True)
    torch.manual_seed(3)
    sequence(x, bias, context=base * 2).pow(2).sum().backward()
    mine = [bias.grad.clone(), base.grad.clone(), *(p.grad.clone() for p in layers.parameters())]
    bias.grad = base.grad = None
    layers.zero_grad()
    seed = drawn_seed(3)
    hs = [lambda y, b=b: b(y, bias, context=base * 2) - y for b in layers]
    plain(hs, x, bdia.signs(seed, 5, 4), 0.5, 14).pow(2).sum().backward()
    for a, b in zip(mine, [bias.grad, base.grad, *(p.grad for p in layers.parameters())], strict=True):
        assert relative(a, b) < 1e-10
    assert sequence.mismatches == 0


def test_a_tensor_from_elsewhere_is_an_error():
    outside = torch.ones(6, requires_grad=True)
    sequence = bdia.ReversibleSequence([lambda x: x * outside, *blocks(2)])
    y = sequence(torch.randn(2, 3, 6, requires_grad=True))
    with pytest.raises(bdia.SettingError, match="block 0"):
        y.sum().backward()


def test_shared_blocks_add_up():
    one = blocks(1, dtype=torch.float64)[0]
    sequence = bdia.ReversibleSequence([one] * 3)
    x = torch.randn(2, 3, 6).double()
    torch.manual_seed(4)
    sequence(x).pow(2).sum().backward()
    mine = [p.grad.clone() for p in one.parameters()]
    one.zero_grad()
    seed = drawn_seed(4)
    plain([one.h] * 3, x, bdia.signs(seed, 2, 3), 0.5, 14).pow(2).sum().backward()
    for a, p in zip(mine, one.parameters(), strict=True):
        assert relative(a, p.grad) < 1e-11
    with pytest.raises(bdia.SettingError, match="shared"):
        bdia.ReversibleSequence([one] * 3, block_done=lambda k, b: None)(x)


def test_block_done_updates_give_the_bits_of_an_update_at_the_end():
    def train(fused):
        layers = blocks(5, dropout=0.1)
        optimizers = [torch.optim.AdamW(b.parameters(), lr=1e-2) for b in layers]
        live = []

        def done(k, block):
            live.append(sum(p.grad is not None for p in layers.parameters()))
            optimizers[k].step()
            optimizers[k].zero_grad()

        sequence = bdia.ReversibleSequence(layers, block_done=done if fused else None, verify=True)
        torch.manual_seed(8)
        x, target = torch.randn(6, 3, 6), torch.randn(6, 3, 6)
        for _ in range(5):
            (sequence(x) - target).pow(2).mean().backward()
            assert sequence.mismatches == 0
            if not fused:
                for o in optimizers:
                    o.step()
                    o.zero_grad()
        return [p.detach().clone() for p in layers.parameters()], live

    (a, live), (b, _) = train(True), train(False)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    one_block = len(list(Block().parameters()))
    assert set(live) == {one_block}


def test_gradients_accumulate_over_several_passes_in_flight():
    sequence = bdia.ReversibleSequence(blocks(4, dropout=0.2), verify=True)
    a, b = torch.randn(2, 3, 6), torch.randn(7, 5, 6)
    torch.manual_seed(1)
    sequence(a).sum().backward()
    sequence(b).sum().backward()
    one = [p.grad.clone() for p in sequence.parameters()]
    sequence.zero_grad()
    torch.manual_seed(1)
    (sequence(a).sum() + sequence(b).sum()).backward()
    for p, q in zip(one, sequence.parameters(), strict=True):
        assert relative(p, q.grad) < 1e-6


def test_autograd_grad_without_touching_grad_and_frozen_parameters():
    sequence = bdia.ReversibleSequence(blocks(4))
    x = torch.randn(3, 2, 6, requires_grad=True)
    sequence[1].requires_grad_(False)
    wanted = [x, *sequence[2].parameters()]
    torch.manual_seed(0)
    g = torch.autograd.grad(sequence(x).sum(), wanted)
    assert all(p.grad is None for p in sequence.parameters())
    torch.manual_seed(0)
    sequence(x).sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(g, wanted, strict=True))
    assert all(p.grad is None for p in sequence[1].parameters())


def test_backward_twice_is_an_error():
    sequence = bdia.ReversibleSequence(blocks(2))
    y = sequence(torch.randn(3, 2, 6)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(bdia.Error, match="second time"):
        y.backward()


def test_memory_goes_when_the_graph_goes():
    sequence = bdia.ReversibleSequence(blocks(3))
    x = torch.randn(3, 2, 6)

    def passes():
        gc.collect()
        return sum(isinstance(o, bdia.sequence._Step) for o in gc.get_objects())

    before = passes()
    y = sequence(x)
    assert passes() == before + 1
    y.sum().backward()
    del y
    assert passes() == before
    y = sequence(x)
    del y
    assert passes() == before
    with torch.no_grad():
        y = sequence(x)
    assert passes() == before
    assert not y.requires_grad


def test_the_plan_grows_with_side_bits_only():
    def plan(depth):
        return bdia.ReversibleSequence(blocks(depth)).plan((4, 10, 6))

    a, b = plan(3), plan(43)
    assert {k for k in a if a[k] != b[k]} == {"side_bits", "total"}
    assert b["total"] == sum(v for k, v in b.items() if k != "total")
    # 4 samples of 60 bits: two words each; a checksum is two words. Rounded up to cache lines.
    assert abs(b["side_bits"] - a["side_bits"] - 40 * (4 * 2 + 2) * 4) < 64 * 2


@pytest.mark.parametrize(
    "settings, what",
    [
        ({"gamma": 0.3}, "gamma"),
        ({"gamma": 0.0}, "gamma"),
        ({"frac_bits": 25}, "frac_bits"),
        ({"sign": "maybe"}, "sign"),
        ({"returns": "x"}, "returns"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_wrong_settings(settings, what):
    with pytest.raises(bdia.SettingError, match=what):
        bdia.ReversibleSequence(blocks(2), **settings)


@pytest.mark.parametrize("x", [torch.ones(3, 2, 6).long(), torch.ones(6), torch.ones(0, 6), "text"])
def test_wrong_inputs(x):
    with pytest.raises(bdia.SettingError, match="the input is"):
        bdia.ReversibleSequence(blocks(2))(x)


def test_wrong_outputs():
    for f in (lambda x: x[:, :1], lambda x: None, lambda x: x.long()):
        with pytest.raises(bdia.SettingError, match="block 1"):
            bdia.ReversibleSequence([Block(), f])(torch.randn(2, 3, 6))


def test_an_exception_of_a_block_comes_through():
    def f(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bdia.ReversibleSequence([Block(), f])(torch.randn(2, 3, 6))


def test_in_place_changes_of_the_input_are_refused():
    with pytest.raises(RuntimeError, match="in-place"):
        bdia.ReversibleSequence([lambda x: x.add_(1)])(torch.randn(2, 3, 6))


@pytest.mark.parametrize("device", ["cuda", "mps", "meta"])
def test_other_devices_are_a_typed_error(device):
    # torch's fake tensors say that they are on a device, whether or not there is one.
    with FakeTensorMode():
        x = torch.empty(2, 3, 6, device=device)
    with pytest.raises(bdia.DeviceError, match=device):
        bdia.ReversibleSequence(blocks(2))(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here (with torch's fake one, it ran above)")
def test_real_cuda_tensors_are_a_typed_error():
    with pytest.raises(bdia.DeviceError, match="cuda"):
        bdia.ReversibleSequence(blocks(2))(torch.randn(2, 3, 6, device="cuda"))


def test_tensor_hooks_are_refused():
    sequence = bdia.ReversibleSequence(blocks(2))
    sequence[1].up.weight.register_hook(lambda g: g * 2)
    with pytest.raises(bdia.SettingError, match="hook"):
        sequence(torch.randn(2, 3, 6))


def test_half_precision_models_and_autocast():
    layers = blocks(4)
    x = torch.randn(3, 4, 6)
    sequence = bdia.ReversibleSequence(copy.deepcopy(layers).bfloat16(), verify=True)
    y = sequence(x.bfloat16().requires_grad_())
    assert y.dtype == torch.bfloat16
    y.float().pow(2).sum().backward()
    assert sequence.mismatches == 0
    assert sequence[0].up.weight.grad.dtype == torch.bfloat16

    sequence = bdia.ReversibleSequence(copy.deepcopy(layers), verify=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sequence(x)
    y.pow(2).sum().backward()  # outside of autocast, as is usual
    assert sequence.mismatches == 0


def test_attention_blocks_repeat_themselves():
    # Matrix products and attention choose kernels by shape and by whether gradients are wanted.
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
    sequence = bdia.ReversibleSequence([copy.deepcopy(layer) for _ in range(3)], chunk=2, verify=True)
    y = sequence(torch.randn(5, 9, 32))
    y.pow(2).mean().backward()
    assert sequence.mismatches == 0
