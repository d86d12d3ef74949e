"""Prints the table of .ci/interop: maximal difference of float32 logits, variant x tool.

    python interop_table.py ROOT LOGITS_BINARY IDS.safetensors
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

root, logits_binary, ids_file = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
tools = {"gptqmodel": "gptqmodel", "transformers": "gptqmodel", "auto_gptq": "autogptq"}
# transformers multiplies in fp16 through a kernel of PyTorch's: 2^-11 of logits that reach 25, over 28 layers.
bounds = {"gptqmodel": 1e-3, "auto_gptq": 1e-3, "transformers": 5e-2}
ids = root / "ids.safetensors"
save_file({"input_ids": load_file(ids_file)["evaluation"][0, :64].astype(np.int32)}, ids)
failed = False
rejections = []
print("| variant | " + " | ".join(tools) + " |")
print("|---" * (len(tools) + 1) + "|")
for variant in sorted(p for p in root.iterdir() if (p / "config.json").exists()):
    ours_file = root / "ours.safetensors"
    subprocess.run([logits_binary, "--model", variant, "--ids", ids, "--out", ours_file], check=True, capture_output=True)
    ours = load_file(ours_file)["logits"]
    cells = []
    label = json.loads((variant / "quantize_config.json").read_text())["checkpoint_format"]
    for tool, environment in tools.items():
        if tool == "auto_gptq" and label == "gptq_v2":
            cells.append("does not know gptq_v2")
            continue
        out = root / "theirs.safetensors"
        out.unlink(missing_ok=True)
        run = subprocess.run(
            [root / environment / "bin" / "python", ".ci/interop_logits.py", tool, variant, ids, out],
            capture_output=True, text=True,
        )
        if not out.exists():
            reason = (run.stderr.strip() or run.stdout.strip()).splitlines()[-1]
            rejections.append(f"{tool} rejects {variant.name}: {reason[:300]}")
            cells.append("rejected")
            continue
        delta = float(np.abs(load_file(out)["logits"] - ours).max())
        wrong = not delta <= bounds[tool]
        failed |= wrong
        cells.append(f"{delta:.1e}" + (" **differs**" if wrong else ""))
    print(f"| {variant.name} | " + " | ".join(cells) + " |", flush=True)
print("\n".join(["", *rejections]))
sys.exit(failed)
