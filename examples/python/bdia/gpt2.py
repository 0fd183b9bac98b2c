"""Hugging Face's GPT-2 with reversible training."""

from .errors import SettingError
from .sequence import ReversibleSequence


class Gpt2Blocks(ReversibleSequence):
    """The blocks of a ``GPT2Model`` (transformers 5): stands in for its ``h``, under the same names.

    The model loops over ``h``. While training, that loop is given one step, this sequence as a whole; in ``eval()`` it
    is given the blocks, so that generation, caches and everything else are Hugging Face's own.
    """

    def __init__(self, blocks, **settings):
        per_sample = ("attention_mask", "position_ids", "encoder_hidden_states", "encoder_attention_mask")
        super().__init__(blocks, returns="sum", per_sample=per_sample, **settings)

    def __iter__(self):
        return iter((self._all,)) if self.training else super().__iter__()

    def _all(self, hidden_states, cache=None, attention_mask=None, encoder_hidden_states=None, **kwargs):
        # A cache of keys and values would grow with every recomputation, and training has no use for it.
        kwargs["use_cache"] = False
        return self(
            hidden_states,
            cache=None,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            **kwargs,
        )


def reversible_gpt2(model, **settings):
    """Makes a Hugging Face GPT-2 (``GPT2LMHeadModel``, ``GPT2Model``, ...) train reversibly, and returns it.

    Parameters stay the same objects under the same names: ``save_pretrained`` writes a standard GPT-2. ``settings`` are
    those of :class:`ReversibleSequence`.
    """
    base = getattr(model, "transformer", model)
    if not hasattr(base, "h") or not hasattr(base, "wte"):
        raise SettingError(f"a GPT-2 model has its blocks in h; found {type(model).__name__}")
    base.h = Gpt2Blocks(base.h, **settings).train(base.h.training)
    return model
