"""Two network namespaces are as good as two hosts: other addresses, another loopback, a cable that can be cut."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.worker.node_processes import START_SECONDS
from tests.worker.worker_process import until, worker_process

if TYPE_CHECKING:
    from collections.abc import Iterator

ASK = """
import json, sys, urllib.request
body = {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 20, "temperature": 0}}
request = urllib.request.Request(sys.argv[1] + "/generate", json.dumps(body).encode())
request.add_header("content-type", "application/json")
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


@contextlib.contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """Their names; 10.213.7.1 and 10.213.7.2, on ends called `wire`."""
    names = [f"warmroute-{os.getpid()}-{n}" for n in range(2)]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
            for n, name in enumerate(names):
                ip("-n", name, "address", "add", f"10.213.7.{n + 1}/24", "dev", "wire")
                ip("-n", name, "link", "set", "wire", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces need root and iproute2: {error}")
        yield names[0], names[1]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["--tp", "2"], ["--pp-size", "2"]], ids=str)
def test_two_hosts_and_a_cable_that_is_cut(layout: list[str]) -> None:
    flags = ["--model-path", "demo", "--device", "cpu", "--threads", "1", "--port", "0", "--max-total-tokens", "4096"]
    with worker_process(*flags) as alone:
        expected = answer(alone.url())
    flags += [*layout, "--nnodes", "2", "--dist-init-addr", "10.213.7.1:29500"]
    with contextlib.ExitStack() as stack:
        names = stack.enter_context(two_namespaces())
        launchers = [
            stack.enter_context(worker_process(*flags, "--node-rank", str(n), prefix=["ip", "netns", "exec", names[n]]))
            for n in range(2)
        ]
        url = launchers[0].url(START_SECONDS)
        assert answer(url, "ip", "netns", "exec", names[0]) == expected
        ip("-n", names[1], "link", "set", "wire", "down")
        cut = time.monotonic()
        until(lambda: all(launcher.process.poll() is not None for launcher in launchers), 15)
        assert time.monotonic() - cut < 10  # 4 s until it is certain, then as after a death
        assert [launcher.wait(1) for launcher in launchers] == [1, 1]
    for n, launcher in enumerate(launchers):
        said = f"node {1 - n} (10.213.7.{2 - n}) is gone: its connection ended"
        assert sum(said in line for line in launcher.stderr) == 1, launcher.stderr


def answer(url: str, *prefix: str) -> list[int]:
    done = subprocess.run([*prefix, sys.executable, "-c", ASK, url], check=True, capture_output=True, text=True)
    tokens: list[int] = json.loads(done.stdout)["output_ids"]
    return tokens
