"""The paper's ViT (`vit_small`: 32x32 images, 9,622,512 parameters with 10 classes), trained on the
CPU or on a CUDA device: everything stored, checkpointing, or BDIA. Dropout is at the embedding, in
attention, inside the MLP, and behind both branches."""

import math

import peer

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bdia

peer.imports_done()

SIZE, PATCH, CHANNELS, CLASSES = 32, 4, 3, 10
WIDTH, DEPTH, HEADS, HEAD_DIM, INNER = 512, 6, 8, 64, 512
PATCHES = (SIZE // PATCH) ** 2
PARAMETERS = 9_622_512


class ShiftedPatches(nn.Module):
    """Image and its four one-pixel shifts, cut into patches: [B, 3, 32, 32] -> [B, 64, d]."""

    def __init__(self):
        super().__init__()
        values = 5 * CHANNELS * PATCH * PATCH
        self.norm, self.linear = nn.LayerNorm(values), nn.Linear(values, WIDTH)

    def forward(self, images):
        shifts = [(1, -1, 0, 0), (-1, 1, 0, 0), (0, 0, 1, -1), (0, 0, -1, 1)]
        copies = [images, *(F.pad(images, shift) for shift in shifts)]
        patches = F.unfold(torch.cat(copies, dim=1), PATCH, stride=PATCH)  # [B, 15 * 16, 64]
        return self.linear(self.norm(patches.transpose(1, 2)))


class Block(nn.Module):
    """Locality self-attention (learned temperature, no token sees itself) and MLP, each behind its
    norm."""

    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * HEAD_DIM, bias=False)
        self.temperature = nn.Parameter(torch.tensor(math.log(HEAD_DIM**-0.5)))
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        not_itself = torch.zeros(PATCHES + 1, PATCHES + 1).fill_diagonal_(-math.inf)
        self.register_buffer("not_itself", not_itself, persistent=False)

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)

    def attention(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        q = q * self.temperature.exp()
        mask = self.not_itself.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=1.0)
        return self.drop(self.out(mixed.transpose(1, 2).reshape(b, t, HEADS * HEAD_DIM)))

    def mlp(self, x):
        return self.drop(self.outer(self.drop(F.gelu(self.inner(x)))))

    def residual(self, x):
        f = self.attention(self.norm_1(x))
        return f + self.mlp(self.norm_2(x + f))

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Vit(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.patches = ShiftedPatches()
        self.class_token = nn.Parameter(torch.randn(WIDTH))
        self.positions = nn.Parameter(torch.randn(PATCHES + 1, WIDTH))
        self.dropout = dropout
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def embed(self, images):
        x = self.patches(images)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.positions
        return F.dropout(x, self.dropout, self.training)

    def logits(self, x):
        return self.head(self.norm(x[:, 0]))

    def named(self):
        """Parameters by their names in files, with the shapes there."""
        flat = lambda p: p.detach().view(-1)
        named = {
            "patch_embed.norm": self.patches.norm, "patch_embed.proj": self.patches.linear,
            "norm": self.norm, "head": self.head,
        }  # fmt: skip
        tensors = {
            "cls_token": flat(self.class_token).view(1, 1, -1),
            "pos_embed": self.positions.detach()[None],
        }
        for k, b in enumerate(self.blocks):
            parts = {
                "norm1": b.norm_1, "attn.qkv": b.qkv, "attn.proj": b.out,
                "norm2": b.norm_2, "mlp.fc1": b.inner, "mlp.fc2": b.outer,
            }  # fmt: skip
            named |= {f"blocks.{k}.{name}": part for name, part in parts.items()}
            tensors[f"blocks.{k}.attn.temperature"] = flat(b.temperature)
        for name, part in named.items():
            tensors |= {f"{name}.{which}": p.detach() for which, p in part.named_parameters()}
        return tensors

    def reorder(self):
        """Files have a patch as [row, column, copy, channel], `unfold` gives [copy, channel, row,
        column]."""
        n = 5 * CHANNELS
        for p in [self.patches.norm.weight, self.patches.norm.bias, self.patches.linear.weight]:
            there = p.detach().view(-1, PATCH, PATCH, n)
            p.detach().copy_(there.permute(0, 3, 1, 2).reshape(p.shape).clone())


def main():
    args = peer.arguments(__doc__, ["store-all", "checkpointing", "bdia"]).parse_args()
    device = peer.prepare(args)
    model = Vit(args.dropout).to(device)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    values = peer.numbers(args.seed, args.batch * (CHANNELS * SIZE * SIZE + 1))
    labels = torch.from_numpy((values[: args.batch] % CLASSES).astype("int64")).to(device)
    pixels = (values[args.batch :] >> 40).astype("float32") * 2.0**-23 - 1.0
    images = torch.from_numpy(pixels).view(args.batch, CHANNELS, SIZE, SIZE).to(device)
    residuals = [block.residual for block in model.blocks]
    stack = bdia.Stack(residuals, args.frac_bits, args.seed, args.verify)

    def step_loss(step):
        x = model.embed(images)
        if args.mode == "bdia":
            stack.step = step
            x = stack(x)
        elif args.mode == "checkpointing":
            for block in model.blocks:
                x = checkpoint(block, x, use_reentrant=False)
        else:
            for block in model.blocks:
                x = block(x)
        return F.cross_entropy(model.logits(x), labels)

    facts = {"model": "vit-small", "context": PATCHES + 1, "unit": "images", "items": args.batch}
    peer.measure(args, model, model.named(), step_loss, facts, stack, model.reorder)


if __name__ == "__main__":
    main()
