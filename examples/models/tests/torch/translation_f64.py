"""A translation model around PyTorch's own torch.nn.Transformer, and the state files that the tests of bdia-translate compare with.

Written for this purpose without the Rust code. Blocks, attention, masks and norms are PyTorch's (pre-norm, exact GELU);
embeddings, positions and the head, which torch.nn.Transformer does not have, are added here. Autograd gives every gradient,
in float64.

    python translation_f64.py ../data/seq2seq        writes shared_f64 and separate_f64 .safetensors
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

torch.set_default_dtype(torch.float64)
PAD, BEGIN, END = 0, 1, 2


class Translator(torch.nn.Module):
    def __init__(self, vocab, longest, width, layers, heads, mlp):
        super().__init__()
        source, target = vocab
        self.shared = source == target
        if self.shared:
            self.embedding = torch.nn.Embedding(source, width)
        else:
            self.source_embedding = torch.nn.Embedding(source, width)
            self.target_embedding = torch.nn.Embedding(target, width)
        self.source_positions = torch.nn.Parameter(torch.randn(longest, width))
        self.target_positions = torch.nn.Parameter(torch.randn(longest, width))
        self.transformer = torch.nn.Transformer(
            width, heads, *layers, mlp, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True)

    def forward(self, source, target):
        tables = [self.embedding] * 2 if self.shared else [self.source_embedding, self.target_embedding]
        x = tables[0](source) + self.source_positions[: source.shape[1]]
        y = tables[1](target) + self.target_positions[: target.shape[1]]
        missing = source == PAD
        causal = torch.nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        z = self.transformer(x, y, tgt_mask=causal, src_key_padding_mask=missing, memory_key_padding_mask=missing,
                             tgt_key_padding_mask=torch.zeros_like(causal[0]).expand(target.shape).masked_fill(
                                 target == PAD, float("-inf")), tgt_is_causal=True)
        return z @ tables[1].weight.T


def name_of(name):
    return name.removeprefix("transformer.")


def main(folder):
    width, heads, mlp, layers, longest, smoothing = 8, 2, 6, (2, 3), 7, 0.1
    sources = [[3, 4, 5, 6, 7], [8, 3], [5], [9, 4, 4, 10]]
    targets = [[4, 5, 6], [7, 8, 9, 10, 3], [6, 3], [3]]
    for name, vocab in [("shared", (12, 12)), ("separate", (12, 11))]:
        torch.manual_seed({"shared": 1, "separate": 2}[name])
        model = Translator(vocab, longest, width, layers, heads, mlp)
        with torch.no_grad():
            # Not the values that a network starts with: norms and biases of 1 and 0 hide mistakes.
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))

        def padded(rows, fill):
            longest_row = max(map(len, rows))
            return torch.tensor([row + [fill] * (longest_row - len(row)) for row in rows])

        source = padded([row + [END] for row in sources], PAD)
        given = padded([[BEGIN] + row for row in targets], PAD)
        wanted = padded([row + [END] for row in targets], -1)
        logits = model(source, given)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, label_smoothing=smoothing)
        loss.backward()
        tensors = {f"param.{name_of(n)}": p.detach().contiguous() for n, p in model.named_parameters()}
        tensors |= {f"grad.{name_of(n)}": p.grad.contiguous() for n, p in model.named_parameters()}
        tensors |= {"logits": logits.detach().contiguous(), "loss": loss.detach().reshape(1)}
        meta = {"source_vocab": vocab[0], "target_vocab": vocab[1], "longest": longest, "width": width, "heads": heads,
                "mlp": mlp, "encoder_layers": layers[0], "decoder_layers": layers[1], "smoothing": smoothing,
                "sources": ";".join(" ".join(map(str, row)) for row in sources),
                "targets": ";".join(" ".join(map(str, row)) for row in targets),
                "torch": torch.__version__.split("+")[0]}
        save_file(tensors, str(Path(folder) / f"{name}_f64.safetensors"), metadata={k: str(v) for k, v in meta.items()})
        print(name, float(loss.detach()), sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main(sys.argv[1])
