"""`--region-file`: a router that is killed and started again knows its workers and whose cache is warm."""

import subprocess
import sys
from pathlib import Path

from tests.e2e.fleet import Fleet, eventually, words
from tests.processes import free_port


def test_a_killed_router_comes_back_warm(fleet: Fleet, tmp_path: Path) -> None:
    region = tmp_path / "region"
    workers = fleet.fake_workers(3)
    router = fleet.router("--region-file", str(region))
    for worker in workers:
        assert router.post("/workers", {"url": worker.url, "labels": {"zone": "a"}})[0] == 202
    assert router.post("/workers", {"url": "http://127.0.0.1:9", "api_key": "its-own-secret"})[0] == 202
    router.wait_for_workers(3)
    before = {worker["url"]: worker["id"] for worker in router.workers()}
    prompts = [words(200, seed) for seed in range(12)]
    homes = [router.chat("s", prompt)["system_fingerprint"] for prompt in prompts]
    assert len(set(homes)) == 3
    eventually("the registry is in the file", lambda: workers[2].url.encode() in region.read_bytes())
    router.process.kill()
    assert b"its-own-secret" not in region.read_bytes()
    assert region.stat().st_mode & 0o777 == 0o600

    router = fleet.router("--region-file", str(region))
    router.wait_for_workers(3)
    after = router.workers()
    assert {worker["url"]: worker["id"] for worker in after} == {
        url: before[url] for url in before if not url.endswith(":9")
    }
    assert {worker["labels"]["zone"] for worker in after} == {"a"}
    assert "had a key of its own, which is not kept: register it again" in router.process.log_tail()
    assert [router.chat("s", prompt)["system_fingerprint"] for prompt in prompts] == homes
    predicted = [target["predicted_cached_tokens"] for worker in router.workers() for target in worker["targets"]]
    assert all(tokens > 0 for tokens in predicted), predicted


def test_a_file_that_cannot_be_used_is_told(fleet: Fleet, tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    diary.write_text("dear diary")
    router = fleet.router("--region-file", str(tmp_path / "region"))
    for path, reason in (
        (diary, "it is not a region of a router, and is left alone"),
        (tmp_path / "no" / "region", "No such file or directory"),
        (tmp_path / "region", "another router has it open"),
    ):
        command = [sys.executable, "-m", "warmroute.launch_router", "--region-file", str(path)]
        ports = ["--port", str(free_port()), "--prometheus-port", str(free_port())]
        refused = subprocess.run([*command, *ports], capture_output=True, text=True, timeout=30, check=False)
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"launch_router: error: cannot use {path}: {reason}")
        assert refused.stderr.endswith("(--region-file)\n")
    assert diary.read_text() == "dear diary"
    router.process.kill()
    smaller = fleet.router("--region-file", str(tmp_path / "region"), "--index-memory", str(2 << 20))
    assert "begins empty: it was made by another version, or for another --index-memory" in smaller.process.log_tail()
