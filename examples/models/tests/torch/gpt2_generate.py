"""Tokens that transformers' `generate` gives for a small GPT-2: greedy and beam search.

Writes a model directory with `generate.json` beside it: prompts of different lengths, and for every setting what follows each
of them, without the end token. A setting is written only if four computations agree, so that no rounding decides a token:
float32 and float64, prompts one by one and all together (padded on the left).
"""

import argparse
import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything here is local

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

V, POSITIONS, D, K, H = 61, 48, 24, 3, 3
END, TOKENS = V - 1, 20
# Of the last prompt every continuation runs into the rule against repetition.
LENGTHS = [1, 5, 3, 12, 8, 20]


def model():
    config = GPT2Config(vocab_size=V, n_positions=POSITIONS, n_embd=D, n_layer=K, n_head=H, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0, bos_token_id=END, eos_token_id=END, attn_implementation="eager")
    torch.manual_seed(11)
    m = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in m.parameters():
            p += (0.2 if p.dim() >= 2 else 0.1) * torch.randn(p.shape)
    return m


def prompts():
    gen = torch.Generator().manual_seed(12)
    out = [torch.randint(END, (n,), generator=gen).tolist() for n in LENGTHS]
    out[-1] = (out[-1][:4] * 5)[:LENGTHS[-1]]
    return out


def settings():
    yield {"beams": 1, "length_penalty": 1.0, "no_repeat": 0}
    for n in (1, 2, 3):
        yield {"beams": 1, "length_penalty": 1.0, "no_repeat": n}
    for beams in (2, 3, 5, 10):
        for penalty in (0.0, 0.9, 1.0, 2.5, -1.0):
            for n in (0, 2, 4):
                yield {"beams": beams, "length_penalty": penalty, "no_repeat": n}


def follow(m, batch, s):
    """What follows each prompt of a batch, which is padded on the left."""
    longest = max(map(len, batch))
    ids = torch.tensor([[END] * (longest - len(p)) + p for p in batch])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
    found = m.generate(ids, attention_mask=mask, do_sample=False, num_beams=s["beams"], length_penalty=s["length_penalty"],
                       no_repeat_ngram_size=s["no_repeat"], early_stopping=False, max_new_tokens=TOKENS,
                       pad_token_id=END)[:, longest:].tolist()
    return [f[:f.index(END)] if END in f else f for f in found]


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "../data/gpt2")
    out = args.parse_args().out / "hf_generate"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    m, batch = model(), prompts()
    shutil.rmtree(out, ignore_errors=True)
    m.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)
    double = model().double()
    cases, left_out = [], 0
    for s in settings():
        ones = [follow(m, [p], s)[0] for p in batch]
        same = ones == [follow(double, [p], s)[0] for p in batch]
        # Padding is the end token, which a rule for single tokens would forbid.
        if s["no_repeat"] != 1:
            same = same and ones == follow(m, batch, s) == follow(double, batch, s)
        if same:
            cases.append(s | {"follow": ones})
        else:
            left_out += 1
    lengths = [len(f) for c in cases for f in c["follow"]]
    ended = sum(n < TOKENS for n in lengths)
    print(f"{len(cases)} settings, {left_out} left out; {ended} of {len(lengths)} texts end before {TOKENS} tokens")
    assert left_out <= 4 and len(lengths) // 10 < ended < len(lengths)
    assert len({json.dumps(c["follow"]) for c in cases}) > len(cases) // 3
    lines = ",\n".join("  " + json.dumps(c) for c in cases)
    (out / "generate.json").write_text(
        f'{{"transformers": "{transformers.__version__}", "end": {END}, "tokens": {TOKENS},\n "prompts": {json.dumps(batch)},\n'
        f' "cases": [\n{lines}\n]}}\n')
    for path in sorted(out.iterdir()):
        print(f"{path.name:45} {path.stat().st_size:7} bytes")


if __name__ == "__main__":
    main()
