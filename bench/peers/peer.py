"""What all peers share: flags, data, weights, the timed loop, and the one JSON line that a run
prints.

The Rust side (`bdia-bench run`) takes the same flags where it has the same notion, makes the same
tokens, and prints the same fields, so a report can put the lines side by side.
"""

import argparse
import json
import statistics
import struct
import time

BASE_RSS = 0  # bytes of the process after its imports, set by `imports_done`


def status(field):
    """A size of /proc/self/status, in bytes."""
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def imports_done():
    global BASE_RSS
    BASE_RSS = status("VmRSS")


def arguments(description, modes):
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--mode", choices=modes, default=modes[0])
    p.add_argument("--device", default="cpu", help="cpu, or cuda:0 (not for mode bdia)")
    p.add_argument(
        "--precision", choices=["f32", "tf32", "bf16"], default="f32",
        help="bf16: autocast, parameters stay f32",
    )  # fmt: skip
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--warmup", type=int, default=1, help="first steps, left out of the rate")
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--lr", type=float, default=3e-4)
    p.add_argument("--beta1", type=float, default=0.9)
    p.add_argument("--beta2", type=float, default=0.999)
    p.add_argument("--eps", type=float, default=1e-8)
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--frac-bits", type=int, default=14, help="l of the grid 2^-l (mode bdia)")
    p.add_argument(
        "--verify", action="store_true", help="keep all X_k and count differing values (mode bdia)"
    )
    p.add_argument("--weights", help="start from this safetensors file (f32)")
    p.add_argument("--save", help="write the initial parameters to this safetensors file and stop")
    return p


def prepare(args):
    """Threads, seed and device of a run."""
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    if args.mode == "bdia" and device.type != "cpu":
        raise SystemExit("--mode bdia runs on the cpu only")
    if args.precision == "tf32" and device.type != "cuda":
        raise SystemExit("--precision tf32 needs --device cuda:0")
    torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    return device


def numbers(seed, n):
    """n well-mixed 64-bit numbers, as the Rust side makes them."""
    import numpy as np

    with np.errstate(over="ignore"):
        z = np.arange(n, dtype=np.uint64) + np.uint64(1)
        z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        z = (z ^ (z >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return z ^ (z >> np.uint64(32))


def sequences(seed, batch, context, vocab):
    """Tokens and targets, [batch, context] each. Every step sees the same batch, so that the loss
    shows whether gradients and updates agree."""
    import numpy as np
    import torch

    words = numbers(seed, batch * (context + 1)) % np.uint64(vocab)
    words = words.astype(np.int64).reshape(batch, context + 1)
    return torch.from_numpy(words[:, :-1].copy()), torch.from_numpy(words[:, 1:].copy())


def load(named, path):
    """Reads f32 tensors into the parameters in place, without mapping the file: mapped pages would
    count as memory."""
    import torch

    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        header = {name.removeprefix("transformer."): entry for name, entry in header.items()}
        if set(header) != set(named):
            differing = sorted(set(header) ^ set(named))[:5]
            raise SystemExit(f"{path}: tensors differ from the model's: {differing}")
        for name, parameter in named.items():
            entry = header[name]
            found, expected = (entry["dtype"], entry["shape"]), ("F32", list(parameter.shape))
            if found != expected:
                raise SystemExit(f"{path}: {name} is {found}, expected {expected}")
            file.seek(8 + length + entry["data_offsets"][0])
            if parameter.device.type == "cpu":
                file.readinto(memoryview(parameter.detach().numpy()).cast("B"))
            else:
                values = bytearray(file.read(parameter.numel() * 4))
                read = torch.frombuffer(values, dtype=torch.float32)
                parameter.detach().copy_(read.view(parameter.shape))


def save(named, path):
    header, at = {}, 0
    for name, parameter in named.items():
        size = parameter.numel() * 4
        place = [at, at + size]
        header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": place}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for parameter in named.values():
            file.write(memoryview(parameter.detach().contiguous().numpy()).cast("B"))


def adamw(model, args):
    """The fused AdamW: the fastest that PyTorch has. As in bdia-lm only matrices decay."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (args.beta1, args.beta2)
    return torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=args.eps, fused=True)


def measure(args, model, named, step_loss, facts, stack, loaded=lambda: None):
    """Trains `args.steps` steps and prints the line. `step_loss(step)` gives the loss tensor;
    `facts` go into the line; `stack` counted mismatches where it was asked to; `loaded` is called
    when the parameters come from a file."""
    import torch

    if args.save:
        return save(named, args.save)
    if args.weights:
        load(named, args.weights)
        loaded()
    device = next(model.parameters()).device
    model.train()
    optimizer = adamw(model, args)
    seconds, losses = [], []
    for step in range(args.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16"):
            loss = step_loss(step)
        loss.backward()
        optimizer.step()
        # On a device this waits for the optimizer too.
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    counted = seconds[min(args.warmup, len(seconds) - 1) :]
    items = facts.pop("items")
    on_device = device.type == "cuda"
    most = torch.cuda.max_memory_allocated(device) if on_device else 0
    print(
        json.dumps(
            {
                "engine": "pytorch",
                "mode": args.mode,
                "precision": args.precision,
                "batch": args.batch,
                **facts,
                "threads": args.threads,
                "dropout": args.dropout,
                "warmup": args.warmup,
                "seconds": seconds,
                "items_per_s": items / statistics.median(counted),
                "peak_rss": status("VmHWM"),
                "base_rss": BASE_RSS,
                "backend": device.type,
                "parts": [{"name": "device", "plan": 0, "measured": most}] if on_device else [],
                "parameters": sum(p.numel() for p in model.parameters()),
                "losses": losses,
                "mismatches": stack.mismatches if args.verify and args.mode == "bdia" else None,
                "version": f"torch {torch.__version__}",
            }
        ),
        flush=True,
    )
