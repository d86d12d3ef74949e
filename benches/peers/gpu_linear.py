#!/usr/bin/env python3
"""Linear layers of PyTorch on a GPU, timed as bench `cuda_linear` times ours: cuBLAS in fp16, and tinygemm's int4.

    python3 benches/peers/gpu_linear.py

Copies of each weight are together at least 512 MB and are visited in turn in one CUDA graph; times are medians of
replays. Errors are |y - exact| / |exact| against a float64 product with the very weights that the kernel multiplies by.
"""

import statistics

import torch

SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672)]
ROWS = [1, 2, 4, 8, 16, 64, 256]
GROUP, ROTATED_BYTES, REPLAYS = 128, 512 << 20, 15


def graph_time(call, weights):
    """Microseconds of `call(weight)`, median over replays of a graph that visits all `weights`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for weight in weights[:2]:
            call(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            call(weight)
    times = []
    for _ in range(REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(weights))
    return statistics.median(times[2:])


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


def cublas(k, n):
    copies = max(6, -(-ROTATED_BYTES // (2 * k * n)))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.float16) / 64 for _ in range(copies)]
    for rows in ROWS:
        x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
        time = graph_time(lambda w: torch.nn.functional.linear(x, w), weights)
        y = torch.nn.functional.linear(x, weights[0])
        yield "cuBLAS fp16", rows, time, error(y, x.double() @ weights[0].double().T)


def tinygemm(k, n):
    copies = max(6, -(-ROTATED_BYTES // (k * n // 2)))
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
    grid = torch.stack([torch.rand(k // GROUP, n, device="cuda") / 100, torch.zeros(k // GROUP, n, device="cuda")], 2)
    grid = grid.to(torch.bfloat16).contiguous()
    weights = [packed.clone() for _ in range(copies)]
    # tinygemm's weight is (code - 8) * scale + zero.
    scales = grid[:, :, 0].T.double().repeat_interleave(GROUP, 1)
    exact_weight = (codes.double() - 8) * scales
    for rows in (rows for rows in ROWS if rows <= 64):
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        multiply = lambda w: torch.ops.aten._weight_int4pack_mm(x, w, GROUP, grid)
        time = graph_time(multiply, weights)
        yield "tinygemm bf16", rows, time, error(multiply(weights[0]), x.double() @ exact_weight.T)


def main():
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    for k, n in SHAPES:
        for peer in (cublas, tinygemm):
            torch.cuda.empty_cache()
            for name, rows, time, err in peer(k, n):
                print(f"{k}x{n} M={rows:<4} {name:<14} {time:8.2f} us  error {err:.1e}", flush=True)


if __name__ == "__main__":
    main()
