"""Steps of training a model of transformers: tokens a second and the peak of the process, to be run in turn with bdia-lm.

    bdia-lm export --model FILE.gguf --out model          # the same weights as a directory
    bdia-lm finetune --model model --task text --data tokens.bin --batch 4 --context 256 --steps 8 --mode bdia \\
      --gamma 0.125 --eval-interval 0 --sample 0 --threads 2 --json
    python peer.py model --batch 4 --context 256 --steps 8 --threads 2 [--checkpoint]

The data is random tokens, as speed does not depend on them (--tokens FILE writes them as u16 for bdia-lm).
"""

import argparse
import json
import resource
import time

import numpy as np
import torch
import transformers


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="a directory in Hugging Face's layout")
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--context", type=int, default=256)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    p.add_argument("--lora", type=int, metavar="R", help="PEFT's adapters of rank R on every linear layer, all else frozen")
    p.add_argument("--tokens", help="write tokens there and end")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    config = transformers.AutoConfig.from_pretrained(a.model)
    data = np.random.default_rng(1).integers(0, min(config.vocab_size, 1 << 16), 1 << 15)
    if a.tokens:
        data.astype("<u2").tofile(a.tokens)
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).train()
    if a.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    if a.lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=a.lora, lora_alpha=2 * a.lora, target_modules="all-linear"))
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.01)
    n = a.batch * a.context
    times = []
    for step in range(a.steps):
        ids = torch.tensor(data[step * n : (step + 1) * n].reshape(a.batch, a.context))
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    # The first step makes what the others use again.
    speed = n / float(np.median(times[1:]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens_per_s": speed, "peak_rss_bytes": peak, "loss": loss.item()}))


if __name__ == "__main__":
    main()
