"""Tiny random models of Llama's family: what transformers and PEFT compute of them, in float64.

Writes ../data/llama/NAME/: config.json and model.safetensors as save_pretrained makes them, and state.safetensors with
tokens, targets, logits, loss, gradients, greedy continuations, and the gradients of LoRA adapters.

transformers computes norms and the angles of rotary positions in float32 whatever the model's type is. Norms are
replaced by the same formulas in the model's type. Angles stay products of float32, as networks are pretrained with,
but frequencies are rounded once from float64 and cosines are taken in float64, so that two programs can agree in all
digits; they are compared with those of transformers first.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

SAMPLES, TOKENS = 2, 12
SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 50.0,
}
CASES = {
    "llama": ("LlamaConfig", {}),
    "llama_biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama_scaled": ("LlamaConfig", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "llama_linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 4}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 4, "query_pre_attn_scalar": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
}
ADAPTED = ("llama_biases", "gemma3")


def frequencies(parameters, dim):
    """Those of one kind of layers, from float64."""
    plain = [parameters["rope_theta"] ** (-2 * i / dim) for i in range(dim // 2)]
    if parameters["rope_type"] == "linear":
        plain = [f / parameters["factor"] for f in plain]
    if parameters["rope_type"] == "llama3":
        factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        for i, f in enumerate(plain):
            wavelength = 2 * math.pi / f
            if wavelength > original / low:
                plain[i] = f / factor
            elif wavelength >= original / high:
                smooth = (original / wavelength - low) / (high - low)
                plain[i] = (1 - smooth) * f / factor + smooth * f
    return torch.tensor(np.array(plain, dtype=np.float64).astype(np.float32))


def in_double(model, config):
    """Norms and positions in the model's type."""

    def norm(self, x):
        eps = getattr(self, "variance_epsilon", None) or self.eps
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return y * (1 + self.weight if "Gemma" in type(self).__name__ else self.weight)

    def rotary(self, x, position_ids, layer_type=None):
        buffer = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        angles = position_ids[:, :, None].float() * getattr(self, buffer).float()[None, None, :]
        angles = torch.cat((angles, angles), dim=-1).double()
        return angles.cos(), angles.sin()

    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            type(module).forward = norm
        if name.endswith("RotaryEmbedding"):
            for buffer in [b for b in dict(module.named_buffers()) if b.endswith("inv_freq") and "original" not in b]:
                kind = buffer.removesuffix("_inv_freq")
                parameters = config.rope_parameters
                parameters = parameters[kind] if kind in parameters else parameters
                theirs, ours = getattr(module, buffer), frequencies(parameters, config.head_dim)
                assert torch.allclose(theirs.float(), ours, rtol=2e-6, atol=0), (buffer, theirs, ours)
                setattr(module, buffer, ours)
            type(module).forward = rotary


def make(name, out):
    kind, settings = CASES[name]
    config = getattr(transformers, kind)(**{**SIZES, **settings})
    config._attn_implementation = "sdpa"
    torch.manual_seed(sum(map(ord, name)))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            # Norms near 1 (Gemma's near 0), all others of a size that matters.
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
            else:
                p.normal_(0, 1.5 / math.sqrt(p.shape[1]))
    model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    model = model.double()
    in_double(model, config)

    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, config.vocab_size, (SAMPLES, TOKENS), generator=generator)
    targets = torch.randint(3, config.vocab_size, (SAMPLES, TOKENS), generator=generator)
    targets[0, :3] = -1

    def loss_of(model):
        logits = model(tokens).logits
        flat = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten().masked_fill(targets.flatten() < 0, -100)
        )
        return logits, flat

    logits, loss = loss_of(model)
    loss.backward()
    state = {"tokens": tokens.int(), "targets": targets.int(), "logits": logits.detach(), "loss": loss.detach()[None]}
    for n, p in model.named_parameters():
        state[f"grad.{n}"] = p.grad.clone()
    with torch.no_grad():
        generated = tokens[:, :5]
        for _ in range(16):
            generated = torch.cat([generated, model(generated).logits[:, -1:].argmax(-1)], dim=1)
    state["generated"] = generated.int()

    if name in ADAPTED:
        model.zero_grad()
        peft = get_peft_model(
            model, LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
        )
        with torch.no_grad():
            for n, p in peft.named_parameters():
                if "lora_" in n:
                    p.normal_(0, 0.4)
        peft = peft.double()
        logits, loss = loss_of(peft)
        loss.backward()
        state["lora.loss"] = loss.detach()[None]
        for n, p in peft.named_parameters():
            if "lora_" in n:
                n = n.removeprefix("base_model.model.").replace(".default.weight", "")
                state[f"adapter.{n}"], state[f"slope.{n}"] = p.detach().clone(), p.grad.clone()
    save_file({k: v.contiguous() for k, v in state.items()}, out / "state.safetensors")
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "data" / "llama")
    parser.add_argument("names", nargs="*", default=list(CASES))
    a = parser.parse_args()
    torch.set_num_threads(1)
    for name in a.names:
        folder = a.out / name
        folder.mkdir(parents=True, exist_ok=True)
        print(name, make(name, folder), json.loads((folder / "config.json").read_text())["model_type"])


if __name__ == "__main__":
    main()
