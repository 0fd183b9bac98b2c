"""One masked fine-tuning step of `../data/gpt2/hf_tied`, all parameters and LoRA, by transformers and PEFT in float64.

B samples of a prompt, a completion and padding; T tokens with the last one, which is only a target. R = 2r: PEFT has one
adapter of c_attn where the program has one of the queries and one of the values.
"""

import argparse
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything here is local

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2LMHeadModel

import gpt2_f64

V, D, K, B, T = 61, 24, 3, 3, 16
RANK, ALPHA = 4, 32
PROMPTS, LENGTHS = [5, 2, 9], [16, 9, 13]
IGNORE = -100
STEPS, LR, DECAY = 6, 3e-3, 0.1


def base(directory):
    return GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").double().eval()


def batch():
    """input_ids, attention_mask and labels as transformers has them: labels are not shifted."""
    gen = torch.Generator().manual_seed(8)
    ids = torch.randint(V, (B, T), generator=gen)
    mask, labels = torch.ones_like(ids), ids.clone()
    for i, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS)):
        ids[i, length:], mask[i, length:], labels[i, length:], labels[i, :prompt] = 0, 0, IGNORE, IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_of(model, data):
    """The mean over the labels; transformers has the same formula, but in float32."""
    result = model(**data)
    loss = F.cross_entropy(result.logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten(), ignore_index=IGNORE)
    assert loss.dtype == torch.float64 and abs(float(loss - result.loss)) < 1e-6
    return loss, result.logits.detach()


def lora_config(rank, alpha):
    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=["c_attn"],
                      fan_in_fan_out=True, bias="none")


def parts():
    """Where B of the one adapter belongs to an adapter of the queries or of the values, [3 d, R]."""
    where = torch.zeros(3 * D, 2 * RANK)
    where[:D, :RANK], where[2 * D:, RANK:] = 1, 1
    return where


def adapted(directory, rank, alpha, where, seed):
    model = get_peft_model(base(directory), lora_config(rank, alpha), autocast_adapter_dtype=False).double().eval()
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:  # representable in f32, as the files have them
                p.copy_((0.2 * torch.randn(p.shape, generator=gen)).double())
                if "lora_B" in name:
                    p *= where
    return model


def write_adapter(directory, model):
    shutil.rmtree(directory, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = "hf_tied"
    model.float().save_pretrained(directory)
    model.double()
    (directory / "README.md").unlink(missing_ok=True)
    for path in directory.iterdir():
        path.chmod(0o644)


def plain(name):
    return name.removeprefix("base_model.model.").removeprefix("transformer.").removesuffix(".default.weight")


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "../data/gpt2")
    out = args.parse_args().out
    source = Path(__file__).resolve().parent / "../data/gpt2/hf_tied"
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    data = batch()
    tensors = {"input_ids": data["input_ids"].int(), "labels": data["labels"].int()}

    full = base(source)
    loss, _ = loss_of(full, data)
    loss.backward()
    tensors["full.loss"] = loss.detach().view(1)
    # In f32: they are as many as the weights.
    tensors |= {f"full.grad.{plain(n)}": p.grad.float() for n, p in full.named_parameters()}

    where = parts()
    model = adapted(source, 2 * RANK, 2 * ALPHA, where, seed=9)
    write_adapter(out / "peft_qv", model)
    loss, logits = loss_of(model, data)
    loss.backward()
    tensors |= {"lora.loss": loss.detach().view(1), "lora.logits": logits}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * K and all(bool((p.grad != 0).any()) for p in trained.values())
    tensors |= {f"lora.grad.{plain(n)}": p.grad.clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, _ = loss_of(model, data)
        loss.backward()
        for name, p in trained.items():
            if "lora_B" in name:  # two adapters, not one
                p.grad *= where
        losses.append(loss.detach())
        optimizer.step()
    tensors["lora.losses"] = torch.stack(losses)
    assert losses[-1] < losses[0]

    # An adapter that is not ours: another rank, and B full.
    model = adapted(source, 3, 5, torch.ones(3 * D, 3), seed=10)
    write_adapter(out / "peft_full", model)
    tensors["other.logits"] = PeftModel.from_pretrained(base(source), out / "peft_full")(**data).logits.detach()
    assert torch.allclose(tensors["other.logits"], model(**data).logits, atol=1e-12)

    gpt2_f64.save_state(out / "finetune.safetensors", tensors, {
        "rank": RANK, "alpha": ALPHA, "lr": LR, "weight_decay": DECAY, "torch": torch.__version__,
        "transformers": transformers.__version__, "peft": peft.__version__})
    for path in sorted([out / "finetune.safetensors", *out.glob("peft_*/*")]):
        print(f"{str(path.relative_to(out)):45} {path.stat().st_size:7} bytes")


if __name__ == "__main__":
    main()
