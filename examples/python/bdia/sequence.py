"""A sequence of residual blocks that is trained reversibly.

In the order of data flow: ``ReversibleSequence.forward`` draws a seed and starts a ``_Step``; ``_Step.forward`` runs the
stack of ``bdia._core``, which calls ``input`` and ``residual``; autograd calls ``_Step.backward``, and the stack calls
``residual`` again (for the inverse and the gradient), ``vjp`` and ``done``.
"""

import contextlib

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from . import _core
from .errors import DeviceError, SettingError

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class ReversibleSequence(nn.Sequential):
    r"""Residual blocks :math:`x_{k+1} = x_k + h_k(x_k)`, trained reversibly.

    A drop-in for ``nn.Sequential(*blocks)``: the same children, names and ``state_dict``; the same function in
    ``eval()``. In ``train()`` it computes the BDIA recurrence on the grid :math:`2^{-l}` (paper, section 4)

    .. math:: x_1 = x_0 + Q(h_0(x_0)), \qquad
              x_{k+1} = \gamma (x_{k-1} + s_{k-1}) + Q((1-\gamma) x_k + (1+\gamma) h_k(x_k))

    with :math:`\gamma = \pm 2^{-m}`. Signs and dropout masks follow from *one*
    number that every training call draws from torch's default generator, so ``torch.manual_seed`` and a saved
    generator state repeat them. Inside blocks that generator is seeded by block and chunk, which is how dropout repeats
    in the recomputation; blocks that draw from elsewhere do not repeat themselves and give a ``ChecksumError``.

    Args:
        blocks: modules, or any callables on a tensor ``[samples, ...]`` that return one of the same shape (or a tuple
            that begins with it). Callables without parameters of their own are wrapped.
        returns: ``"sum"``, a block returns ``x + h(x)``, as in an ``nn.Sequential``; ``"residual"``, it returns ``h(x)``.
        gamma: ``0.5`` (one bit is kept per value and block), ``0.25`` (two), ... ``2 ** -8``. A pretrained network that
            has never seen a gamma needs a small one, often 1/16. As with a learning rate, a schedule sets the attribute
            between the steps.
        sign: ``"random"``, drawn per sample and block; ``"shared"``, per sample, the same for all blocks, which leaves a
            pretrained network nearest to what it was; or always ``"plus"`` or ``"minus"``.
        frac_bits: ``l``, 0 to 24; values may be up to ``2 ** (30 - l)``.
        chunk: samples that go through a block together; None: all of them. A block's intermediates, also those that
            autograd keeps for its backward pass, exist for one chunk at a time.
        per_sample: names of keyword arguments of ``forward`` whose first dimension is that of the samples (or 1); they
            are cut into chunks with the samples. Other arguments go to every call as they are.
        block_done: ``f(index, block)``, called in the backward pass as soon as a block's gradients are complete and its
            activations compared. They are in ``.grad`` then; an optimizer may step and free them (``zero_grad``), so
            that never more than one block's gradients exist. Without it gradients go the ordinary way through autograd.
        verify: keep all activations besides and count values that are rebuilt differently in ``mismatches`` (0).

    ``forward(x, *args, **kwargs)`` passes further arguments to every block. Gradients reach ``x``, the parameters, and
    tensors among the further arguments; a tensor that a block takes from elsewhere is an error if it needs a gradient.
    The activations are ``float32`` for ``float32``, ``bfloat16`` and ``float16`` inputs and ``float64`` for ``float64``
    ones; blocks see them in the type of ``x``. Buffers that a block updates (batch norm) are updated twice a step.
    """

    def __init__(
        self,
        blocks,
        *,
        returns="sum",
        gamma=0.5,
        sign="random",
        frac_bits=14,
        chunk=None,
        per_sample=(),
        block_done=None,
        verify=False,
    ):
        super().__init__(*(b if isinstance(b, nn.Module) else _Function(b) for b in blocks))
        if returns not in ("sum", "residual"):
            raise SettingError(f'returns is {returns!r}; possible: "sum" (x + h(x)), "residual" (h(x))')
        if chunk is not None and chunk < 1:
            raise SettingError(f"chunk is {chunk}; possible: 1 or more, or None for whole batches")
        self.returns, self.gamma, self.sign, self.frac_bits = returns, gamma, sign, frac_bits
        self.chunk, self.per_sample, self.block_done, self.verify = chunk, tuple(per_sample), block_done, verify
        self.mismatches = 0
        self._pass(1, 1, max(len(self), 1), torch.float32)  # complains about the settings here and not in training

    def extra_repr(self):
        settings = f"gamma={self.gamma}, sign={self.sign!r}, frac_bits={self.frac_bits}, chunk={self.chunk}"
        return f"returns={self.returns!r}, {settings}"

    def forward(self, x, *args, **kwargs):
        if not self.training or len(self) == 0:
            for block in self._modules.values():
                y = _first(block(x, *args, **kwargs))
                x = y if self.returns == "sum" else x + y
            return x
        _check_input(x)
        named = {}
        for index, block in enumerate(self._modules.values()):
            for name, p in block.named_parameters():
                if p.requires_grad:
                    named.setdefault(p, (index, name))
        for p, (index, name) in named.items():
            if p._backward_hooks:
                raise SettingError(
                    f"parameter {name} of block {index} has a tensor hook, which would be called for parts of its "
                    "gradient; register_post_accumulate_grad_hook is called once"
                )
        step = _Step(self, x, args, kwargs, list(named))
        if self.block_done is not None:
            step.check_owners()
            # Their gradients do not go through autograd; something must, for the backward pass to come.
            return _Reversible.apply(step, x, torch.empty(0, requires_grad=True), *step.extras)
        return _Reversible.apply(step, x, *step.parameters, *step.extras)

    def plan(self, shape, dtype=torch.float32):
        """Bytes that one training pass holds for an input of ``shape``, by category; nothing of it grows with depth
        but ``side_bits`` (and ``verify``). What a block itself needs is torch's and comes on top, for one block and chunk.
        As the output leaves the stack, the last step has gamma and side bits like the others, and is inverted.
        """
        batch, per_sample = shape[0], torch.Size(shape[1:]).numel()
        return self._pass(batch, per_sample, len(self), dtype).memory()

    def _pass(self, batch, per_sample, blocks, dtype):
        return _core.Pass(
            batch=batch,
            per_sample=per_sample,
            blocks=blocks,
            chunk=min(self.chunk or batch, batch) or 1,
            frac_bits=self.frac_bits,
            gamma=self.gamma,
            sign=self.sign,
            verify=self.verify,
            threads=torch.get_num_threads(),
            double=dtype == torch.float64,
        )


