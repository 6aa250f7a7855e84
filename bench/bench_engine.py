"""The engine alone, no HTTP: generated tokens per second by batch size, on random weights of the demo model's shape.

`python -m bench.bench_engine [--layers 4 --hidden 256 ...]`. Each number is the best of `--repeats` runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from warmroute_worker import engine as engines
from warmroute_worker.args import WorkerArgs
from warmroute_worker.messages import Generate, Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dtype", default="auto", help="of the engine")
    parser.add_argument("--checkpoint", default="float32", choices=["float32", "bfloat16"], help="its dtype")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = _engine(Path(folder), options)
        ready = engine.ready
        print(
            f"hidden {options.hidden}, {options.layers} layers, {ready.weight_bytes / 1e6:.0f} MB {ready.dtype} on "
            f"{ready.device}; prompt {options.prompt}, {options.new} new tokens, temperature {options.temperature}"
        )
        for batch in options.batch:
            runs = [
                decode(engine, batch, options.prompt, options.new, run, options.temperature)
                for run in range(options.repeats)
            ]
            tokens, seconds, ttft = min(runs, key=lambda run: run[1] / run[0])
            step_ms = seconds / tokens * batch * 1e3
            print(f"B={batch:<4d} {tokens / seconds:7.0f} tok/s {step_ms:8.2f} ms/step; prefill {ttft * 1e3:7.1f} ms")


def write_config(folder: Path, options: argparse.Namespace) -> None:
    """A Llama of the shape that the options say; `--load-format dummy` needs no more."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "dtype": options.checkpoint,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _engine(folder: Path, options: argparse.Namespace) -> engines.Engine:
    write_config(folder, options)
    args = WorkerArgs(
        str(folder),
        "bench",
        load_format="dummy",
        threads=options.threads,
        dtype=options.dtype,
        device=options.device,
        max_total_tokens=1 << 17,
    )
    return engines.load(args)


def decode(
    engine: engines.Engine, batch: int, prompt_tokens: int, new: int, run: int, temperature: float = 0.0
) -> tuple[int, float, float]:
    """(tokens, seconds) of the steps after the one that prefilled, and that one's seconds."""
    for index in range(batch):
        prompt = [(run * 7 + index * 13 + place * place) % 320 for place in range(prompt_tokens)]
        engine.scheduler.add(Generate(f"{run}-{index}", prompt, new, sampling=Sampling(temperature=temperature)))
    scheduler = engine.scheduler
    before = scheduler.load().generation_tokens_total
    started = time.perf_counter()
    while scheduler.load().generation_tokens_total < before + batch:
        engine.step()
    warm = time.perf_counter()
    before = scheduler.load().generation_tokens_total
    while not engine.is_idle:
        engine.step()
    return scheduler.load().generation_tokens_total - before, time.perf_counter() - warm, warm - started


if __name__ == "__main__":
    main()
