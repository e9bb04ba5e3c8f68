"""How close a call the routers' choices are, by MLX's own arithmetic: in each held-out text the smallest distances of the last chosen
expert's logit to the first one left out, with the token's position and the layer.

    python mlx_margins.py

Beside the choices that the benchmark `accuracy` finds to differ between two backends: those are ties down to rounding, or one is wrong.
Needs mlx-lm 0.31.
"""

import json
from pathlib import Path

import mlx.core as mx
from mlx_lm import load
from mlx_lm.models.qwen3_moe import Qwen3MoeSparseMoeBlock as Block

MODEL = Path(__file__).parents[2] / "models/flash-tiny-moe"


def main() -> None:
    mx.set_default_device(mx.cpu)
    model, _ = load(str(MODEL))
    model.set_dtype(mx.float32)
    block, layers = Block.__call__, []

    def watched(self, x):
        logits = mx.sort(self.gate(x), axis=-1)
        layers.append((logits[..., -self.top_k] - logits[..., -self.top_k - 1])[0])
        return block(self, x)

    Block.__call__ = watched
    for name, tokens in json.loads((MODEL / "golden/heldout_tokens.json").read_text()).items():
        layers.clear()
        mx.eval(model(mx.array(tokens)[None]))
        gaps = sorted((gap, token, layer) for layer, gaps in enumerate(layers) for token, gap in enumerate(gaps.tolist()))
        print(f"{name:<14}", *(f"{gap:.1e} (token {token}, layer {layer})" for gap, token, layer in gaps[:3]), flush=True)


main()
