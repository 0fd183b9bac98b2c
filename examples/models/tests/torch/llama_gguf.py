"""GGUF files of two tiny models, and blocks of every type with the values that the package gguf gives them.

Writes ../data/llama/llama_biases.gguf and gemma3.gguf from the models that llama_hf.py has written, as llama.cpp's
converter would: rows of queries and keys of Llama in the order of neighbours, 1 added to Gemma's norms; and
../data/llama/blocks.safetensors: NAME.bytes (one i32 a byte) and NAME.values (f32).
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent.parent / "data" / "llama"
KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
# Where blocks have their 16-bit scales, in bytes.
SCALES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def blocks():
    out, random = {}, np.random.default_rng(3)
    for name in KINDS:
        kind = gguf.GGMLQuantizationType[name]
        per, size = gguf.GGML_QUANT_SIZES[kind]
        n = 4 if per > 1 else 64
        if name in SCALES:
            raw = random.integers(0, 256, (n, size), dtype=np.uint8)
            for at in SCALES[name]:
                scale = random.normal(0, 1, n).astype(np.float16)
                raw[:, at : at + 2] = scale.view(np.uint8).reshape(n, 2)
        else:
            raw = gguf.quants.quantize(random.normal(0, 1, (n, 1)).astype(np.float32), kind).view(np.uint8)
        values = gguf.quants.dequantize(raw.reshape(1, -1), kind)
        out[f"{name}.bytes"] = torch.tensor(raw.reshape(-1).astype(np.int32))
        out[f"{name}.values"] = torch.tensor(values.reshape(-1).astype(np.float32))
    save_file(out, DATA / "blocks.safetensors")


def permuted(w, heads):
    """llama.cpp's LlamaModel.permute."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write(name, architecture):
    config = json.loads((DATA / name / "config.json").read_text())
    tensors = {k: v.numpy() for k, v in load_file(DATA / name / "model.safetensors").items()}
    writer = gguf.GGUFWriter(DATA / f"{name}.gguf", architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    writer.add_token_list([f"<{i}>".encode() for i in range(config["vocab_size"])])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    arch = gguf.MODEL_ARCH.LLAMA if architecture == "llama" else gguf.MODEL_ARCH.GEMMA3
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for full, values in tensors.items():
        if architecture == "llama" and ".q_proj." in full:
            values = permuted(values, config["num_attention_heads"])
        if architecture == "llama" and ".k_proj." in full:
            values = permuted(values, config["num_key_value_heads"])
        if architecture == "gemma3" and full.endswith("norm.weight"):
            values = values + 1
        base, kind = full.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(base)}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    blocks()
    write("llama_biases", "llama")
    write("gemma3", "gemma3")
