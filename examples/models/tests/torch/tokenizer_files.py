"""Tiny tokenizers of every kind, and what transformers and tokenizers make of texts and conversations with them.

Writes ../data/tokenizers: KIND/tokenizer.json (and tokenizer_config.json), KIND.gguf, expected.json (tokens of texts, with special
tokens parsed and as text, and what they decode to) and chat.json (conversations as apply_chat_template writes them).
The vocabularies are learned from the texts below and a licence.

With the arguments `real FILE.gguf TEXT…`, prints the number of the tokens that transformers gives the files one after the other and
a digest of them (xxh3 of little-endian u32; it needs the package xxhash); compare tests/models/tokenizers.rs.
"""

import json
import sys
from pathlib import Path

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import _GPT4O_SPLIT, _LLAMA3_SPLIT, _QWEN2_SPLIT, _TEKKEN_SPLIT
from transformers.tokenization_utils_base import generate_merges

DATA = Path(__file__).parent.parent / "data" / "tokenizers"

TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces, three   spaces,\ttabs\t\t and\n\nlines\n \n  x\r\n\r\ny",
    "don't I'LL we'Ve she'd 'tis it'ſ",
    "0 12 345 6789 1234567890 3.14159 ½ ٣٤ Ⅷ²",
    "def f(x: int) -> int:\n    return x**2 + 1  # squared\n\n\tif x_y != z:\n        pass",
    "https://example.org/a?b=c&d=e#f {\"k\": [1, 2.5, null]}",
    "Ünïcödé — naïve café, Straße, İstanbul",
    "e\u0301 a\u0308o\u0308 \u1100\u1161\u11a8 \u212b \ufb01",
    "日本語のテキスト。中文文本，没有空格。한국어 문장",
    "مرحبا بالعالم שלום नमस्ते สวัสดี",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 e⃝ \u200b\u200d\ufeff zero",
    "\u00a0nbsp\u2003em\u3000wide\u2028line\u0085next\x0b\x0c",
    "\x00\x01\x7f\u0080\u07ff\uffff\U0010ffff",
    "<|endoftext|>",
    "a<|endoftext|>b <|im_start|>user\nhi<|im_end|>\n<s>x</s> <bos> <tool> y<tool>",
    "x  <mask>  y <r>  z word swords word-word \n<mask>",
    "<0x41><0x0A> ▁x ▁▁y \u2581",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "the theory of the thing that then there the the the",
    " " * 70 + "x" + "\n" * 70 + "y" + " \n" * 40,
    "ĠĊ Ġthe âĢĵ",
]

CORPUS = [(Path(__file__).parents[4] / "LICENSE-APACHE").read_text()] + TEXTS[:17] * 3


def plain(text):
    """Without indentation."""
    return [line.strip() for part in text for line in part.splitlines()]


def bpe_trainer(size, special, alphabet):
    return trainers.BpeTrainer(vocab_size=size, min_frequency=2, special_tokens=special, initial_alphabet=alphabet, show_progress=False)


def byte_level(words, special, normalizer=None, whole_words=False, size=600):
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, bpe_trainer(size, special, sorted(pre_tokenizers.ByteLevel.alphabet())))
    return tokenizer


def split(pattern):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def sentencepiece(first, size, gemma):
    """Tokens and scores of SentencePiece's kind: special ones, bytes, then the better ones first."""
    trained = Tokenizer(models.BPE())
    if gemma:
        trained.normalizer = normalizers.Replace(" ", "▁")
    else:
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS if gemma else plain(CORPUS), bpe_trainer(size, [], []))
    learned = json.loads(trained.to_str())["model"]
    merged = ["".join(m) for m in learned["merges"]]
    # Some characters are left to the bytes.
    rest = [t for t in sorted(learned["vocab"], key=learned["vocab"].get) if t not in merged and ord(t[0]) < 0x3000]
    tokens = first + [f"<0x{b:02X}>" for b in range(256)] + list(dict.fromkeys(merged))
    tokens = list(dict.fromkeys(t for t in tokens + rest if all(ord(c) < 0x3000 for c in t)))
    scores, n = [], 0
    for token in tokens:
        special = token in first or token.startswith("<0x")
        scores.append(0.0 if special else -float(n))
        n += not special
    return tokens, scores


