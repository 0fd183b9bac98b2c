"""check_ours.py DIR: a run directory written by our program loads in transformers and computes the same logits.

DIR holds config.json, model.safetensors and probe.safetensors with "tokens" int32 [n, T] and "logits" f32 [n, T, V].
If vocab.json and merges.txt are there, the tokenizer is checked too. With --base, DIR holds adapters of that model instead,
and PEFT loads them.
"""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything here is local

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

UNICODE = "Grüße, 東京! naïve café 🦀\n\tdon't  stop — ½ of 1,234"


class Collect(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def require(condition, message):
    if not condition:
        sys.exit(f"FAIL {message}")


def check_model(directory, base, tolerance):
    model, info = GPT2LMHeadModel.from_pretrained(base or directory, dtype=torch.float32, output_loading_info=True,
                                                  ignore_mismatched_sizes=True)  # reported here, like the others
    for what, keys in info.items():  # missing, unexpected and mismatched keys, error messages
        require(not keys, f"{what}: {sorted(map(str, keys))}")
    if base:
        from peft import PeftModel  # not needed otherwise

        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # such as keys that it misses
            model = PeftModel.from_pretrained(model, directory)
    probe = load_file(directory / "probe.safetensors")
    tokens, ours = probe["tokens"].long(), probe["logits"]           # [n, T], [n, T, V]
    require(probe["tokens"].dtype == torch.int32 and ours.dtype == torch.float32, "probe: tokens i32, logits f32")
    with torch.no_grad():
        theirs = model.eval()(tokens).logits
    require(theirs.shape == ours.shape, f"logits: expected {list(theirs.shape)}, found {list(ours.shape)}")
    relative = float((ours - theirs).abs().max() / theirs.abs().max())
    require(relative <= tolerance, f"logits: relative difference {relative:.2e}, allowed {tolerance:.0e}")  # NaN fails
    return f"logits {list(ours.shape)}: relative difference {relative:.2e}"


def check_tokenizer(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.encode("This is some text")
    require(ids == [1212, 318, 617, 2420], f"tokenizer: 'This is some text' gives {ids}")
    back = tokenizer.decode(tokenizer.encode(UNICODE), clean_up_tokenization_spaces=False)
    require(back == UNICODE, f"tokenizer: {UNICODE!r} comes back as {back!r}")
    return "tokenizer agrees"


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("dir", type=Path)
    args.add_argument("--base", type=Path)
    args.add_argument("--tolerance", type=float, default=1e-4)
    args = args.parse_args()
    require(args.dir.is_dir(), f"{args.dir} is not a directory")
    torch.set_num_threads(1)
    logged = Collect()
    logging.getLogger("transformers").addHandler(logged)
    transformers.utils.logging.disable_progress_bar()

    findings = [check_model(args.dir, args.base, args.tolerance)]
    if (args.dir / "vocab.json").exists() and (args.dir / "merges.txt").exists():
        findings.append(check_tokenizer(args.dir))
    require(not logged.messages, f"warnings: {logged.messages}")
    print("ok  " + ", ".join(findings))


if __name__ == "__main__":
    main()
