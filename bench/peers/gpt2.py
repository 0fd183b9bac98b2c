"""GPT-2 of transformers, trained on the CPU or on a CUDA device: everything stored, gradient
checkpointing, or BDIA."""

import peer

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import bdia

peer.imports_done()

# layers, heads, width, positions, vocabulary
SIZES = {
    "gpt2": (12, 12, 768, 1024, 50257),
    "gpt2-medium": (24, 16, 1024, 1024, 50257),
    "mini": (6, 4, 128, 128, 50257),
    "tiny": (3, 4, 64, 64, 512),
}


def main():
    p = peer.arguments(__doc__, ["store-all", "checkpointing", "bdia"])
    names = f"{', '.join(SIZES)}, or a name for the dimensions below"
    p.add_argument("--model", default="gpt2", help=names)
    p.add_argument("--context", type=int, default=256)
    for name in ["layers", "heads", "width", "positions", "vocab", "inner"]:
        p.add_argument(f"--{name}", type=int)
    p.add_argument("--gelu", choices=["tanh", "exact"], default="tanh")
    args = p.parse_args()
    device = peer.prepare(args)

    preset = SIZES.get(args.model, SIZES["tiny"])
    asked = [args.layers, args.heads, args.width, args.positions, args.vocab]
    layers, heads, width, positions, vocab = (given or usual for given, usual in zip(asked, preset))
    config = GPT2Config(
        n_layer=layers, n_head=heads, n_embd=width, n_inner=args.inner,
        n_positions=positions, vocab_size=vocab, bos_token_id=None, eos_token_id=None,
        activation_function={"tanh": "gelu_new", "exact": "gelu"}[args.gelu], use_cache=False,
        embd_pdrop=args.dropout, attn_pdrop=args.dropout, resid_pdrop=args.dropout,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(device)
    body = model.transformer
    named = {name.removeprefix("transformer."): q for name, q in model.named_parameters()}
    if args.mode == "checkpointing":
        how = {"use_reentrant": False}
        # Named so in newer versions of transformers.
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)

    def residual(block):
        def h(x):
            f = block.attn(block.ln_1(x))[0]
            return f + block.mlp(block.ln_2(x + f))

        return h

    blocks = [residual(block) for block in body.h]
    stack = bdia.Stack(blocks, args.frac_bits, args.seed, args.verify)
    batch = peer.sequences(args.seed, args.batch, args.context, vocab)
    tokens, targets = (t.to(device) for t in batch)
    places = torch.arange(args.context, device=device)

    def step_loss(step):
        if args.mode == "bdia":
            stack.step = step
            x = body.drop(body.wte(tokens) + body.wpe(places))
            logits = model.lm_head(body.ln_f(stack(x)))
        else:
            logits = model(tokens).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    items = args.batch * args.context
    facts = {"model": args.model, "context": args.context, "unit": "tokens", "items": items}
    peer.measure(args, model, named, step_loss, facts, stack)


if __name__ == "__main__":
    main()
