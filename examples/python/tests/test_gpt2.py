"""Hugging Face's GPT-2: the same model, trained reversibly."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

import bdia  # noqa: E402
from test_sequence import drawn_seed, plain, relative  # noqa: E402


def small(dropout=0.1, layers=4):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61,
        n_positions=24,
        n_embd=32,
        n_layer=layers,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=0.0,
        attn_pdrop=dropout,
    )
    return transformers.GPT2LMHeadModel(config).train()


def batch(samples=6, tokens=20):
    """Counting in different steps, padded on the right by a varying length."""
    step, start = torch.randint(1, 5, (samples, 1)), torch.randint(0, 61, (samples, 1))
    ids = (start + step * torch.arange(tokens)) % 61
    mask = (torch.arange(tokens) < torch.randint(tokens // 2, tokens + 1, (samples, 1))).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("chunk", [None, 2])
def test_gradients_are_those_of_plain_autograd_in_double(chunk):
    model = small(dropout=0.0).double()
    data = batch()
    reference = copy.deepcopy(model)
    bdia.reversible_gpt2(model, chunk=chunk, verify=True)
    torch.manual_seed(4)
    loss = model(**data).loss
    loss.backward()
    assert model.transformer.h.mismatches == 0

    # The reference: the model's loop runs one "block", which is the recurrence over the real ones.
    seed, real = drawn_seed(4), list(reference.transformer.h)

    class All(torch.nn.Module):
        def forward(self, x, *args, **kwargs):
            kwargs["use_cache"] = False
            args = (None, *args[1:])
            hs = [lambda y, b=b: b(y, *args, **kwargs) - y for b in real]
            return plain(hs, x, bdia.signs(seed, len(x), len(real)), 0.5, 14)

    reference.transformer.h = torch.nn.ModuleList([All()])
    expected = reference(**data).loss
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-12
    assert relative(model.transformer.wte.weight.grad, reference.transformer.wte.weight.grad) < 1e-9
    for block, other in zip(model.transformer.h._modules.values(), real, strict=True):
        for (name, p), q in zip(block.named_parameters(), other.parameters(), strict=True):
            assert relative(p.grad, q.grad) < 1e-9, name


def test_fine_tuning_works_and_saves_a_standard_gpt2(tmp_path):
    model = bdia.reversible_gpt2(small(), verify=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    torch.manual_seed(1)
    losses = []
    for _ in range(120):
        loss = model(**batch()).loss
        loss.backward()
        assert model.transformer.h.mismatches == 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]

    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert type(again.transformer.h) is torch.nn.ModuleList
    model.eval()
    data = batch()
    with torch.no_grad():
        assert torch.equal(model(**data).logits, again(**data).logits)
        # The plain network has learned it too: that is what inference runs.
        assert again(**data).loss.item() < 0.6 * losses[0]
        # Caches and generation are Hugging Face's own in eval().
        prompt = data["input_ids"][:1, :8]
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(prompt, **settings), again.generate(prompt, **settings))


def test_only_gpt2_is_taken():
    with pytest.raises(bdia.SettingError, match="GPT-2"):
        bdia.reversible_gpt2(torch.nn.Linear(2, 2))
