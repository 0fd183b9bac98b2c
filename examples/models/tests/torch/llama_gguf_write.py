"""GGUF files that the Rust tests write, against the packages gguf, transformers and llama-cpp-python.

    BDIA_GGUF_OUT=DIR cargo test --release -p bdia-models --test models llama_gguf_write
    python -B llama_gguf_write.py values DIR   ->  ../data/llama/q8_0.safetensors, from DIR/wide.f32.gguf
    python -B llama_gguf_write.py gguf DIR     every file by gguf.GGUFReader
    python -B llama_gguf_write.py hf DIR       logits by transformers, of the architectures that it reads
    python -B llama_gguf_write.py llama DIR    logits, and 24 greedy tokens of SmolLM2, by llama.cpp

q8_0.safetensors has values (f32) with their blocks (bytes; bytes_q4_0 of a 16th of them; one i32 a byte), the digest (FNV-1a, two i32) of the
tensors of DIR/wide.f32.gguf as the package quantizes them, and the divisors of the angles of Llama 3.1 and 3.2 by the
formulas of llama.cpp's converter.
"""

import ctypes
import json
import math
import sys
from pathlib import Path

import gguf
import numpy as np

DATA = Path(__file__).parent.parent / "data" / "llama"
Q4_0, Q8_0, F16, F32 = (gguf.GGMLQuantizationType[n] for n in ("Q4_0", "Q8_0", "F16", "F32"))
SUFFIXES = ("f32", "f16", "q8_0")
# What transformers 5.24 does not take from a file, or does not read.
NOT_BY_HF = {
    "llama_biases": "biases",
    "llama_linear": "scaling of positions",
    "llama_scaled": "scaling of positions",
    "mistral": "a network named mistral, by a name of ours",
    "qwen3": "the width of a head other than 128",
    "gemma3": "the width of a head other than 256 in the scores' factor, and the period of the windows",
    "smollm3": "the architecture",
}


def values():
    """Blocks of many sizes, with ties, zeros, and scales at the ends of 16 bits."""
    random = np.random.default_rng(5)
    rows = [random.normal(0, 1, (32, 32)) * 10.0 ** random.integers(-6, 5, (32, 1))]
    rows.append(random.integers(-254, 255, (8, 32)) / 2)  # ties of rounding
    rows.append(np.concatenate([np.full((4, 1), 127.0), random.integers(-253, 254, (4, 31)) / 2], 1))
    rows.append(np.zeros((1, 32)))
    rows.append(-np.zeros((1, 32)))
    rows.append(np.eye(2, 32) * [[3.0], [-5e-7]])
    rows.append(random.uniform(-1, 1, (8, 32)) * 2.0 ** random.integers(-24, -12, (8, 1)) * 127)  # subnormal scales
    rows.append(random.uniform(-1, 1, (2, 32)) * 65500 * 127)
    return np.concatenate(rows).astype(np.float32)


def divisors(factor, theta=5e5, dim=64):
    import torch

    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    low, high, context, out = 1.0, 4.0, 8192, []
    for freq in freqs:
        wave = 2 * math.pi / freq
        if wave < context / high:
            out.append(1)
        elif wave > context / low:
            out.append(factor)
        else:
            smooth = (context / wave - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(out, dtype=torch.float32)


def stored(name, x, kind):
    """A tensor of a file in 32 bits as one of another kind has it, as llama.cpp's converter decides."""
    if kind == F32 or x.ndim < 2:
        return F32, x
    if kind == Q8_0 and x.shape[-1] % 32 == 0:
        return Q8_0, gguf.quants.quantize(x, Q8_0)
    return F16, x.astype(np.float16)


def make(folder):
    import torch
    from safetensors.torch import save_file

    x = values()
    blocks = lambda x, kind: torch.tensor(gguf.quants.quantize(x, kind).reshape(-1).astype(np.int32))
    # The largest are 127 times the largest number of 16 bits, which 4 bits do not reach.
    out = {"values": torch.tensor(x), "bytes": blocks(x, Q8_0), "bytes_q4_0": blocks(x / 16, Q4_0)}
    digest = 0xCBF29CE484222325
    for t in gguf.GGUFReader(folder / "wide.f32.gguf").tensors:
        _, data = stored(t.name, t.data, Q8_0)
        data = data.tobytes()
        for b in data + bytes(-len(data) % 32):
            digest = ((digest ^ b) * 0x100000001B3) % 2**64
    out["digest"] = torch.tensor(np.array([digest], np.uint64).view(np.int32).copy())
    out |= {"divisors.8": divisors(8.0), "divisors.32": divisors(32.0)}
    save_file(out, DATA / "q8_0.safetensors")


def check(folder):
    """Every tensor of F16 and Q8_0 has the bytes that the package makes of that of F32."""
    for path in sorted(folder.glob("*.f32.gguf")):
        base = path.name.removesuffix(".f32.gguf")
        whole = {t.name: t for t in gguf.GGUFReader(path).tensors}
        for suffix, kind in zip(SUFFIXES, (F32, F16, Q8_0)):
            reader = gguf.GGUFReader(folder / f"{base}.{suffix}.gguf")
            assert reader.fields["GGUF.version"].contents() == 3 and reader.alignment == 32
            found = {t.name: t for t in reader.tensors}
            assert found.keys() == whole.keys(), base
            for name, t in found.items():
                x = whole[name].data
                expected, data = stored(name, x, kind)
                assert t.tensor_type == expected and np.array_equal(t.shape, whole[name].shape), name
                assert t.data.tobytes() == data.tobytes(), (base, suffix, name)
            kinds = sorted({t.tensor_type.name for t in reader.tensors})
            print(f"{base}.{suffix}: {len(found)} tensors ({', '.join(kinds)}), {len(reader.fields) - 3} entries, equal")


def against(name, ours, theirs):
    ours, theirs = np.asarray(ours, np.float64).reshape(-1), np.asarray(theirs, np.float64).reshape(-1)
    distance = np.abs(ours - theirs).max() / np.abs(ours).max()
    print(f"{name}: logits differ by {distance:.1e} of the largest")
    # llama.cpp has GELU as a table of 16 bits.
    assert distance < (2e-3 if "gemma3" in name else 1e-5), name


def hf(folder):
    import torch
    from transformers import AutoModelForCausalLM

    for path in sorted(folder.glob("*.json")):
        name = path.stem
        if name.startswith(("smollm2", "real")):
            continue
        if name in NOT_BY_HF:
            print(f"{name}: transformers does not read {NOT_BY_HF[name]}")
            continue
        expected = json.loads(path.read_text())
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"{name}.f32.gguf", dtype=torch.float32)
        with torch.no_grad():
            logits = model.eval()(torch.tensor([expected["tokens"]])).logits[0]
        against(name, expected["logits"], logits.numpy())


