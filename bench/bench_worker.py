"""What serving costs: tokens/s of a worker over HTTP, streamed, against bare loops over the same model in the same run.

`python -m bench.bench_worker [--model demo --batch 1 32 --rounds 3]`. Two loops, each a process of its own: one of
plain torch (functional.linear, a contiguous cache, SDPA), and one of the worker's engine without sockets and tokenizer.
In turn A B C, C B A; medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

PORT = 31977
PROMPT = "The quick brown fox jumps over the lazy dog. " * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--new", type=int, default=192, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    for batch in options.batch:
        found: dict[str, list[float]] = {"plain torch": [], "our layers": [], "over HTTP": []}
        for round_ in range(options.rounds):
            for name in list(found)[:: 1 if round_ % 2 == 0 else -1]:
                found[name].append(MEASURES[name](options, batch))
        plain = statistics.median(found["plain torch"])
        for name, speeds in found.items():
            median = statistics.median(speeds)
            spread = f"{min(speeds):.0f} to {max(speeds):.0f}"
            print(
                f"batch {batch:<3d} {name:12s} {median:6.0f} tok/s ({spread}) {median / plain:5.2f}x plain torch",
                flush=True,
            )


def over_http(options: argparse.Namespace, batch: int) -> float:
    """Tokens/s from the first token of the last stream to the first end of a stream."""
    command = [sys.executable, "-m", "warmroute_worker.launch_worker", "--model-path", options.model]
    command += ["--device", "cpu", "--port", str(PORT), "--threads", str(options.threads), "--log-level", "error"]
    worker = subprocess.Popen(command)
    try:
        return asyncio.run(_streams(batch, options.new, worker))
    finally:
        worker.terminate()
        worker.wait()


async def _streams(batch: int, new: int, worker: subprocess.Popen[bytes]) -> float:
    url = f"http://127.0.0.1:{PORT}"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        while True:
            assert worker.poll() is None, "the worker ended"
            try:
                async with session.get("/health") as response:
                    if response.status == 200:
                        break
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
        times: list[list[tuple[float, int]]] = [[] for _ in range(batch)]
        """When an event came, and the tokens of the answer by then."""

        async def stream(index: int) -> None:
            body = {
                "text": f"{index} {PROMPT}",
                "stream": True,
                "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True},
            }
            async with session.post("/generate", json=body) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        tokens = int(line.rpartition(b'"completion_tokens":')[2].partition(b",")[0])
                        times[index].append((time.perf_counter(), tokens))

        await stream(0)
        times[0].clear()
        await asyncio.gather(*(stream(index) for index in range(batch)))
    begin, end = max(own[0][0] for own in times), min(own[-1][0] for own in times)

    def tokens_by(moment: float) -> int:
        return sum(max(tokens for when, tokens in own if when <= moment) for own in times)

    return (tokens_by(end) - tokens_by(begin)) / (end - begin)


def in_a_process(loop: Callable[[str, int, int, int], float]) -> Callable[[argparse.Namespace, int], float]:
    def measure(options: argparse.Namespace, batch: int) -> float:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_send, args=(loop, theirs, options.model, options.threads, batch, options.new))
        process.start()
        speed: float = ours.recv()
        process.join()
        return speed

    return measure


def _send(loop: Callable[[str, int, int, int], float], pipe: Connection, *arguments: Any) -> None:
    pipe.send(loop(*arguments))


def plain_torch(model: str, threads: int, batch: int, new: int) -> float:
    """A Llama decode step as one would write it down: a padded batch, a contiguous cache."""
    import torch
    from torch.nn import functional

    from warmroute_worker import model_config, model_folder
    from warmroute_worker.weights.safetensors_reader import SafetensorsReader

    torch.set_num_threads(threads)
    folder = model_folder.resolve(model)
    config = json.loads((folder / "config.json").read_text())
    ours = model_config.read(folder)
    reader = SafetensorsReader(folder, torch.float32, torch.device("cpu"), (128, 128))
    hidden, heads, kv_heads, dim, vocab = (
        ours.hidden_size,
        ours.num_heads,
        ours.num_kv_heads,
        ours.head_dim,
        ours.vocab_size,
    )
    inner, eps = config["intermediate_size"], ours.rms_norm_eps
    embedding = reader.tensor("model.embed_tokens.weight", (vocab, hidden))
    head = embedding if ours.tie_word_embeddings else reader.tensor("lm_head.weight", (vocab, hidden))
    final = reader.tensor("model.norm.weight", (hidden,))
    shapes = {
        "self_attn.q_proj": (heads * dim, hidden),
        "self_attn.k_proj": (kv_heads * dim, hidden),
        "self_attn.v_proj": (kv_heads * dim, hidden),
        "self_attn.o_proj": (hidden, heads * dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layers = [
        {name: reader.tensor(f"model.layers.{index}.{name}.weight", shape) for name, shape in shapes.items()}
        for index in range(ours.num_layers)
    ]
    prompt = torch.randint(0, 256, (batch, len(PROMPT)))
    length = prompt.shape[1] + new
    cache = torch.zeros(2, ours.num_layers, batch, kv_heads, length, dim)
    positions = torch.arange(length).float()
    angles = torch.outer(positions, 1.0 / ours.rope.theta ** (torch.arange(0, dim, 2).float() / dim)).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def turn(x: torch.Tensor, start: int) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        at = slice(start, start + x.shape[2])
        return x * cos[at] + torch.cat((-high, low), -1) * sin[at]

    def step(ids: torch.Tensor, start: int) -> torch.Tensor:
        x = embedding[ids]
        tokens = ids.shape[1]
        for index, layer in enumerate(layers):
            y = functional.rms_norm(x, (hidden,), layer["input_layernorm"], eps)
            q, k, v = (
                functional.linear(y, layer[f"self_attn.{name}_proj"]).view(batch, tokens, -1, dim).transpose(1, 2)
                for name in "qkv"
            )
            cache[0, index, :, :, start : start + tokens] = turn(k, start)
            cache[1, index, :, :, start : start + tokens] = v
            keys, values = cache[:, index, :, :, : start + tokens]
            causal = tokens > 1
            seen = functional.scaled_dot_product_attention(
                turn(q, start), keys, values, is_causal=causal, enable_gqa=True, scale=1 / math.sqrt(dim)
            )
            x = x + functional.linear(seen.transpose(1, 2).flatten(2), layer["self_attn.o_proj"])
            y = functional.rms_norm(x, (hidden,), layer["post_attention_layernorm"], eps)
            y = functional.silu(functional.linear(y, layer["mlp.gate_proj"])) * functional.linear(
                y, layer["mlp.up_proj"]
            )
            x = x + functional.linear(y, layer["mlp.down_proj"])
        return functional.linear(functional.rms_norm(x[:, -1], (hidden,), final, eps), head).argmax(-1, keepdim=True)

    with torch.inference_mode():
        ids = step(prompt, 0)
        began = time.perf_counter()
        for place in range(prompt.shape[1], length - 1):
            ids = step(ids, place)
        return batch * (length - 1 - prompt.shape[1]) / (time.perf_counter() - began)


def our_layers(model: str, threads: int, batch: int, new: int) -> float:
    """The worker's own engine, called in a loop: no HTTP, no tokenizer."""
    from warmroute_worker import engine as engines
    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.messages import Generate, Sampling

    engine = engines.load(WorkerArgs(model, "bench", device="cpu", threads=threads, max_total_tokens=1 << 16))
    for index in range(batch):
        prompt = [(index * 13 + place * place) % 256 for place in range(len(PROMPT))]
        engine.scheduler.add(Generate(str(index), prompt, new, ignore_eos=True, sampling=Sampling(temperature=0)))
    while engine.scheduler.load().generation_tokens_total < 2 * batch:
        engine.step()
    tokens, began = engine.scheduler.load().generation_tokens_total, time.perf_counter()
    while not engine.is_idle:
        engine.step()
    return (engine.scheduler.load().generation_tokens_total - tokens) / (time.perf_counter() - began)


MEASURES: dict[str, Callable[[argparse.Namespace, int], float]] = {
    "plain torch": in_a_process(plain_torch),
    "our layers": in_a_process(our_layers),
    "over HTTP": over_http,
}


if __name__ == "__main__":
    main()
