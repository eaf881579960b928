"""Transformers in a process of its own: `python -m tests.benchmarks.transformers_peer MODEL THREADS`.

`generate(output_attentions=True, output_logits=True)` keeps what our full capture stores, in memory and not on disk.
Line in: JSON `{"prompts": [[token, ...], ...], "output": N}`. Line out: JSON `{"seconds": S, "tokens": N, ...}`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def generate(model: Any, prompts: list[list[int]], output: int) -> dict[str, float]:
    """Time of one batch, and the MB that it holds at the end."""
    import torch

    ids = torch.tensor(prompts, device=model.device)
    begin = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, min_new_tokens=output, do_sample=False,
            output_attentions=True, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        made.sequences.cpu()  # on a GPU the work is only queued
    seconds = time.perf_counter() - begin
    tensors = [layer for step in made.attentions for layer in step] + list(made.logits)
    return {
        "seconds": seconds,
        "tokens": (made.sequences.shape[1] - ids.shape[1]) * len(prompts),
        "mb": sum(tensor.nbytes for tensor in tensors) / 1e6,
        "steps": len(made.attentions),
    }


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(sys.argv[2]))
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, attn_implementation="eager").eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    sys.stdout.write('{"ready": true}\n')
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(generate(model, **json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
