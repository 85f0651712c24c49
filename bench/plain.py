"""Open checkpoints with nothing but torch, transformers and compressed-tensors, and compare with our reference.

python bench/plain.py DIR        # DIR as bench/budgets.py leaves it
"""

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

if importlib.util.find_spec("llmcompress") is not None:
    raise SystemExit("run this where llmcompress is not installed")
for folder in sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir()):
    kept = load_file(folder.parent / f"{folder.name}.logits.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        difference = float((model(kept["tokens"]).logits - kept["logits"]).abs().max())
    text = model.generate(kept["tokens"][:, :8], max_new_tokens=8, do_sample=False)
    wrong = sum(len(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    made = text.shape[1] - 8
    print(f"{folder.name:<32} largest logit difference {difference:.2e}, {wrong} wrong keys, generated {made}")
    if difference > 1e-2 or wrong:
        raise SystemExit(1)
