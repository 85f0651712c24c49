"""An independent check of `llmcompress eval`: perplexity with plain transformers and nothing of ours but the report.

python bench/perplexity.py OUT REPORT.json TEXT.txt
"""

import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, report_path, text_path = sys.argv[1:4]
report = json.loads(Path(report_path).read_text())
length, samples = report["data"]["sequence_length"], report["data"]["sequences"]
ids = AutoTokenizer.from_pretrained(folder)(Path(text_path).read_text(), verbose=False).input_ids
rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
if len(rows) != samples:
    raise SystemExit(f"the text has {len(rows)} windows: evaluate with --samples {len(rows)}")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    losses = [model(input_ids=row[None], labels=row[None]).loss.double() for row in rows]
ours = report["summary"]["perplexity_candidate"]
print(f"independent {math.exp(float(torch.stack(losses).mean())):.6f}  report {ours:.6f}")
