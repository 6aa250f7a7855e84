"""The routers that are compared: ours, and peers from PyPI in environments of their own (made on first use)."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.processes import REPOSITORY

API_KEY = "bench"
PEERS = REPOSITORY / ".run" / "peers"


@dataclass(frozen=True)
class Ports:
    http: int
    prometheus: int


@dataclass(frozen=True)
class Contender:
    """`requirement` None: ours, from this environment. The peers' versions are pinned: a number names a version."""

    name: str
    requirement: str | None
    command: Callable[[Path, Ports, str, Sequence[str]], list[str]]
    """(python, ports, policy, worker urls) -> command line"""

    def python(self) -> Path:
        """Its interpreter; makes the environment when it is not there. Raises CalledProcessError when pip fails."""
        if self.requirement is None:
            return Path(sys.executable)
        folder = PEERS / self.name
        stamp = folder / "installed"
        if not stamp.exists() or stamp.read_text() != self.requirement:
            print(f"installing {self.requirement} into {folder.relative_to(REPOSITORY)}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", self.requirement], check=True)
            stamp.write_text(self.requirement)
        return folder / "bin" / "python"


def _ours(python: Path, ports: Ports, policy: str, workers: Sequence[str]) -> list[str]:
    return [str(python), "-m", "warmroute.launch_router", *_common(ports, policy, workers, "warn")]


def _sglang(python: Path, ports: Ports, policy: str, workers: Sequence[str]) -> list[str]:
    return [str(python), "-m", "sglang_router.launch_router", *_common(ports, policy, workers, "warn")]


def _smg(python: Path, ports: Ports, policy: str, workers: Sequence[str]) -> list[str]:
    return [str(python), "-m", "smg.launch_router", *_common(ports, policy, workers, "warn")]


def _vllm(python: Path, ports: Ports, policy: str, workers: Sequence[str]) -> list[str]:
    return [str(python), "-m", "vllm_router.launch_router", *_common(ports, policy, workers, "warning")]


def _common(ports: Ports, policy: str, workers: Sequence[str], log_level: str) -> list[str]:
    return [
        *("--host", "127.0.0.1", "--port", str(ports.http)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(ports.prometheus)),
        *("--policy", policy, "--log-level", log_level, "--api-key", API_KEY, "--worker-urls", *workers),
    ]


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("warmroute", None, _ours),
        Contender("vllm-router", "vllm-router==0.1.17", _vllm),
        Contender("sglang-router", "sglang-router==0.3.2", _sglang),
        # Its console script is overwritten by sglang-router's when both share an environment: hence `python -m`.
        Contender("smg", "smg==1.13.0", _smg),
    )
}