class _Function(nn.Module):
    """A callable as a block."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args, **kwargs):
        return self.f(*args, **kwargs)


class _Reversible(torch.autograd.Function):
    """The sequence as one function of its input, its parameters and tensors among the arguments."""

    @staticmethod
    def forward(ctx, step, x, *tensors):
        y = step.forward(x)
        if any(ctx.needs_input_grad):
            ctx.step = step
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gx, tensors = ctx.step.backward(gradient)
        return (None, gx if ctx.needs_input_grad[1] else None, *tensors)


class _Step:
    """One training pass: what the stack calls, and what has to last from forward to backward."""

    def __init__(self, sequence, x, args, kwargs, parameters):
        self.sequence, self.blocks = sequence, list(sequence._modules.values())
        self.args, self.kwargs, self.parameters = args, kwargs, parameters
        self.shape, self.dtype = x.shape, x.dtype
        self.real = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.seed = int(torch.randint(2**63 - 1, ()))
        self.autocast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        arguments = [(None, a) for a in args] + list(kwargs.items())
        self.extras = [a for _, a in arguments if _needs_gradient(a)]
        for name in sequence.per_sample:
            a = kwargs.get(name)
            if isinstance(a, torch.Tensor) and (a.dim() == 0 or a.shape[0] not in (1, len(x))):
                raise SettingError(f"{name}: its first dimension is that of {len(x)} samples or 1; found {list(a.shape)}")
        self.gradients, self.places = {}, {}
        self.x, self.graph = None, None
        self.pass_ = sequence._pass(len(x), x[0].numel(), len(self.blocks), x.dtype)

    def check_owners(self):
        """With `block_done` a parameter belongs to one block: its gradient must be complete when that is done."""
        owner = {}
        for index, block in enumerate(self.blocks):
            for name, p in block.named_parameters():
                if owner.setdefault(p, index) != index:
                    raise SettingError(f"block_done: {name} is shared by blocks {owner[p]} and {index}")

    def forward(self, x):
        self.x = x
        with self._surroundings():
            self.pass_.forward(self, self.seed)
        self.x = None
        y = self._ints(len(self.blocks)).to(self.real).mul_(2.0**-self.sequence.frac_bits)
        return y.view(self.shape).to(self.dtype)

    def backward(self, gradient):
        if self.pass_ is None:
            raise SettingError("backward a second time: the first one rebuilt, and used up, what the forward pass kept")
        pass_, self.pass_ = self.pass_, None
        self._tensor(pass_.gradient(len(self.blocks))).view(self.shape).copy_(gradient)
        if self.sequence.block_done is None:
            # Gradients that stay get their memory before the blocks' intermediates come and go: allocated between them,
            # they would leave holes that the next block's intermediates do not fit in.
            self.places = {id(p): torch.empty_like(p, requires_grad=False) for p in self.parameters}
        with self._surroundings():
            pass_.backward(self)
        self.graph = None
        if self.sequence.verify:
            self.sequence.mismatches = pass_.mismatches()
        gx = self._tensor(pass_.gradient(0)).view(self.shape).to(self.dtype, copy=True)
        gradients, self.gradients, self.places = self.gradients, {}, {}
        if self.sequence.block_done is not None:
            return gx, (None, *(gradients.get(id(e)) for e in self.extras))
        return gx, [gradients.get(id(t)) for t in (*self.parameters, *self.extras)]

    # What the stack calls, from the first sample of a chunk on; buffers are its own memory.

    def input(self, first, samples, x):
        self._view(x, samples).copy_(self.x[first : first + samples])

    def residual(self, k, first, samples, x, h, keep):
        # One kernel for both passes: torch chooses by whether a gradient is wanted, so it always is; in the forward
        # pass what autograd would keep is dropped at once.
        x, h = self._view(x, samples), self._view(h, samples)
        dropped = contextlib.nullcontext() if keep else torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: None)
        torch.default_generator.manual_seed(_core.block_seed(self.seed, first, k))
        with torch.enable_grad(), dropped:
            # In f64 the buffer's address may change (it is for checking only); what autograd keeps is a copy.
            leaf = (x.clone() if self.real == torch.float64 else x.detach()).requires_grad_()
            args, kwargs, extras = self._arguments(first, samples)
            seen = leaf.to(self.dtype)
            y = _first(self.blocks[k](seen, *args, **kwargs))
            _check_output(k, y, seen)
        if self.sequence.returns == "sum":
            torch.sub(y.detach().to(self.real), seen.detach(), out=h)
        else:
            h.copy_(y.detach())
        if keep:
            self.graph = (leaf, y, extras)

    def vjp(self, k, first, samples, gh, gx):
        (leaf, y, extras), self.graph = self.graph, None
        gh, gx = self._view(gh, samples), self._view(gx, samples)
        parameters = [p for p in self.blocks[k].parameters() if p.requires_grad]
        wanted = [leaf, *parameters, *(part for _, _, part in extras)]
        if y.requires_grad:
            _check_leaves(k, y, wanted)
            g = torch.autograd.grad(y, wanted, gh.to(y.dtype), allow_unused=True)
        else:
            g = [None] * len(wanted)
        if g[0] is not None:
            gx.add_(g[0])
        if self.sequence.returns == "sum":
            gx.sub_(gh)
        for p, gp in zip(parameters, g[1:]):
            self._add(p, gp)
        for (e, whole, _), ge in zip(extras, g[1 + len(parameters) :]):
            if ge is not None and not whole:
                at = self.gradients.setdefault(id(e), torch.zeros_like(e))
                at[first : first + samples] += ge
            else:
                self._add(e, ge)

    def done(self, k):
        if self.sequence.block_done is None:
            return
        for p in self.blocks[k].parameters():
            g = self.gradients.pop(id(p), None)
            if g is not None:
                p.grad = g if p.grad is None else p.grad.add_(g)
        with torch.no_grad():
            self.sequence.block_done(k, self.blocks[k])

    def _add(self, tensor, gradient):
        if gradient is None:
            return
        have = self.gradients.get(id(tensor))
        if have is not None:
            have.add_(gradient)
            return
        place = self.places.pop(id(tensor), None)
        if place is not None and gradient.layout == place.layout:
            gradient = place.copy_(gradient)
        self.gradients[id(tensor)] = gradient

    def _arguments(self, first, samples):
        """The further arguments for one chunk, and those of their tensors that need gradients: (tensor, whole, part)."""
        extras = []

        def part(a, name):
            if not isinstance(a, torch.Tensor):
                return a
            whole = name not in self.sequence.per_sample or a.shape[0] == 1
            if not whole:
                cut = a.detach()[first : first + samples]
            else:
                cut = a.detach()
            if _needs_gradient(a):
                cut.requires_grad_()
                extras.append((a, whole, cut))
            return cut

        args = [part(a, None) for a in self.args]
        return args, {name: part(a, name) for name, a in self.kwargs.items()}, extras

    @contextlib.contextmanager
    def _surroundings(self):
        """torch's generator is put back afterwards, and autocast is as it was in the forward pass."""
        enabled, dtype = self.autocast
        state = torch.default_generator.get_state()
        try:
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                yield
        finally:
            torch.default_generator.set_state(state)

    def _tensor(self, buffer):
        return torch.frombuffer(buffer, dtype=self.real)

    def _view(self, buffer, samples):
        return self._tensor(buffer).view(samples, *self.shape[1:])

    def _ints(self, k):
        return torch.frombuffer(self.pass_.activation(k), dtype=torch.int32)


