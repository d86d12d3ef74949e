"""Times GPTQModel's layer solver on the CPU, for comparison with `cargo bench --bench hessian --bench solver`.

    python3 -m venv venv && venv/bin/pip install gptqmodel==7.7.0
    venv/bin/python benches/peers/gptqmodel_solver.py [features=4096] [tokens=8192] [threads=2]
"""

import os
import statistics
import sys
import time

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ

features, tokens, threads = (int(a) for a in (sys.argv[1:] + ["4096", "8192", "2"][len(sys.argv) - 1 :]))
torch.set_num_threads(threads)
torch.manual_seed(0)
inputs = torch.randn(1, tokens, features)
hessian_seconds, solve_seconds = [], []
for _ in range(3):
    layer = torch.nn.Linear(features, features, bias=False)
    solver = GPTQ(layer, QuantizeConfig(bits=4, group_size=128, sym=True, act_group_aware=False))
    solver.quantizer.configure(perchannel=True)
    solver.fallback = None
    start = time.perf_counter()
    solver.add_batch(inputs, None)
    solver.finalize_hessian()
    hessian_seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    with torch.inference_mode():
        solver.quantize()
    solve_seconds.append(time.perf_counter() - start)
print(f"GPTQModel, torch {torch.__version__}, {threads} threads, medians of three")
print(f"Hessian {features} features x {tokens} tokens: {statistics.median(hessian_seconds):.2f} s")
print(f"solve {features} x {features}, 4-bit g128: {statistics.median(solve_seconds):.2f} s")