def llama(folder):
    import llama_cpp as l

    quiet = l.llama_log_callback(lambda *_: None)
    l.llama_log_set(quiet, ctypes.c_void_p(0))
    l.llama_backend_init()

    def context(path):
        params = l.llama_model_default_params()
        params.n_gpu_layers = 0
        model = l.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            print(f"{path.name}: llama.cpp does not load it")
            return None, None
        params = l.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 64, 64, 1, 1
        params.type_k = params.type_v = 0  # f32
        params.flash_attn_type = 0
        return model, l.llama_init_from_model(model, params)

    def decode(model, ctx, tokens, first, every):
        n = len(tokens)
        batch = l.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, t in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = t, first + i, 1, 0
            batch.logits[i] = every or i == n - 1
        assert l.llama_decode(ctx, batch) == 0
        vocab = l.llama_vocab_n_tokens(l.llama_model_get_vocab(model))
        rows = range(n) if every else [n - 1]
        out = np.stack([np.ctypeslib.as_array(l.llama_get_logits_ith(ctx, i), (vocab,)).copy() for i in rows])
        l.llama_batch_free(batch)
        return out

    def cut(vocab, text):
        data, ids = text.encode(), (ctypes.c_int32 * (len(text.encode()) + 8))()
        n = l.llama_tokenize(vocab, data, len(data), ids, len(ids), True, True)
        return ids[:n]

    files = [folder / f"{who}.vocab.gguf" for who in ("theirs", "ours", "again")]
    if files[0].exists():
        params = l.llama_model_default_params()
        params.vocab_only = True
        models = [l.llama_model_load_from_file(str(f).encode(), params) for f in files]
        vocabs = [l.llama_model_get_vocab(m) for m in models]
        texts = [p.read_text() for p in sorted(DATA.parents[2].glob("**/*.rs")) + sorted(DATA.parents[2].glob("**/*.py"))]
        random = np.random.default_rng(1)
        words = "".join(texts).split(" ") + ["  ", "\n\n", "東京", "Ärger", "<eos>", "▁", "\t\t", "🙂", "\u200b", "ﬁ"]
        texts += [" ".join(random.choice(words, 200)) for _ in range(200)]
        cuts = [[cut(v, t) for v in vocabs] for t in texts]
        for i in (1, 2):
            same = sum(a[0] == a[i] for a in cuts)
            print(f"Gemma's tokenizer: {same} of {len(texts)} texts equal, {sum(len(a[0]) for a in cuts)} tokens")
    for path in sorted(folder.glob("*.json")):
        name = path.stem
        expected = json.loads(path.read_text())
        if "greedy" in expected:
            model, ctx = context(folder / f"{name}.gguf")
            if model:
                tokens, at, found = expected["prompt"], 0, []
                for _ in expected["greedy"]:
                    logits = decode(model, ctx, tokens, at, False)
                    at += len(tokens)
                    tokens = [int(logits[-1].argmax())]
                    found += tokens
                print(f"{name}: {len(found)} greedy tokens,", "equal" if found == expected["greedy"] else f"{found} {expected['greedy']}")
            continue
        model, ctx = context(folder / f"{name}.f32.gguf")
        if model:
            against(name, expected["logits"], decode(model, ctx, expected["tokens"], 0, True))


if __name__ == "__main__":
    {"values": make, "gguf": check, "hf": hf, "llama": llama}[sys.argv[1]](Path(sys.argv[2]))
