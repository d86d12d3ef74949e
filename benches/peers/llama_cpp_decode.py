"""Times llama.cpp on random Q4_0 weights of the TinyLlama 1.1B shape, for comparison with
`cargo run --release -p gptq-examples --example bench_decode -- --shape tinyllama-1.1b --threads 2 --prompt 512 --new 64`.

    CMAKE_ARGS="-DGGML_NATIVE=ON" venv/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf
    venv/bin/python benches/peers/llama_cpp_decode.py [threads=2] [prompt=512] [new=64]
"""

import os
import sys
import tempfile
import time

import gguf
import numpy as np
from llama_cpp import Llama

threads, prompt, new = (int(a) for a in (sys.argv[1:] + ["2", "512", "64"][len(sys.argv) - 1 :]))
LAYERS, HIDDEN, INTER, HEADS, KV_HEADS, VOCAB = 22, 2048, 5632, 32, 4, 32000
random = np.random.default_rng(0)


def q4_0(rows, cols):
    blocks = random.integers(0, 256, (rows, cols // 32, 18), dtype=np.uint8)
    blocks[:, :, :2] = np.frombuffer(np.float16(0.004).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def q6_k(rows, cols):
    blocks = random.integers(0, 256, (rows, cols // 256, 210), dtype=np.uint8)
    blocks[:, :, 208:] = np.frombuffer(np.float16(1e-5).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def write(path):
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(LAYERS)
    out.add_context_length(2048)
    out.add_embedding_length(HIDDEN)
    out.add_feed_forward_length(INTER)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(HIDDEN // HEADS)
    out.add_vocab_size(VOCAB)
    out.add_tokenizer_model("llama")
    out.add_token_list([f"<{i}>" for i in range(VOCAB)])
    out.add_token_scores([0.0] * VOCAB)
    out.add_token_types([1] * VOCAB)
    kinds = gguf.GGMLQuantizationType
    norm = np.ones(HIDDEN, np.float32)
    out.add_tensor("token_embd.weight", q4_0(VOCAB, HIDDEN), raw_dtype=kinds.Q4_0)
    out.add_tensor("output.weight", q6_k(VOCAB, HIDDEN), raw_dtype=kinds.Q6_K)
    out.add_tensor("output_norm.weight", norm)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (INTER, HIDDEN), "ffn_up": (INTER, HIDDEN), "ffn_down": (HIDDEN, INTER),
    }
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            out.add_tensor(f"blk.{layer}.{name}.weight", q4_0(*shape), raw_dtype=kinds.Q4_0)
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{layer}.{name}.weight", norm)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "model.gguf")
    write(path)
    size = os.path.getsize(path)
    model = Llama(path, n_ctx=prompt + new + 8, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = random.integers(3, VOCAB, prompt).tolist()
    model.eval(ids)  # warm: page cache, thread pool
    best_prefill = best_decode = 0.0
    for _ in range(3):
        model.reset()
        start = time.perf_counter()
        model.eval(ids)
        best_prefill = max(best_prefill, prompt / (time.perf_counter() - start))
        start = time.perf_counter()
        for token in range(new):
            model.eval([100 + token])
        best_decode = max(best_decode, new / (time.perf_counter() - start))
print(f"llama.cpp, Q4_0, {size / 2**20:.0f} MiB, {threads} threads, best of three")
print(f"prefill of {prompt}: {best_prefill:.1f} tok/s, decode: {best_decode:.1f} tok/s")
