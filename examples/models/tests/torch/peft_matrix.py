"""Adapters of every kind that PEFT's LoraConfig describes, on tiny models, and the logits that PEFT gives in float64.

Writes ../data/peft/CASE/: adapter_config.json and adapter_model.safetensors as save_pretrained makes them, and logits of
the batch of the base model's own state in ../data/peft/logits.safetensors.
"""

import argparse
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

DATA = Path(__file__).resolve().parent / "../data"
GPT2, LLAMA = DATA / "gpt2/hf_untied", DATA / "llama/llama_biases"
UNTIED = DATA / "llama/llama"
CASES = {
    "gpt2_full_names": (GPT2, {"target_modules": ["attn.c_attn"]}),
    "gpt2_regex": (GPT2, {"target_modules": r".*\.h\.[02]\.mlp\.c_(fc|proj)"}),
    "gpt2_projections": (GPT2, {"target_modules": ["c_proj", "c_fc"], "use_rslora": True}),
    "gpt2_linear": (GPT2, {"target_modules": "all-linear", "rank_pattern": {"c_fc": 5}}),
    "gpt2_head": (GPT2, {"target_modules": ["lm_head", "transformer.h.1.attn.c_proj"]}),
    "gpt2_blocks": (GPT2, {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
    "llama_linear": (LLAMA, {"target_modules": "all-linear"}),
    "llama_patterns": (
        LLAMA,
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, ".*down_proj": 4},
            "alpha_pattern": {"^model.layers.3.mlp.down_proj": 7, "q_proj": 3},
            "use_rslora": True,
        },
    ),
    "llama_excluded": (LLAMA, {"target_modules": ["v_proj", "o_proj"], "exclude_modules": ["layers.2.self_attn.v_proj"]}),
    "llama_one_block": (LLAMA, {"target_modules": ["gate_proj", "up_proj"], "layers_to_transform": 2}),
    "llama_regex_excluded": (
        UNTIED,
        {"target_modules": r"model\.layers\.\d\.self_attn\.[qkv]_proj", "exclude_modules": r".*\.3\..*"},
    ),
    "llama_head": (UNTIED, {"target_modules": ["lm_head", "k_proj"]}),
}


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--out", type=Path, default=DATA / "peft")
    out = args.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    logits = {}
    for n, (name, (base, settings)) in enumerate(CASES.items()):
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").double()
        gen = torch.Generator().manual_seed(n)
        tokens = torch.randint(model.config.vocab_size, (1, 10), generator=gen)
        config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, bias="none", task_type="CAUSAL_LM", **settings)
        model = get_peft_model(model, config, autocast_adapter_dtype=False).double().eval()
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_" in key:  # representable in f32, as the files have them
                    p.copy_((0.2 * torch.randn(p.shape, generator=gen)).double())
            logits[f"{name}.tokens"] = tokens.int()[0]
            logits[f"{name}.logits"] = model(tokens).logits[0].contiguous()
        model.peft_config["default"].base_model_name_or_path = base.name
        model.float().save_pretrained(out / name)
        (out / name / "README.md").unlink(missing_ok=True)
        for path in (out / name).iterdir():
            path.chmod(0o644)
        print(name, len(load_file(out / name / "adapter_model.safetensors")), float(logits[f"{name}.logits"].abs().mean()))
    save_file(logits, out / "logits.safetensors")


if __name__ == "__main__":
    main()