def signs(seed, samples, blocks, sign="random"):
    """The signs of gamma that a pass with this seed has, ``[blocks, samples]`` of 1 and -1 (block 0 has no gamma).

    The seed of a training call is ``int(torch.randint(2**63 - 1, ()))`` drawn where the call is made.
    """
    return torch.tensor([_core.signs(seed, 0, samples, k, sign) for k in range(blocks)], dtype=torch.int8)


def _first(y):
    return y[0] if isinstance(y, (tuple, list)) and y else y


def _needs_gradient(a):
    return isinstance(a, torch.Tensor) and a.requires_grad


def _check_input(x):
    if not isinstance(x, torch.Tensor) or x.dtype not in _FLOATS:
        raise SettingError(f"the input is a tensor of floats; found {getattr(x, 'dtype', type(x).__name__)}")
    if x.device.type != "cpu":
        raise DeviceError(f"the input is on {x.device}; reversible training runs on the CPU, move model and input there")
    if x.dim() < 2 or x.numel() == 0:
        raise SettingError(f"the input is [samples, values...], none of them 0; found {list(x.shape)}")


def _check_output(k, y, x):
    if not isinstance(y, torch.Tensor) or y.shape != x.shape or not y.is_floating_point():
        found = f"{list(y.shape)} of {y.dtype}" if isinstance(y, torch.Tensor) else type(y).__name__
        raise SettingError(f"block {k} returns a tensor of floats with the shape of its input, {list(x.shape)}; found {found}")


def _check_leaves(k, y, wanted):
    """Raises where the block's graph ends in a tensor that is not one of `wanted`: its gradient would be lost."""
    known, seen, stack = {id(t) for t in wanted}, set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise SettingError(
                f"block {k} takes a tensor of shape {list(leaf.shape)} that needs a gradient from outside: make it a "
                "parameter of the block or an argument of the sequence"
            )
        stack.extend(n for n, _ in node.next_functions)
