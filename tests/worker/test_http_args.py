"""The worker's command line: values, defaults, refusals; and which folder `--model-path` means."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from warmroute_worker import model_folder
from warmroute_worker.args import WorkerArgs
from warmroute_worker.command_line import parse

if TYPE_CHECKING:
    from pathlib import Path


def test_defaults_and_every_field_has_a_flag() -> None:
    args = parse(["--model-path", "/models/tiny"])
    assert args == WorkerArgs(model_path="/models/tiny", served_model_name="/models/tiny")
    other = WorkerArgs(
        model_path="demo",
        served_model_name="tiny",
        host="::1",
        port=0,
        device="cpu",
        dtype="bfloat16",
        page_size=4,
        max_total_tokens=4096,
        mem_fraction_static=0.5,
        max_running_requests=8,
        chunked_prefill_size=-1,
        context_length=128,
        random_seed=7,
        load_format="dummy",
        threads=1,
        log_level="debug",
        max_queued_requests=0,
        drain_timeout=1.5,
        schedule_policy="lpm",
        schedule_conservativeness=0.5,
        tp_size=4,
        pp_size=2,
        dp_size=2,
        enable_dp_attention=True,
        enable_dp_lm_head=True,
        load_balance_method="total_tokens",
        ep_size=2,
        moe_a2a_backend="nixl",
        moe_runner_backend="triton",
        ep_rows="expert",
        enable_eplb=True,
        ep_num_redundant_experts=4,
        eplb_rebalance_num_iterations=10,
        eplb_rebalance_layers_per_chunk=1,
        eplb_min_rebalancing_utilization_threshold=0.9,
        ep_dispatch_algorithm="dynamic",
        enable_two_batch_overlap=True,
        tbo_token_distribution_threshold=0.3,
        nnodes=2,
        node_rank=1,
        dist_init_addr="10.0.0.1:5000",
        dist_timeout=5.0,
        watchdog_timeout=2.5,
        disable_custom_all_reduce=True,
        enable_deterministic_inference=True,
        enable_priority_scheduling=True,
        enable_p2p_check=True,
        attention_backend="triton",
        kv_events_config='{"publisher": "zmq"}',
        disable_cuda_graph=True,
    )
    argv: list[str] = []
    for field in dataclasses.fields(WorkerArgs):
        assert getattr(other, field.name) != field.default, f"{field.name} is not varied here"
        value = getattr(other, field.name)
        argv += ["--" + field.name.replace("_", "-"), *([] if value is True else [str(value)])]
    assert parse(argv) == other
    assert WorkerArgs.from_json(other.to_json()) == other


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--model-path"),
        (["--model-path", ""], "--model-path must not be empty"),
        (["--model-path", "m", "--port", "70000"], "--port must be between 0 and 65535, got 70000"),
        (["--model-path", "m", "--page-size", "0"], "--page-size must be at least 1, got 0"),
        (["--model-path", "m", "--schedule-conservativeness", "0"], "--schedule-conservativeness must be between 0"),
        (["--model-path", "m", "--page-size", "x"], "--page-size: invalid int value: 'x'"),
        (["--model-path", "m", "--max-total-tokens", "8"], "--max-total-tokens must hold at least one page of 16"),
        (["--model-path", "m", "--mem-fraction-static", "1.5"], "--mem-fraction-static must be between 0 and 1"),
        (["--model-path", "m", "--chunked-prefill-size", "0"], "--chunked-prefill-size must be at least 1, or -1"),
        (["--model-path", "m", "--max-queued-requests", "-1"], "--max-queued-requests must not be negative"),
        (["--model-path", "m", "--drain-timeout", "-1"], "--drain-timeout must not be negative"),
        (["--model-path", "m", "--random-seed", "-1"], "--random-seed must be between 0 and"),
        (["--model-path", "m", "--device", "tpu"], "--device"),
        (["--model-path", "m", "--attention-backend", "mine"], "--attention-backend"),
        (["--model-path", "m", "--no-such-flag"], "--no-such-flag"),
        (["--model-path", "m", "--kv-events-config", "{"], "--kv-events-config is not JSON"),
        (["--model-path", "m", "--kv-events-config", "[]"], "--kv-events-config must be a JSON object"),
        (["--model-path", "m", "--kv-events-config", '{"port": 1}'], "--kv-events-config: port is not known"),
        (["--model-path", "m", "--kv-events-config", '{"publisher": "kafka"}'], "publisher must be zmq or null"),
        (["--model-path", "m", "--served-model", "x"], "--served-model"),
        (["--model-path", "m", "--tp", "0"], "--tp-size must be at least 1, got 0"),
        (["--model-path", "m", "--tp", "16", "--pp-size", "8"], "tp 16, pp 8 makes 128 ranks, the most is 64"),
        (["--model-path", "m", "--watchdog-timeout", "0"], "--watchdog-timeout must be above 0, got 0"),
        (["--model-path", "m", "--ep-size", "2"], "--ep-size 2 does not divide --tp-size 1; it can be 1"),
        (["--model-path", "m", "--nnodes", "2", "--tp", "2"], "--nnodes wants --dist-init-addr HOST:PORT"),
        (["--model-path", "m", "--nnodes", "2", "--tp", "3", "--dist-init-addr", "a:1"], "does not divide the 3 ranks"),
        (["--model-path", "m", "--moe-a2a-backend", "flashinfer"], "invalid choice: 'flashinfer'"),
        (["--model-path", "m", "--quantization", "fp8"], "--quantization is an SGLang option this worker does not"),
        (["--model-path", "m", "--enable-ep-moe"], "--enable-ep-moe is an SGLang option this worker"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_parallel_size_of_one_is_what_this_worker_does() -> None:
    assert parse(["--model-path", "m", "--tp", "1", "--ep-size", "1", "--dp", "1", "--nnodes", "1"]).port == 30000


def test_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(LookupError, match="there is no such folder"):
        model_folder.resolve(str(tmp_path / "absent"))
    with pytest.raises(LookupError, match=r"as a hub id it is not in .*hub; download it first"):
        model_folder.resolve("org/model")
    with pytest.raises(LookupError, match=r"there is no config\.json in"):
        model_folder.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert model_folder.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(LookupError, match="is not a folder"):
        model_folder.resolve(str(tmp_path / "config.json"))

    repository = tmp_path / "hub" / "models--org--model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc\n")
    assert model_folder.resolve("org/model") == snapshot
