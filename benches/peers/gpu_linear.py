#!/usr/bin/env python3
"""Linear layers on a GPU, side by side in one run: this project's kernels, cuBLAS in fp16, tinygemm's int4 (both as
PyTorch calls them), and Humming's if its package is installed (`pip install humming-kernels`; it compiles its kernels when
they are first called, which takes longer than all else; `--compile` only compiles, all at once, and keeps the kernels where
Humming looks for them).

    python3 benches/peers/gpu_linear.py [--compile] [--ours PROGRAM] [--costs FILE] [--kernels NAME,...] [--rows 1,16]
                                           [--our-rows 1,2] [--peers cublas,tinygemm,humming] [KxN...]

PROGRAM is the bench `cuda_linear`, which times in the same way: built by `.ci/gpu-bundle` (it is then found beside this
script's folder), or `cargo bench -p gptq-benches --features cuda --bench cuda_linear --no-run`, which says where it is.

Copies of each weight are together at least 512 MB and are visited in turn in one CUDA graph; times are medians of
replays, after each of which the GPU rests if there are many rows, with the fastest and slowest. Errors are |y - exact| /
|exact| against a float64 product with the very weights that the kernel multiplies by. All int4 weights are symmetric, in groups of 128. All are timed on one shape before the next
begins. A table in Markdown ends the output, after SIGTERM too: of our kernels it has the one that `select()` takes, by the costs that ship or by
FILE, which `measure_costs` has written; and in parentheses a faster one, if there is any among those that were timed (NAMEs,
or all that `select()` takes for some number of rows of the shape).
"""

import argparse
import concurrent.futures
import copy
import os
import signal
import subprocess
import sys
import time

import torch

SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672)]
ROWS = [1, 16, 64, 256, 2048]
GROUP, ROTATED_BYTES, REPLAYS = 128, 512 << 20, 15
# Slow peers are replayed less often: after so many seconds, but five times at least.
SECONDS, LEAST_REPLAYS = 0.4, 5
# Beyond that tinygemm, which is for few rows, takes milliseconds.
TINYGEMM_ROWS = 64
# With so many rows or more, the GPU rests three times as long as a replay took after each: it is at its power limit
# otherwise, and a time depends on how long it has been busy.
RESTING_ROWS = 256
OURS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "cuda_linear")


