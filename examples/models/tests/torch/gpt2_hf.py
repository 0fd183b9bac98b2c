"""Small GPT-2 directories written by transformers, each with a state file of what the model must compute.

Also checks the reference in gpt2_f64.py against transformers, in float64.
B samples, T tokens, V words.
"""

import argparse
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything here is local

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import gpt2_f64

V, POSITIONS, D, K, H, B, T = 61, 16, 24, 3, 3, 2, 16
IGNORE = -1


def config(layers=K, tied=True):
    return GPT2Config(vocab_size=V, n_positions=POSITIONS, n_embd=D, n_layer=layers, n_head=H,
                      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=V - 1, eos_token_id=V - 1,
                      tie_word_embeddings=tied, attn_implementation="eager")


def perturbed_model(tied, seed):
    """Every parameter away from its initial value, so that each of them matters."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config(tied=tied)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += (0.2 if p.dim() >= 2 else 0.1) * torch.randn(p.shape)
    return model


def batch(seed):
    """tokens, targets: [B, T]; the targets are not the shifted tokens but random, some are masked."""
    gen = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (B, T), generator=gen)
    targets = torch.randint(V, (B, T), generator=gen)
    targets[torch.rand(B, T, generator=gen) < 0.25] = IGNORE
    return tokens, targets


def mean_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def write_state(directory, model, gradients):
    """state.safetensors: tokens, targets, logits [B, T, V], loss [1] and, where asked, the gradients."""
    tokens, targets = batch(seed=4)
    logits = model(tokens).logits
    assert logits.dtype == torch.float32
    loss = mean_loss(logits, targets)
    tensors = {"tokens": tokens.int(), "targets": targets.int(), "logits": logits.detach(), "loss": loss.detach().view(1)}
    if gradients:
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters()}  # a tied head is wte and appears once
        assert all(bool((g != 0).any()) for g in grads.values())
        tensors |= {f"grad.{n}": g for n, g in grads.items()}
    gpt2_f64.save_state(directory / "state.safetensors", tensors, {
        "batch": B, "seq_len": T, "ignore_index": IGNORE,
        "torch": torch.__version__, "transformers": transformers.__version__})
    return logits.detach()


def write_model(directory, model, **options):
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, **options)
    for path in directory.iterdir():
        path.chmod(0o644)  # the same for all files


def reload(directory):
    """The stored weights, in float32."""
    model, info = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager",
                                                  output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def check_reference():
    """gpt2_f64.Standard and transformers agree in logits, loss and gradients."""
    p = gpt2_f64.start_parameters()
    tokens, targets = gpt2_f64.batch()
    model = GPT2LMHeadModel(config(layers=gpt2_f64.K)).double().eval()
    missing, unexpected = model.transformer.load_state_dict(p, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    model.tie_weights()
    logits = model(tokens).logits
    loss = mean_loss(logits, targets)
    loss.backward()
    grads = {n.removeprefix("transformer."): q.grad for n, q in model.named_parameters()}

    ours_logits, ours_loss, ours_grads = gpt2_f64.evaluate(gpt2_f64.Standard(), p, tokens, targets)
    assert grads.keys() == ours_grads.keys()
    difference = {"logits": float((logits.detach() - ours_logits).abs().max()), "loss": abs(float(loss.detach() - ours_loss)),
                  "gradients": gpt2_f64.largest_difference(grads, ours_grads)}
    print("gpt2_f64 against transformers in float64, largest differences:",
          ", ".join(f"{n} {d:.1e}" for n, d in difference.items()))
    assert max(difference.values()) < 1e-13


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "../data/gpt2")
    out = args.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    check_reference()

    tied = perturbed_model(tied=True, seed=5)
    write_model(out / "hf_tied", tied)
    expected = write_state(out / "hf_tied", reload(out / "hf_tied"), gradients=True)
    assert torch.equal(expected, tied(batch(seed=4)[0]).logits)

    write_model(out / "hf_sharded", tied, max_shard_size="40KB")
    assert torch.equal(expected, write_state(out / "hf_sharded", reload(out / "hf_sharded"), gradients=False))
    shards = sorted((out / "hf_sharded").glob("model-*.safetensors"))
    assert 2 <= len(shards) <= 4 and (out / "hf_sharded/model.safetensors.index.json").exists(), shards

    for name, dtype, tolerance in (("hf_f16", torch.float16, 5e-3), ("hf_bf16", torch.bfloat16, 5e-2)):
        rounded = perturbed_model(tied=True, seed=5).to(dtype)
        write_model(out / name, rounded)
        assert all(t.dtype == dtype for t in load_file(out / name / "model.safetensors").values())
        logits = write_state(out / name, reload(out / name), gradients=False)
        error = float((logits - expected).abs().max() / expected.abs().max())
        print(f"{name}: logits differ from those of the float32 weights by {error:.1e} of the largest")
        assert 0 < error < tolerance

    untied = perturbed_model(tied=False, seed=6)
    write_model(out / "hf_untied", untied)
    assert "lm_head.weight" in load_file(out / "hf_untied/model.safetensors")
    assert "lm_head.weight" not in load_file(out / "hf_tied/model.safetensors")
    write_state(out / "hf_untied", reload(out / "hf_untied"), gradients=True)

    for path in sorted(out.glob("hf_*/*")):
        print(f"{str(path.relative_to(out)):45} {path.stat().st_size:7} bytes")
        assert path.stat().st_size < 150_000


if __name__ == "__main__":
    main()
