"""Logits of a GPTQ checkpoint as another tool computes them in float32 on the CPU.

    python interop_logits.py gptqmodel|transformers|auto_gptq MODEL_DIR IDS.safetensors OUT.safetensors

IDS holds `input_ids` (n,); OUT gets float32 `logits` (n, vocab). A tool that rejects the checkpoint says why on the last line.
"""

import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file, save_file

tool, model_dir, ids_file, out_file = sys.argv[1:]


def dequantised(model):
    """GPTQModel's CPU kernel wants fp16 activations: its own unpacking, in float32, shows what it read from the file."""
    for name, module in list(model.named_modules()):
        if not hasattr(module, "qweight"):
            continue
        module.scales = module.scales.float()
        weight = module.dequantize_weight().float().T.contiguous()
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
        linear.weight.data = weight
        if module.bias is not None:
            linear.bias.data = module.bias.float()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model.float()


def load():
    if tool == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        loaded = GPTQModel.load(model_dir, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
        return dequantised(loaded.model)
    if tool == "transformers":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, device_map="cpu")
    if tool == "auto_gptq":
        from auto_gptq import AutoGPTQForCausalLM

        return AutoGPTQForCausalLM.from_quantized(
            model_dir, device="cpu", torch_dtype=torch.float32, use_safetensors=True,
            disable_exllama=True, disable_exllamav2=True, use_cuda_fp16=False,
        )
    sys.exit(f"unknown tool {tool}")


ids = load_file(ids_file)["input_ids"].long().reshape(1, -1)
model = load()
with torch.no_grad():
    logits = model(input_ids=ids).logits[0].float()
save_file({"logits": logits.contiguous()}, out_file)
