"""flashd and llama.cpp in turn, in memory: tokens a second and their share of what memory allows.

    python llama.py --flashctl F --llama-bench L --model DIR --gguf FILE [--prompt 512] [--generate 64] [--rounds 7] [--repack 10]

Each round is one run of ours and one of llama.cpp's with and without repacked weights (`--repack 1`: only with, where that is known
to be faster), three repetitions each: a first one after loading is not its best. Medians of rounds; of llama.cpp's, for a round, the
better packing's median and its best repetition.
"""

import argparse
import json
import os
import subprocess
from statistics import median


def ours(args, prompt: int, generate: int) -> dict:
    command = [args.flashctl, "bench", args.model, "--cache", "100%", "--prompt", str(prompt), "--gen", str(generate), "--json"]
    # What follows that row is without a cache: nothing to compare.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bench:
        for event in map(json.loads, bench.stdout):
            if event["event"] == "row" and event["cache"] != "none" and event["state"] == "warm":
                bench.terminate()
                return event
    raise SystemExit("flashctl bench gave no warm row")


def theirs(args, flag: str, tokens: int) -> list[float]:
    """Of the better packing's repetitions."""
    none = "-p" if flag == "-n" else "-n"
    runs = []
    for repack in args.repack:
        command = [args.llama_bench, "-m", args.gguf, none, "0", flag, str(tokens), "-t", str(args.threads), "--repack", repack, "-o", "json"]
        found = json.loads(subprocess.run([*command, "-r", "3"], check=True, capture_output=True, text=True).stdout)
        runs.append(found[0]["samples_ts"])
    return max(runs, key=median)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ["flashctl", "llama-bench", "model", "gguf"]:
        parser.add_argument(f"--{name}", required=True)
    for name, value in [("prompt", 512), ("generate", 64), ("rounds", 7), ("threads", len(os.sched_getaffinity(0)))]:
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repack", default="10", help="1: repacked weights, 0: as they are")
    args = parser.parse_args()

    kinds = [("decode", "-n", args.generate, "decode_tok_s"), ("prefill", "-p", args.prompt, "prefill_tok_s")]
    found = {kind: [] for kind, _, tokens, _ in kinds if tokens}
    for _ in range(args.rounds):
        for kind, flag, tokens, speed in kinds:
            if not tokens:
                continue
            row = ours(args, 4, tokens) if kind == "decode" else ours(args, tokens, 0)
            samples = theirs(args, flag, tokens)
            figures = {
                "ours": row[speed],
                "llama.cpp": median(samples),
                "its best": max(samples),
                "ratio": row[speed] / median(samples),
                "to its best": row[speed] / max(samples),
            }
            if kind == "decode":
                figures["of the bound"] = row["of_overlapped"]
            found[kind].append(figures)
            print(kind, *(f"{name} {value:.4g}" for name, value in figures.items()), sep="  ", flush=True)
    for kind, rounds in found.items():
        print(f"median of {len(rounds)}: {kind}", *(f"{name} {median(r[name] for r in rounds):.4g}" for name in rounds[0]), sep="  ")


main()
