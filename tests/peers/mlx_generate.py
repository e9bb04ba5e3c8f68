"""MLX on the CPU in f32, by flashd and by mlx-lm in turn: the time of a decoded token of the bundled model, all in memory.

    python mlx_generate.py BENCH [--tokens 192] [--rounds 7]

BENCH is the benchmark `mlx`, as cargo built it. Needs mlx-lm 0.31 and the MLX that flashd is built with. mlx-lm is asked for tokens as
its `generate` does, which builds a step while the one before runs; both begin to count after 64.
"""

import argparse
import json
import subprocess
from pathlib import Path
from statistics import median
from time import perf_counter

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step

MODEL = Path(__file__).parents[2] / "models/flash-tiny-moe"
WARM_UP = 64


def ours(args) -> float:
    """Milliseconds, the median of tokens."""
    table = subprocess.run([args.bench, str(args.tokens), "1.0"], check=True, capture_output=True, text=True).stdout
    return float(table.split()[table.split().index("ms") - 1])


def theirs(args, model, prompt) -> float:
    times, last = [], perf_counter()
    for _ in generate_step(prompt, model, max_tokens=WARM_UP + args.tokens):
        times.append(perf_counter() - last)
        last = perf_counter()
    return 1e3 * median(times[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bench")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    mx.set_default_device(mx.cpu)
    model, _ = load(str(MODEL))
    model.set_dtype(mx.float32)
    prompt = mx.array(json.loads((MODEL / "golden/mlx_4bit_f32.json").read_text())["prompts"][0]["token_ids"])
    found = []
    for _ in range(args.rounds):
        a, b = ours(args), theirs(args, model, prompt)
        found.append((a, b, a / b))
        print(f"ours {a:.2f} ms  mlx-lm {b:.2f} ms  ratio {a / b:.3f}", flush=True)
    print("medians: ours {:.2f} ms, mlx-lm {:.2f} ms, ratio {:.3f}".format(*map(median, zip(*found))))


main()