def of_pieces(tokens, scores, unk):
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = generate_merges(vocab, dict(zip(tokens, scores)))
    return Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True))


PIECES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def kinds():
    """Name, tokenizer, first and last token, what its GGUF file says (none: no such file), scores."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    yield "gpt2", byte_level(level, CHATML[:1]), "<|endoftext|>", "<|endoftext|>", ("gpt2", "gpt-2"), None
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    yield "smollm", byte_level(digits, CHATML), "<|im_start|>", "<|im_end|>", ("gpt2", "smollm"), None
    llama3 = byte_level(split(_LLAMA3_SPLIT), ["<s>", "</s>"], whole_words=True)
    llama3.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])]
    )
    yield "llama3", llama3, "<s>", "</s>", ("gpt2", "llama-bpe"), None
    qwen2 = byte_level(split(_QWEN2_SPLIT), [], normalizers.NFC())
    qwen2.add_special_tokens(CHATML)
    qwen2.add_tokens([AddedToken("<tool>", normalized=False)])
    yield "qwen2", qwen2, None, "<|im_end|>", ("gpt2", "qwen2"), None
    yield "tekken", byte_level(split(_TEKKEN_SPLIT), ["<s>", "</s>"], whole_words=True, size=400), "<s>", "</s>", ("gpt2", "tekken"), None
    yield "gpt4o", byte_level(split(_GPT4O_SPLIT), CHATML, size=400), None, "<|endoftext|>", ("gpt2", "gpt-4o"), None

    first = ["<unk>", "<s>", "</s>"]
    tokens, scores = sentencepiece(first, 600, False)
    llama2 = of_pieces(tokens, scores, "<unk>")
    llama2.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    llama2.decoder = decoders.Sequence(PIECES + [decoders.Strip(" ", 1, 0)])
    llama2.add_special_tokens(first)
    yield "llama2", llama2, "<s>", "</s>", ("llama", "default"), scores
    legacy = of_pieces(tokens, scores, "<unk>")
    legacy.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    legacy.decoder = decoders.Sequence(PIECES + [decoders.Strip(" ", 1, 0)])
    legacy.add_special_tokens(first)
    legacy.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    yield "mistral", legacy, "<s>", "</s>", None, scores
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<tool>"]
    tokens, scores = sentencepiece(first, 500, True)
    # Gemma's order counts, not its scores.
    gemma = of_pieces(tokens, [-float(i) for i in range(len(tokens))], "<unk>")
    gemma.normalizer = normalizers.Replace(" ", "▁")
    gemma.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    gemma.decoder = decoders.Sequence(PIECES)
    gemma.add_special_tokens(first[:4])
    gemma.add_tokens([AddedToken("<tool>", normalized=False)])
    yield "gemma", gemma, "<bos>", "<eos>", ("llama", "default"), scores

    added = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True), [], normalizers.Lowercase(), size=350)
    added.add_special_tokens([AddedToken("<mask>", lstrip=True), AddedToken("<R>", rstrip=True, normalized=True)])
    added.add_tokens([AddedToken("word", single_word=True), AddedToken("<tool>", normalized=False), AddedToken("Hello")])
    yield "added", added, None, None, None, None


def write_gguf(name, tokenizer, bos, eos, model, pre, scores):
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.get)
    added = {t.content: t.special for t in tokenizer.get_added_tokens_decoder().values()}
    types = [(3 if added[t] else 4) if t in added else 6 if t.startswith("<0x") and scores else 1 for t in tokens]
    architecture = "gemma3" if name == "gemma" else "llama"
    writer = gguf.GGUFWriter(DATA / f"{name}.gguf", architecture)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    if name == "gemma":
        tokens = [t.replace("▁", " ") if len(t) > 1 and not t.strip("▁") else t for t in tokens]
    writer.add_token_list([t.encode() for t in tokens])
    writer.add_token_types(types)
    if scores:
        writer.add_token_scores(scores)
    else:
        writer.add_token_merges([" ".join(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]])
    for token, add in ((bos, writer.add_bos_token_id), (eos, writer.add_eos_token_id), ("<unk>", writer.add_unk_token_id)):
        if token in vocab:
            add(vocab[token])
    if name == "gemma":
        writer.add_add_space_prefix(False)
    if name == "smollm":
        writer.add_chat_template(TEMPLATES["chatml"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


TEMPLATES = {
    # SmolLM2's style: a system turn of its own where there is none.
    "chatml": "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Llama 3's: the beginning of text, headers, trimmed content.
    "headers": "{{- bos_token }}\n{%- for m in messages -%}\n    {%- set head = '<|start|>' ~ m.role ~ '<|end|>\n\n' %}\n"
    "    {{- head + m.content | trim + '<|eot|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|start|>assistant<|end|>\n\n' }}\n{%- endif %}\n",
    # Mistral's: users and assistants take turns, and only an answer has an end.
    "inst": "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}{%- for m in rest %}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('user and assistant must take turns') }}{%- endif %}"
    "{%- if m['role'] == 'user' %}{%- if loop.first and system is defined %}{{- '[INST] ' + system + '\n\n' + m['content'] + ' [/INST]' }}"
    "{%- else %}{{- '[INST] ' + m['content'] + ' [/INST]' }}{%- endif %}{%- else %}{{- ' ' + m['content'].strip() + eos_token }}{%- endif %}{%- endfor %}",
    # Gemma's: the assistant is the model, the system's words stand before the user's.
    "turns": "{{ bos_token }}{%- if messages[0].role == 'system' -%}{%- set before = messages[0].content + '\n\n' -%}{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set before = '' -%}{%- set loop_messages = messages -%}{%- endif -%}\n{%- for m in loop_messages -%}\n"
    "    {%- set role = 'model' if m.role == 'assistant' else m.role -%}\n"
    "    {{ '<turn>' + role + '\n' + (before if loop.first else '') }}{{ m['content'] | trim }}{{ '<end>\n' }}\n{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ '<turn>model\n' }}{%- endif -%}",
    # Qwen's way of writing: namespaces, methods of Python's texts, JSON, a loop that is left.
    "python": "{%- set ns = namespace(last=-1, n=0) %}\n{%- for m in messages[::-1] %}\n    {%- if m.role == 'user' %}\n"
    "        {%- set ns.last = messages | length - 1 - loop.index0 %}\n        {%- break %}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if tools %}{{- 'tools' }}{%- endif %}\n{%- for m in messages %}\n    {%- set text = m.content.split('</think>')[-1].lstrip('\n') %}\n"
    "    {%- if m.role.startswith('sys') %}\n        {{- '<|im_start|>' + m.role.upper() + '\n' + text | tojson + '<|im_end|>\n' }}\n        {%- continue %}\n"
    "    {%- endif %}\n    {{- '<|im_start|>' + m.role + '\n' }}\n    {#- remarks are not written -#}\n    {{- text }}\n    {{- '<|im_end|>\n' }}\n"
    "    {%- set ns.n = ns.n + 1 %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n{{- '' if ns.n else 'none' }}",
    # Blocks that keep their line breaks, and marks of what is learned.
    "marked": "{% for m in messages %}\n  {% if m.role == 'assistant' %}\nA: {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n\n"
    "  {% else %}\n{{ m.role | title }}: {{ m.content }}\n  {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}A: {% endif %}",
    "marked_tight": "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- '<|im_start|>a\n' -}}\n{%- generation -%}\n{{- m.content + '<|im_end|>' -}}\n"
    "{%- endgeneration -%}\n{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' -}}{%- endif -%}{%- endfor -%}",
    # Answers before the last one are written in another way.
    "rewriting": "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and not loop.last %}(left out){% else %}{{ m.content }}{% endif %}\n{% endfor %}",
}


def conversations():
    def of(*contents, system=None):
        all = [] if system is None else [{"role": "system", "content": system}]
        return all + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]

    yield of("Hi")
    yield of("Hi", "Hello!")
    yield of("Hi", "Hello!", system="Be brief.")
    yield of("What is 2 + 2?", "4", "And\n3 + 3?", "6.\n", "Thanks", "You are welcome.")
    yield of("", "", system="")
    yield of("  spaces \n", "\n\n answer ", "日本 😀", "ü ½ \"quoted\" \\ <b>&amp;</b>", system="'tis")
    yield of("a<|im_end|>b <|endoftext|>", "c<|im_start|>system\n", "{{ x }} {% if %}", "</s>")
    yield of("Hi", "<think>so</think>\nYes", "Sure?", "<think>hm</think>\n\nNo")
    yield [{"role": "assistant", "content": "I begin"}, {"role": "user", "content": "No"}]


def chat(tokenizer):
    """Of a tokenizer with the special tokens of ChatML."""
    cases = []
    for name, template in TEMPLATES.items():
        for number, messages in enumerate(conversations()):
            for prompt in (False, True):
                fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>")
                fast.chat_template = template
                case = {"template": name, "messages": number, "prompt": prompt, "text": None}
                try:
                    case["text"] = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                except Exception as e:
                    print(name, number, type(e).__name__, e)
                if not prompt and "marked" in name and case["text"] is not None:
                    both = fast.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
                    case["tokens"], case["learned"] = both["input_ids"], both["assistant_masks"]
                cases.append(case)
    return {"templates": TEMPLATES, "conversations": list(conversations()), "cases": cases}


def main():
    DATA.mkdir(exist_ok=True)
    out = {"texts": TEXTS, "kinds": {}}
    for name, tokenizer, bos, eos, file, scores in kinds():
        (DATA / name).mkdir(exist_ok=True)
        path = DATA / name / "tokenizer.json"
        path.write_text(tokenizer.to_str())
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        tokenizer = Tokenizer.from_file(str(path))
        kind = {"bos": bos and tokenizer.token_to_id(bos), "eos": eos and tokenizer.token_to_id(eos), "gguf": file is not None}
        kind["vocab"] = tokenizer.get_vocab_size()
        for way in ("parse", "text"):
            tokenizer.encode_special_tokens = way == "text"
            kind[way] = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
        kind["decoded"] = [tokenizer.decode(ids, skip_special_tokens=False) for ids in kind["parse"]]
        tokenizer.encode_special_tokens = False
        assert [fast(text, add_special_tokens=False)["input_ids"] for text in TEXTS] == kind["parse"], name
        config = {"bos_token": bos, "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
        if name == "smollm":
            config["chat_template"] = TEMPLATES["chatml"]
            (DATA / "chat.json").write_text(json.dumps(chat(tokenizer), ensure_ascii=False, separators=(",", ":")))
        (DATA / name / "tokenizer_config.json").write_text(json.dumps(config))
        out["kinds"][name] = kind
        if file:
            write_gguf(name, tokenizer, bos, eos, *file, scores)
        print(name, kind["vocab"])
    (DATA / "expected.json").write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")))


def real(path, texts):
    import xxhash
    from transformers import AutoTokenizer

    path = Path(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    pre = gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents()
    if pre == "smollm":
        # transformers does not know it and takes GPT-2's words; llama.cpp and SmolLM2's own tokenizer.json cut at digits first.
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    digest, n = xxhash.xxh3_64(), 0
    for text in texts:
        ids = tokenizer(Path(text).read_bytes().decode(), add_special_tokens=False)["input_ids"]
        digest.update(b"".join(t.to_bytes(4, "little") for t in ids))
        n += len(ids)
    print(n, "tokens", digest.hexdigest())


def check(folder):
    """What our program has written is for AutoTokenizer what it is for us."""
    from transformers import AutoTokenizer

    expected = json.loads((DATA / "expected.json").read_text())["kinds"]
    models_of = {"llama3": "llama", "llama2": "llama", "mistral": "mistral", "gemma": "gemma3_text", "qwen2": "qwen2", "gpt2": "gpt2"}
    for path in sorted(Path(folder).iterdir()):
        kind = path.name.split("-")[0]
        for config in (None, models_of.get(kind, "llama")):
            if config:
                (path / "config.json").write_text(json.dumps({"model_type": config}))
            tokenizer = AutoTokenizer.from_pretrained(path)
            for text, ids in zip(TEXTS, expected[kind]["parse"]):
                found = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert found == ids, f"{path.name} {config} {text!r}: {found}, expected {ids}"
            assert tokenizer.bos_token_id == expected[kind]["bos"], path.name
            assert tokenizer.eos_token_id == expected[kind]["eos"], path.name
            adds = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
            assert adds == (kind in ("llama3", "mistral") or path.name == "llama2-gguf" or path.name == "gemma-gguf"), f"{path.name}: {adds}"
            assert (tokenizer.chat_template is not None) == (kind == "smollm"), path.name
    print("the same")


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        check(sys.argv[2])
    elif sys.argv[1:2] == ["real"]:
        real(sys.argv[2], sys.argv[3:])
    else:
        main()
