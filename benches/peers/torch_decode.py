#!/usr/bin/env python3
"""Decoding with a Llama-2-7B-shaped model of random weights in PyTorch, as fast as torch alone makes it: batch 1, static
key-value cache, `torch.compile` with coordinate descent tuning, and CUDA graphs, in the manner of gpt-fast; bf16 weights,
and tinygemm's int4 in groups of 128 with a bf16 output layer. One block is compiled and serves for all, which takes seconds
instead of a minute; a whole token is one graph, and tokens follow each other without the host.

    python3 benches/peers/torch_decode.py [int4] [bf16] [--tokens 256]

Prints tokens per second of greedy decoding from position 16 on, for both ways to write attention: the median over five
runs, each timed from its first to its last token with the device synchronised, after compilation and a warm-up run.
"""

import argparse
import time
import traceback

import torch
import torch._inductor.config
from torch import nn
from torch.nn import functional as F

LAYERS, HIDDEN, HEADS, INNER, VOCABULARY, CONTEXT = 32, 4096, 32, 11008, 32000, 272
HEAD = HIDDEN // HEADS
PROMPT, GROUP = 16, 128
# Whether attention of a token is written as sums, which the compiler turns into kernels of its own, or calls PyTorch's.
SUMS = False


class Int4(nn.Module):
    """y = x W^T with random 4-bit weights."""

    def __init__(self, inputs, outputs):
        super().__init__()
        pairs = torch.randint(0, 256, (outputs, inputs // 2), device="cuda", dtype=torch.uint8)
        self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack(pairs, 8))
        scales = (torch.rand(inputs // GROUP, outputs, device="cuda") + 0.5) / (4 * inputs**0.5)
        grid = torch.stack([scales, torch.zeros_like(scales)], 2)
        self.register_buffer("grid", grid.to(torch.bfloat16).contiguous())

    def forward(self, x):
        y = torch.ops.aten._weight_int4pack_mm(x.reshape(-1, x.shape[-1]), self.weight, GROUP, self.grid)
        return y.reshape(*x.shape[:-1], -1)


def dense(inputs, outputs):
    layer = nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16))

    def forward(self, x):
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return scaled.to(x.dtype) * self.weight


def rotate(x, cos, sin):
    """Rotary embedding of (1, tokens, heads, HEAD), halves as pairs."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.qkv, self.out = linear(HIDDEN, 3 * HIDDEN), linear(HIDDEN, HIDDEN)
        self.gate_up, self.down = linear(HIDDEN, 2 * INNER), linear(INNER, HIDDEN)
        self.norm, self.mlp_norm = Norm(), Norm()
        cache = torch.zeros(2, 1, HEADS, CONTEXT, HEAD, device="cuda", dtype=torch.bfloat16)
        self.register_buffer("cache", cache)

    def forward(self, x, positions, cos, sin, mask):
        tokens = x.shape[1]
        q, k, v = self.qkv(self.norm(x)).view(1, tokens, 3, HEADS, HEAD).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        self.cache[0].index_copy_(2, positions, k)
        self.cache[1].index_copy_(2, positions, v)
        if SUMS and tokens == 1:
            scores = (q.float() * self.cache[0].float()).sum(-1) * HEAD**-0.5
            shares = scores.masked_fill(~mask[:, :, 0], -torch.inf).softmax(-1)
            y = (shares[..., None] * self.cache[1].float()).sum(-2, keepdim=True).to(x.dtype)
        else:
            y = F.scaled_dot_product_attention(q, self.cache[0], self.cache[1], attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(1, tokens, HIDDEN))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.blocks = nn.ModuleList(Block(linear) for _ in range(LAYERS))
        self.norm, self.head = Norm(), dense(HIDDEN, VOCABULARY)
        self.block, self.tail = Block.forward, Model.logits
        angles = torch.outer(torch.arange(CONTEXT), 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)).cuda()
        self.register_buffer("cos", angles.cos()[:, None])
        self.register_buffer("sin", angles.sin()[:, None])
        mask = torch.ones(CONTEXT, CONTEXT, device="cuda", dtype=torch.bool).tril()
        self.register_buffer("mask", mask)

    def forward(self, tokens, positions):
        x = self.embedding(tokens)
        cos, sin, mask = self.cos[positions], self.sin[positions], self.mask[positions][None, None]
        for block in self.blocks:
            x = self.block(block, x, positions, cos, sin, mask)
        return self.tail(self, x[:, -1]).argmax(-1, keepdim=True)

    def logits(self, x):
        return self.head(self.norm(x))


class Recorded:
    """One token after another, by replays of a graph that reads and writes `token` and `position`."""

    def __init__(self, model):
        self.token = torch.zeros(1, 1, device="cuda", dtype=torch.int64)
        self.position = torch.zeros(1, device="cuda", dtype=torch.int64)
        # The prompt is computed as it stands, single tokens by what is compiled.
        model.block = torch.compile(Block.forward, fullgraph=True)
        model.tail = torch.compile(Model.logits, fullgraph=True)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run(model)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run(model)
        model.block, model.tail = Block.forward, Model.logits

    def run(self, model):
        self.token.copy_(model(self.token, self.position))
        self.position += 1


def decode(recorded, model, tokens):
    """Seconds for `tokens` tokens after a prompt."""
    prompt = torch.arange(PROMPT, device="cuda")
    recorded.token.copy_(model(prompt[None], prompt))
    recorded.position.fill_(PROMPT)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(tokens):
        recorded.graph.replay()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(kind, sums, tokens):
    global SUMS
    SUMS = sums
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    start = time.perf_counter()
    with torch.inference_mode():
        model = Model({"bf16": dense, "int4": Int4}[kind])
        torch.cuda.synchronize()
        made = time.perf_counter() - start
        recorded = Recorded(model)
        decode(recorded, model, min(tokens, 32))
        ready = time.perf_counter() - start
        times = sorted(decode(recorded, model, tokens) for _ in range(5))
    rates = [tokens / seconds for seconds in times]
    memory = torch.cuda.max_memory_allocated() / 1e9
    print(
        f"{kind}, attention {'as sums' if sums else 'of PyTorch'}: {rates[2]:.1f} tokens/s ({rates[4]:.1f} to {rates[0]:.1f}), {1000 / rates[2]:.3f} ms a token, "
        f"{memory:.2f} GB at most; weights made in {made:.0f} s, ready after {ready:.0f} s",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", default=["int4", "bf16"])
    parser.add_argument("--tokens", type=int, default=256, choices=range(1, CONTEXT - PROMPT + 1), metavar="N")
    options = parser.parse_args()
    torch._inductor.config.coordinate_descent_tuning = True
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    for kind, sums in [(kind, sums) for kind in options.kinds for sums in (False, True)]:
        try:
            measure(kind, sums, options.tokens)
        except Exception:  # One that fails must not hide the others.
            traceback.print_exc()


if __name__ == "__main__":
    main()
