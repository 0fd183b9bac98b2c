"""Exact reversible training (BDIA) of residual blocks in PyTorch.

A :class:`ReversibleSequence` takes the place of an ``nn.Sequential`` of residual blocks. While it trains, two integer
activation tensors and one bit per value and block are kept instead of what autograd would keep; on the way back every
activation is rebuilt, bit for bit, and that is checked. What it learns is an ordinary network: in ``eval()`` it *is*
the ``nn.Sequential``.
"""

from .errors import ChecksumError, DeviceError, Error, GradientError, RangeError, SettingError
from .gpt2 import Gpt2Blocks, reversible_gpt2
from .sequence import ReversibleSequence, signs

__all__ = [
    "ChecksumError",
    "DeviceError",
    "Error",
    "Gpt2Blocks",
    "GradientError",
    "RangeError",
    "ReversibleSequence",
    "SettingError",
    "reversible_gpt2",
    "signs",
]
