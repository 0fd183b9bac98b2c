"""Vision transformers in plain PyTorch, and the state files that the tests of bdia-vit compare with.

Written for this purpose from the papers' formulas, without the Rust code: shifted patch tokenization and locality
self-attention (Lee, Lee and Song, 2021; shifts of one pixel), the plain vision transformer (Dosovitskiy et al., 2021) and
the two-stream reversible one (Mangalam et al., 2022). Autograd gives every gradient, in float64.

    python vit_f64.py ../data/vit        writes small_f64, plain_f64 and revvit_f64 .safetensors
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

torch.set_default_dtype(torch.float64)
EPS = 1e-5


class Attention(torch.nn.Module):
    def __init__(self, width, heads, locality):
        super().__init__()
        self.heads, self.locality = heads, locality
        self.qkv = torch.nn.Linear(width, 3 * width, bias=not locality)
        self.proj = torch.nn.Linear(width, width)
        if locality:
            self.temperature = torch.nn.Parameter(torch.log(torch.tensor([(width // heads) ** -0.5])))

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (part.reshape(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2)
        if self.locality:
            scores = scores * self.temperature.exp()
            scores = scores.masked_fill(torch.eye(t, dtype=torch.bool), float("-inf"))
        else:
            scores = scores / (d // self.heads) ** 0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))


class Block(torch.nn.Module):
    def __init__(self, width, heads, mlp, locality):
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads, locality)
        self.norm2 = torch.nn.LayerNorm(width, eps=EPS)
        self.mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(width, mlp), "fc2": torch.nn.Linear(mlp, width)})

    def f(self, x):
        return self.attn(self.norm1(x))

    def g(self, x):
        return self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def shifted(images):
    """The image, and the image moved right, left, down and up by one pixel, as further channels."""
    moves = [(1, -1, 0, 0), (-1, 1, 0, 0), (0, 0, 1, -1), (0, 0, -1, 1)]
    return torch.cat([images] + [F.pad(images, move) for move in moves], dim=1)


class Vit(torch.nn.Module):
    def __init__(self, channels, side, patch, width, layers, heads, mlp, classes, small, two_streams):
        super().__init__()
        self.patch, self.small, self.two_streams = patch, small, two_streams
        count, values = (side // patch) ** 2, patch * patch * channels * (5 if small else 1)
        embed = {"proj": torch.nn.Linear(values, width)}
        if small:
            embed["norm"] = torch.nn.LayerNorm(values, eps=EPS)
        self.patch_embed = torch.nn.ModuleDict(embed)
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = torch.nn.Parameter(torch.randn(1, count + 1, width))
        self.blocks = torch.nn.ModuleList(Block(width, heads, mlp, small) for _ in range(layers))
        self.norm = torch.nn.LayerNorm(width, eps=EPS)
        self.head = torch.nn.Linear(width, classes)

    def forward(self, images):
        x = shifted(images) if self.small else images
        b, c, h, w = x.shape
        p = self.patch
        # [b, c, rows, p, cols, p] to [b, rows·cols, p·p·c]
        x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)
        if self.small:
            x = self.patch_embed["norm"](x)
        x = torch.cat([self.cls_token.expand(b, -1, -1), self.patch_embed["proj"](x)], dim=1) + self.pos_embed
        if self.two_streams:
            one, two = x, x
            for block in self.blocks:
                one = one + block.f(two)
                two = two + block.g(one)
            x = one + two
        else:
            for block in self.blocks:
                x = x + block.f(x)
                x = x + block.g(x)
        return self.head(self.norm(x[:, 0]))


def main(folder):
    sizes = {"channels": 2, "side": 6, "patch": 2, "width": 12, "layers": 3, "heads": 3, "mlp": 10, "classes": 5}
    batch, smoothing = 4, 0.1
    for name, small, two in [("small", True, False), ("plain", False, False), ("revvit", True, True)]:
        torch.manual_seed({"small": 1, "plain": 2, "revvit": 3}[name])
        model = Vit(**sizes, small=small, two_streams=two)
        with torch.no_grad():
            # Not the values that a network starts with: norms and biases of 1 and 0 hide mistakes.
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        images = torch.randn(batch, sizes["channels"], sizes["side"], sizes["side"])
        labels = torch.tensor([3, 0, 4, 1])
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        loss.backward()
        tensors = {f"param.{n}": p.detach().contiguous() for n, p in model.named_parameters()}
        tensors |= {f"grad.{n}": p.grad.contiguous() for n, p in model.named_parameters()}
        tensors |= {"images": images, "labels": labels.to(torch.int32), "logits": logits.detach().contiguous(),
                    "loss": loss.detach().reshape(1)}
        meta = {k: str(v) for k, v in sizes.items()}
        meta |= {"batch": str(batch), "smoothing": str(smoothing), "small": str(small).lower(),
                 "two_streams": str(two).lower(), "torch": torch.__version__.split("+")[0]}
        save_file(tensors, str(Path(folder) / f"{name}_f64.safetensors"), metadata=meta)
        print(name, float(loss.detach()), sum(p.numel() for p in model.parameters()))
    full = Vit(3, 32, 4, 512, 6, 8, 512, 10, True, False)
    print("the paper's vit_small:", sum(p.numel() for p in full.parameters()), "parameters")


if __name__ == "__main__":
    main(sys.argv[1])
