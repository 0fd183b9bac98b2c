"""What can go wrong, as exceptions. All are :class:`Error`."""


class Error(RuntimeError):
    """A pass that cannot be carried out, or stopped."""


class SettingError(Error, ValueError):
    """A setting, shape or type outside what it may be. Nothing has been computed."""


class DeviceError(Error):
    """Tensors on a device that the update does not run on (it runs on the CPU)."""


class RangeError(Error):
    """A value is not finite or leaves the range of the grid. No gradient was computed, no parameter changed.

    ``block`` is None for the input of the sequence; ``sample`` and ``value`` are those of the first such value.
    """

    def __init__(self, message, block=None, sample=None, value=None):
        super().__init__(message)
        self.block, self.sample, self.value = block, sample, value


class GradientError(Error):
    """A gradient is not finite. Its block's ``block_done`` was not called, nor those of blocks below.

    ``block`` is the one whose backward pass gave it, or None for the gradient that came from above the sequence;
    ``sample`` and ``value`` are those of the first such value.
    """

    def __init__(self, message, block=None, sample=None, value=None):
        super().__init__(message)
        self.block, self.sample, self.value = block, sample, value


class ChecksumError(Error):
    """A rebuilt activation differs from the original: ``block`` does not repeat itself, or memory was changed.

    Also for a block that writes into its input.

    No ``.grad`` was changed, except those of blocks above that a ``block_done`` was called for.
    """

    def __init__(self, message, block=None):
        super().__init__(message)
        self.block = block
