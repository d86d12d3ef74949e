"""Writes adapters of a tiny model, and the weights that PEFT merges, into the folders of tests/lora_peft.

    python make.py OUT        (torch, transformers, peft 0.21.2)
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=4, vocab_size=10,
)
adapters = {
    "patterns": dict(
        r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 3}, alpha_pattern={"q_proj": 5},
    ),
    "rslora": dict(r=4, lora_alpha=8, use_rslora=True, target_modules=r".*\.(k_proj|gate_proj)"),
    "head": dict(r=2, lora_alpha=2, target_modules=["o_proj", "embed_tokens"], modules_to_save=["lm_head"]),
}
for name, settings in adapters.items():
    torch.manual_seed(len(name))
    model = LlamaForCausalLM(config).float()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    tuned = get_peft_model(model, LoraConfig(**settings))
    for key, parameter in tuned.named_parameters():
        if "lora_" in key or "modules_to_save" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = os.path.join(sys.argv[1], name)
    tuned.save_pretrained(folder)
    os.remove(os.path.join(folder, "README.md"))
    merged = tuned.merge_and_unload().state_dict()
    changed = [key for key, value in merged.items() if not torch.equal(value, base[key])]
    expected = {f"base.{key}": base[key].contiguous() for key in changed}
    expected |= {f"merged.{key}": merged[key].contiguous() for key in changed}
    save_file(expected, os.path.join(folder, "expected.safetensors"))