def graph_time(call, weights, rows):
    """Microseconds of `call(weight)` in replays of a graph that visits all `weights`: median, fastest, slowest."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for weight in weights[:2]:
            call(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            call(weight)
    times, begin = [], time.monotonic()
    while len(times) < REPLAYS + 2:
        if len(times) >= LEAST_REPLAYS + 2 and time.monotonic() - begin > SECONDS:
            break
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        milliseconds = start.elapsed_time(end)
        if rows >= RESTING_ROWS:
            time.sleep(3 * milliseconds / 1000)
        times.append(1000 * milliseconds / len(weights))
    times = sorted(times[2:])
    return times[len(times) // 2], times[0], times[-1]


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


def cublas(k, n, all_rows):
    copies = max(6, -(-ROTATED_BYTES // (2 * k * n)))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.float16) / 64 for _ in range(copies)]
    for rows in all_rows:
        x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
        took = graph_time(lambda w: torch.nn.functional.linear(x, w), weights, rows)
        y = torch.nn.functional.linear(x, weights[0])
        yield "cuBLAS fp16", rows, took, error(y, x.double() @ weights[0].double().T)


def random_int4(k, n):
    """Codes (n, k) from 0 to 15, and scales (k / GROUP, n) in float32 that bf16 and fp16 hold exactly."""
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.int32)
    scales = ((torch.rand(k // GROUP, n, device="cuda") + 0.5) / 128).to(torch.bfloat16).float()
    return codes, scales


def dequantised(codes, scales):
    return (codes.double() - 8) * scales.T.double().repeat_interleave(GROUP, 1)


def tinygemm(k, n, all_rows):
    copies = max(6, -(-ROTATED_BYTES // (k * n // 2)))
    codes, scales = random_int4(k, n)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
    # tinygemm's weight is (code - 8) * scale + zero.
    grid = torch.stack([scales, torch.zeros_like(scales)], 2).to(torch.bfloat16).contiguous()
    weights = [packed.clone() for _ in range(copies)]
    exact_weight = dequantised(codes, scales)
    for rows in (rows for rows in all_rows if rows <= TINYGEMM_ROWS):
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        multiply = lambda w: torch.ops.aten._weight_int4pack_mm(x, w, GROUP, grid)
        took = graph_time(multiply, weights, rows)
        yield "tinygemm bf16", rows, took, error(multiply(weights[0]), x.double() @ exact_weight.T)


def humming(k, n, all_rows, only_compile=False):
    try:
        from humming.layer import HummingLayer
    except ImportError as reason:
        print(f"Humming not run: {reason}")
        return
    copies = max(6, -(-ROTATED_BYTES // (k * n // 2)))
    codes, scales = random_int4(k, n)
    # GPTQ's layout: eight codes of consecutive input features in a word.
    words = torch.zeros(k // 8, n, device="cuda", dtype=torch.int64)
    for i in range(8):
        words |= codes.T[i::8].long() << (4 * i)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    tensors = {
        "qweight": words,
        "scales": scales.half(),
        "qzeros": torch.full((k // GROUP, n // 8), 0x77777777, device="cuda", dtype=torch.int32),
        "g_idx": torch.arange(k, device="cuda", dtype=torch.int32) // GROUP,
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}

    def layer():
        made = HummingLayer(shape_n=n, shape_k=k, weight_config=dict(config), torch_dtype=torch.float16).cuda()
        made.load_from_tensors({name: tensor.clone() for name, tensor in tensors.items()})
        made.transform()
        return made

    layers = [layer()]
    layers += [copy.deepcopy(layers[0]) for _ in range(0 if only_compile else copies - 1)]
    inputs = {rows: torch.randn(rows, k, device="cuda", dtype=torch.float16) for rows in all_rows}
    # A kernel for each number of rows, compiled side by side.
    with concurrent.futures.ThreadPoolExecutor(len(all_rows)) as pool:
        list(pool.map(lambda x: layers[0](x), inputs.values()))
    if only_compile:
        return
    exact_weight = dequantised(codes, scales)
    for rows, x in inputs.items():
        took = graph_time(lambda made: made(x), layers, rows)
        yield "Humming fp16", rows, took, error(layers[0](x), x.double() @ exact_weight.T)


class Ours:
    """The kernels of this project, each with a name of its own."""

    __name__ = "ours"

    def __init__(self, program, costs, kernels, more_rows):
        self.more_rows = more_rows
        self.command = [program, "--tsv"]
        self.command += [f"--costs={costs}"] if costs else []
        self.command += [f"--kernels={kernels}"] if kernels else ["--selected"]
        self.selected = {}

    def __call__(self, k, n, all_rows):
        filters = [f"{k}x{n} fp16 sym M={rows} " for rows in {*all_rows, *self.more_rows}]
        output = subprocess.run([*self.command, *filters], capture_output=True, text=True, check=True).stdout
        for line in output.splitlines():
            cells = line.split("\t")
            if len(cells) != 10:
                print(line)
                continue
            rows, name = int(cells[3]), cells[4]
            if cells[9] == "1":
                self.selected[(k, n), rows] = name
            yield name, rows, tuple(map(float, cells[5:8])), float(cells[8])


def compile_humming(shapes, rows):
    """A process for each shape, and a thread for each number of rows."""
    if len(shapes) == 1:
        list(humming(*shapes[0], rows, only_compile=True))
        return
    command = [sys.executable, __file__, "--compile", "--rows", ",".join(map(str, rows))]
    processes = [subprocess.Popen([*command, f"{k}x{n}"]) for k, n in shapes]
    for process in processes:
        process.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peers", default="cublas,tinygemm,humming")
    parser.add_argument("--ours", default=OURS)
    parser.add_argument("--costs")
    parser.add_argument("--kernels")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--our-rows", default="")
    parser.add_argument("shapes", nargs="*")
    options = parser.parse_args()
    all_rows = [int(rows) for rows in options.rows.split(",")]
    shapes = [(k, n) for k, n in SHAPES if not options.shapes or f"{k}x{n}" in options.shapes]
    if options.compile:
        compile_humming(shapes, all_rows)
        return
    more_rows = [int(rows) for rows in options.our_rows.split(",") if rows]
    ours = Ours(options.ours, options.costs, options.kernels, more_rows)
    if not os.path.exists(options.ours):
        print(f"ours not run: there is no {options.ours}")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    found = {}

    def end(*_):
        """What is there, and nothing more is waited for."""
        table(found, ours.selected)
        sys.stdout.flush()
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    peers = [peer for peer in (cublas, tinygemm, humming) if peer.__name__ in options.peers.split(",")]
    for shape in shapes:
        k, n = shape
        for peer in [ours, *peers] if os.path.exists(options.ours) else peers:
            begin = time.monotonic()
            torch.cuda.empty_cache()
            try:
                for name, rows, took, err in peer(k, n, all_rows):
                    found.setdefault((shape, rows), []).append((took, err, name, peer.__name__))
                    line = f"{k}x{n} M={rows:<4} {name:<16} {took[0]:8.2f} ({took[1]:8.2f}, {took[2]:8.2f}) us"
                    print(f"{line}  error {err:.1e}", flush=True)
            except Exception as reason:  # A peer that fails must not hide the others.
                print(f"{k}x{n} {peer.__name__} failed: {type(reason).__name__}: {reason}", flush=True)
            print(f"{k}x{n} {peer.__name__}: {time.monotonic() - begin:.1f} s", flush=True)
    table(found, ours.selected)


def cell(timed, best):
    """Median, spread and error; bold if no other is faster."""
    if timed is None:
        return ""
    (median, fastest, slowest), err, _, _ = timed
    median = f"**{median:.1f}**" if timed is best else f"{median:.1f}"
    return f"{median} ({fastest:.1f}-{slowest:.1f}; {err:.1e})".replace("e-0", "e-")


def table(found, selected):
    print("\n| K x N | M | ours | kernel | cuBLAS fp16 | tinygemm bf16 | Humming fp16 | ours / best peer |")
    print("|---|---|---|---|---|---|---|---|")
    for ((k, n), rows), timed in sorted(found.items(), key=lambda item: (SHAPES.index(item[0][0]), item[0][1])):
        of = lambda peer: min((entry for entry in timed if entry[3] == peer), default=None)
        chosen = [entry for entry in timed if entry[2] == selected.get(((k, n), rows))]
        ours = chosen[0] if chosen else of("ours")
        peers = [of(peer) for peer in ("cublas", "tinygemm", "humming")]
        best_peer = min((peer for peer in peers if peer), default=None)
        if not best_peer:
            continue
        best = min(entry for entry in [ours, best_peer] if entry)
        name = ours[2].removeprefix("cuda-") if ours else ""
        if ours and of("ours") is not ours:
            name += f" ({of('ours')[2].removeprefix('cuda-')} {of('ours')[0][0]:.1f})"
        ratio = f"{ours[0][0] / best_peer[0][0]:.2f}" if ours else ""
        cells = [cell(ours, best), name, *(cell(peer, best) for peer in peers), ratio]
        print(f"| {k} x {n} | {rows} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
