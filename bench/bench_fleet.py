"""Routers before eight mock engines over HTTP: SGLang's generated-shared-prefix workload, hit rate and throughput.

    python -m bench.bench_fleet                                      # warmroute's policies and sglang-router
    python -m bench.bench_fleet --kv-tokens 49152 --rounds 3

Engines are the simulator's (bench/mock_engines.py) in real time, faster by `--speed`; every router gets fresh ones.
Rounds run A B C, then C B A; the table shows medians. Engines and clients share one CPU, the router has the other.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from dataclasses import dataclass

import aiohttp

from bench.contenders import CONTENDERS, Ports
from bench.mock_engines import MODEL
from bench.simulator.workload import Request
from bench.simulator.workloads import generated_shared_prefix
from tests.processes import REPOSITORY, Processes, free_port

ENGINES = 8
READY_SECONDS = 60.0
CONFIGURATIONS = (
    ("warmroute", "cache_aware"),
    ("warmroute", "least_cost"),
    ("warmroute", "round_robin"),
    ("sglang-router", "cache_aware"),
    ("sglang-router", "round_robin"),
)


@dataclass(frozen=True)
class Result:
    hit_rate: float
    tokens_per_second: float
    """Of prompts and answers, in the engines' time."""
    first_token_p50: float
    first_token_p99: float
    failed: int


async def load(port: int, requests: list[tuple[float, bytes]], speed: float) -> Result:
    """`requests`: (when, body), in the engines' seconds."""
    first_tokens: list[float] = []
    prompt = cached = output = failed = 0
    begin = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=600)

    async def one(session: aiohttp.ClientSession, when: float, body: bytes) -> None:
        nonlocal prompt, cached, output, failed
        await asyncio.sleep(begin + when / speed - time.perf_counter())
        asked = time.perf_counter()
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        usage = None
        try:
            async with session.post(url, data=body, headers={"content-type": "application/json"}) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        if usage is None and event["choices"][0]["delta"].get("content"):
                            first_tokens.append((time.perf_counter() - asked) * speed)
                        usage = event.get("usage") or usage
        except aiohttp.ClientError:
            usage = None
        if usage is None:
            failed += 1
            return
        prompt += usage["prompt_tokens"]
        output += usage["completion_tokens"]
        cached += usage["prompt_tokens_details"]["cached_tokens"]

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(one(session, when, body) for when, body in requests))
    seconds = (time.perf_counter() - begin) * speed
    ordered = sorted(first_tokens) or [-1.0]
    p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return Result(cached / max(prompt, 1), (prompt + output) / seconds, p50, p99, failed)


def run(name: str, policy: str, requests: list[tuple[float, bytes]], kv_tokens: int, speed: float) -> Result:
    contender = CONTENDERS[name]
    python = contender.python()
    spread = len(os.sched_getaffinity(0)) > 1
    ports = [free_port() for _ in range(ENGINES)]
    with Processes(REPOSITORY / ".run" / "bench_fleet") as processes:
        engines = processes.start_module(
            "engines",
            "bench.mock_engines",
            *("--ports", *map(str, ports), "--kv-tokens", str(kv_tokens), "--speed", str(speed)),
            cpus={0} if spread else None,
        )
        for port in ports:
            engines.wait_until_ready(f"http://127.0.0.1:{port}/health", READY_SECONDS)
        router_ports = Ports(free_port(), free_port())
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        command = contender.command(python, router_ports, policy, urls)
        router = processes.start(f"{name}-{policy}", command, cpus={1} if spread else None)
        router.wait_until_ready(f"http://127.0.0.1:{router_ports.http}/readiness", READY_SECONDS)
        time.sleep(1.0)
        return asyncio.run(load(router_ports.http, requests, speed))


def bodies(seed: int) -> list[tuple[float, bytes]]:
    """The workload of the simulator, as HTTP requests."""
    made = []
    for number, session in enumerate(generated_shared_prefix(seed).sessions):
        body = json.loads(Request.make((), session.turns[0], -1 - number).body())
        body |= {"model": MODEL, "max_tokens": session.turns[0].output_tokens}
        made.append((session.start, json.dumps(body).encode()))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_fleet", description=__doc__)
    parser.add_argument("--kv-tokens", type=int, default=32_768)
    parser.add_argument("--speed", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    requests = bodies(arguments.seed)
    results: dict[tuple[str, str], list[Result]] = {}
    for number in range(arguments.rounds):
        for name, policy in CONFIGURATIONS[:: 1 if number % 2 == 0 else -1]:
            result = run(name, policy, requests, arguments.kv_tokens, arguments.speed)
            results.setdefault((name, policy), []).append(result)
            print(f"round {number + 1} {name} {policy}: {result}", flush=True)
    print("\n| router | policy | hit rate | tokens/s | TTFT p50 s | p99 s | failed |\n|---|---|---|---|---|---|---|")
    for key in CONFIGURATIONS:
        runs = results[key]
        print(
            f"| {key[0]} | {key[1]} | {statistics.median(r.hit_rate for r in runs):.1%} "
            f"| {statistics.median(r.tokens_per_second for r in runs):,.0f} "
            f"| {statistics.median(r.first_token_p50 for r in runs):.2f} "
            f"| {statistics.median(r.first_token_p99 for r in runs):.2f} | {sum(r.failed for r in runs)} |"
        )


if __name__ == "__main__":
    main()
