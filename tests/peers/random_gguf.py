"""A Q4_0 GGUF of random weights in the shape of one of `flashctl bench synth`'s models or of the bundled one, for llama.cpp to run beside
ours.

    pip install gguf && python random_gguf.py OUT.gguf qwen3-30b-a3b|olmoe|bundled [LAYERS]

It has no tokenizer; llama-bench needs none. Codes have zero mean and what returns to the residual is small: otherwise all tokens
are routed alike, and caches hold what they need.
"""

import sys

import gguf
import numpy as np

# layers, hidden, heads, kv heads, head size, experts, top k, expert width, vocabulary, context, rope theta, whether the head is the embedding
SHAPES = {
    "qwen3-30b-a3b": (48, 2048, 32, 4, 128, 128, 8, 768, 151_936, 40_960, 1e6, False),
    "olmoe": (16, 2048, 16, 16, 128, 64, 8, 1024, 50_304, 4_096, 1e4, False),
    "bundled": (8, 384, 6, 2, 64, 64, 8, 128, 8_192, 2_048, 1e4, True),
}

Q4_0 = gguf.GGMLQuantizationType.Q4_0
BLOCK = np.dtype([("scale", "<f2"), ("codes", "u1", 16)])
random = np.random.default_rng(1)


def codes(*dims: int, small: bool = False):
    """Shape in bytes, type and maker of a matrix of 4-bit codes whose rows have a norm of about one."""

    def make() -> np.ndarray:
        count = int(np.prod(dims)) // 32
        # To draw 17 GB takes minutes. What is repeated lies elsewhere in memory, so caches gain nothing.
        pool = np.empty(min(count, 1 << 20), BLOCK)
        pool["codes"] = random.integers(0, 256, (len(pool), 16), dtype=np.uint8)
        # Codes less 8 deviate by 4.6, around -1/2: signs that change make that 0.
        pool["scale"] = random.choice([-1, 1], len(pool)) * (0.02 if small else 1.0) / (4.6 * dims[-1] ** 0.5)
        return np.resize(pool, count).view(np.uint8)

    return (*dims[:-1], dims[-1] // 32 * BLOCK.itemsize), Q4_0, make


def floats(make, *dims: int):
    return dims, gguf.GGMLQuantizationType.F32, lambda: make(dims).astype(np.float32)


def tensors(layers, hidden, heads, kv_heads, head, experts, width, vocab, tied):
    yield "token_embd.weight", codes(vocab, hidden)
    yield "output_norm.weight", floats(np.ones, hidden)
    if not tied:
        yield "output.weight", codes(vocab, hidden)
    for at in (f"blk.{layer}" for layer in range(layers)):
        yield f"{at}.attn_norm.weight", floats(np.ones, hidden)
        yield f"{at}.attn_q_norm.weight", floats(np.ones, head)
        yield f"{at}.attn_k_norm.weight", floats(np.ones, head)
        yield f"{at}.ffn_norm.weight", floats(np.ones, hidden)
        yield f"{at}.attn_q.weight", codes(heads * head, hidden)
        yield f"{at}.attn_k.weight", codes(kv_heads * head, hidden)
        yield f"{at}.attn_v.weight", codes(kv_heads * head, hidden)
        yield f"{at}.attn_output.weight", codes(hidden, heads * head, small=True)
        yield f"{at}.ffn_gate_inp.weight", floats(lambda dims: random.standard_normal(dims) / hidden**0.5, experts, hidden)
        yield f"{at}.ffn_gate_exps.weight", codes(experts, width, hidden)
        yield f"{at}.ffn_up_exps.weight", codes(experts, width, hidden)
        yield f"{at}.ffn_down_exps.weight", codes(experts, hidden, width, small=True)


def main(path: str, shape: str, layers: str | None = None) -> None:
    (all_layers, hidden, heads, kv_heads, head, experts, top_k, width, vocab, context, theta, tied) = SHAPES[shape]
    layers = int(layers or all_layers)
    out = gguf.GGUFWriter(path, "qwen3moe")
    out.add_block_count(layers)
    out.add_context_length(context)
    out.add_embedding_length(hidden)
    out.add_feed_forward_length(width)
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_key_length(head)
    out.add_value_length(head)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_freq_base(theta)
    out.add_expert_count(experts)
    out.add_expert_used_count(top_k)
    out.add_expert_feed_forward_length(width)
    out.add_vocab_size(vocab)
    out.add_tokenizer_model("no_vocab")
    out.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    made = list(tensors(layers, hidden, heads, kv_heads, head, experts, width, vocab, tied))
    for name, (dims, kind, _) in made:
        out.add_tensor_info(name, dims, np.dtype(np.uint8 if kind == Q4_0 else np.float32), int(np.prod(dims)) * (1 if kind == Q4_0 else 4), kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    for _, (_, _, make) in made:
        out.write_tensor_data(make())
    out.close()


main(*sys.argv[1:])
