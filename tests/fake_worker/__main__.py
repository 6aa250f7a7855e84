"""`python -m tests.fake_worker --port N`"""

import argparse
import asyncio
import signal

import uvloop

from tests.fake_worker.script import Script
from tests.fake_worker.server import FakeWorker


async def serve(arguments: argparse.Namespace) -> None:
    worker = FakeWorker(
        models=tuple(arguments.model),
        dp_size=arguments.dp_size,
        kv_tokens=arguments.kv_tokens,
        page_tokens=arguments.page_tokens,
        dialect=arguments.dialect,
        lean=arguments.lean,
        mortal=True,
    )
    worker.script = Script(chunks=arguments.chunks, chunk_seconds=arguments.chunk_seconds)
    await worker.start(arguments.host, arguments.port)
    print(f"fake worker at {worker.url}", flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await worker.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="A scripted fake worker for tests and benchmarks.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free one, printed")
    parser.add_argument("--model", nargs="+", default=["fake-model"])
    parser.add_argument("--dp-size", type=int, default=1)
    parser.add_argument("--kv-tokens", type=int, default=262_144, help="per dp rank")
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--dialect", choices=["sglang", "vllm"], default="sglang")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--chunk-seconds", type=float, default=0.0)
    parser.add_argument("--lean", action="store_true", help="prebuilt answers, nothing recorded: for benchmarks")
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
