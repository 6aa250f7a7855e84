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
        watchdog_timeout=2.5,
        disable_custom_all_reduce=True,
        enable_priority_scheduling=True,
        enable_p2p_check=True,
        enable_torch_compile=True,
        bucket_time_to_first_token=(0.1, 0.5),
        bucket_inter_token_latency=(0.01,),
        bucket_e2e_request_latency=(1.0, 2.0, 4.0),
        attention_backend="triton",
        kv_events_config='{"publisher": "zmq"}',
        disable_cuda_graph=True,
        num_continuous_decode_steps=3,
        dp_size=2,
        enable_dp_attention=True,
        enable_dp_lm_head=True,
        load_balance_method="total_tokens",
        ep_size=2,
        moe_a2a_backend="deepep",
        moe_runner_backend="deep_gemm",
        deepep_mode="normal",
        enable_single_batch_overlap=True,
        ep_rows="expert",
        enable_eplb=True,
        ep_num_redundant_experts=4,
        eplb_rebalance_num_iterations=50,
        eplb_rebalance_layers_per_chunk=1,
        eplb_min_rebalancing_utilization_threshold=0.9,
        ep_dispatch_algorithm="dynamic",
        enable_two_batch_overlap=True,
        tbo_token_distribution_threshold=0.25,
        nnodes=2,
        node_rank=1,
        dist_init_addr="10.0.0.1:29500",
        dist_timeout=5.0,
    )
    argv: list[str] = []
    for field in dataclasses.fields(WorkerArgs):
        if field.name == "enable_deterministic_inference":  # not together with what moves experts
            assert parse(["--model-path", "m", "--enable-deterministic-inference"]).enable_deterministic_inference
            continue
        assert getattr(other, field.name) != field.default, f"{field.name} is not varied here"
        value = getattr(other, field.name)
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        argv += ["--" + field.name.replace("_", "-"), *map(str, values)]
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
        (
            ["--model-path", "m", "--tp", "2", "--ep", "2", "--enable-eplb", "--enable-deterministic-inference"],
            "--enable-deterministic-inference wants experts that stay where they are",
        ),
        (
            ["--model-path", "m", "--enable-torch-compile", "--enable-deterministic-inference"],
            "leave out one of them",
        ),
        *(
            (["--model-path", "m", f"--bucket-{name}", *values.split()], f"--bucket-{name} {said}")
            for name in ("time-to-first-token", "inter-token-latency", "e2e-request-latency")
            for values, said in (
                ("2 1", "must be numbers above 0 in ascending order, got 2 1"),
                ("1 1", "must be numbers above 0 in ascending order, got 1 1"),
                ("0 1", "must be numbers above 0 in ascending order, got 0 1"),
                ("1 nan", "must be numbers above 0 in ascending order, got 1 nan"),
                ("1 inf", "must be numbers above 0 in ascending order, got 1 inf"),
            )
        ),
        (["--model-path", "m", "--bucket-inter-token-latency"], "--bucket-inter-token-latency: expected at least one"),
        (["--model-path", "m", "--kv-events-config", "{"], "--kv-events-config is not JSON"),
        (["--model-path", "m", "--kv-events-config", "[]"], "--kv-events-config must be a JSON object"),
        (["--model-path", "m", "--kv-events-config", '{"port": 1}'], "--kv-events-config: port is not known"),
        (["--model-path", "m", "--kv-events-config", '{"publisher": "kafka"}'], "publisher must be zmq or null"),
        (["--model-path", "m", "--served-model", "x"], "--served-model"),
        (["--model-path", "m", "--tp", "0"], "--tp-size must be at least 1, got 0"),
        (["--model-path", "m", "--tp", "16", "--pp-size", "8"], "tp 16, pp 8 makes 128 ranks, the most is 64"),
        (["--model-path", "m", "--tp", "16", "--dp", "8"], "tp 16, dp 8 makes 128 ranks, the most is 64"),
        (["--model-path", "m", "--watchdog-timeout", "0"], "--watchdog-timeout must be above 0, got 0"),
        (["--model-path", "m", "--ep-size", "2"], "--ep-size 2 does not divide --tp-size 1; it can be 1"),
        (["--model-path", "m", "--tp", "4", "--ep", "3"], "--ep-size 3 does not divide --tp-size 4; it can be 1, 2, 4"),
        (
            ["--model-path", "m", "--tp", "6", "--dp", "4", "--enable-dp-attention"],
            "Constraint tp_size % dp_size == 0 not satisfied: --tp-size 6, --dp-size 4; with --enable-dp-attention "
            "--dp-size can be 1, 2, 3, 6",
        ),
        (["--model-path", "m", "--tp", "2", "--nnodes", "2"], "--nnodes wants --dist-init-addr HOST:PORT"),
        (
            ["--model-path", "m", "--dp", "2", "--nnodes", "2", "--dist-init-addr", "h:1"],
            "multi-node data parallel is not supported unless dp attention!",
        ),
        (["--model-path", "m", "--tp", "3", "--nnodes", "2", "--dist-init-addr", "h:1"], "--nnodes 2 does not divide"),
        (
            ["--model-path", "m", "--tp", "2", "--nnodes", "2", "--dist-init-addr", "h:1", "--node-rank", "2"],
            "--node-rank must be below --nnodes 2",
        ),
        (
            ["--model-path", "m", "--enable-eplb"],
            "--enable-eplb and --ep-num-redundant-experts are for --ep-size above",
        ),
        (
            ["--model-path", "m", "--tp", "2", "--ep", "2", "--enable-two-batch-overlap"],
            "--enable-two-batch-overlap wants --moe-a2a-backend other than none",
        ),
        (
            ["--model-path", "m", "--tbo-token-distribution-threshold", "2"],
            "--tbo-token-distribution-threshold must be",
        ),
        (["--model-path", "m", "--dist-timeout", "0"], "--dist-timeout must be above 0"),
        (["--model-path", "m", "--load-balance-method", "cache"], "--load-balance-method"),
        (["--model-path", "m", "--quantization", "fp8"], "--quantization is an SGLang option this worker does not"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        ("--tp 2", "tp_size", 2),
        ("--tensor-parallel-size 2", "tp_size", 2),
        ("--pp 2", "pp_size", 2),
        ("--pipeline-parallel-size 2", "pp_size", 2),
        ("--dp 2", "dp_size", 2),
        ("--data-parallel-size 2", "dp_size", 2),
        ("--tp 2 --ep 2", "ep_size", 2),
        ("--tp 2 --expert-parallel-size 2", "ep_size", 2),
        ("--tp 2 --nnodes 2 --nccl-init-addr h:1", "dist_init_addr", "h:1"),
        ("--model x", "model_path", "x"),
    ],
)
def test_aliases(argv: str, field: str, value: object) -> None:
    assert getattr(parse(["--model-path", "m", *argv.split()]), field) == value


def test_what_a_flag_became_is_said() -> None:
    def said(*argv: str) -> str:
        return "\n".join(parse(["--model-path", "m", *argv]).remarks())

    assert said("--tp", "2") == ""
    assert "--enable-dp-attention has no effect with --dp-size 1: it is off" in said("--enable-dp-attention")
    assert "--enable-dp-lm-head has no effect without DP attention" in said("--enable-dp-lm-head")
    assert "`launch_server --dp-size` starts as many workers" in said("--dp", "2")
    sends = said("--tp", "2", "--moe-a2a-backend", "nixl", "--moe-runner-backend", "triton")
    assert "--moe-a2a-backend nixl: --ep-size is 2, as --tp-size" in sends
    assert "--moe-a2a-backend nixl: the built-in all-to-all is used" in sends
    assert "--moe-runner-backend triton: grouped_mm of torch is used" in sends


@pytest.mark.parametrize(
    ("flags", "is_on", "of_rank"),
    [
        ("--tp 4 --dp 4 --enable-dp-attention --max-running-requests 10", True, (2, 512, 0.3)),
        ("--tp 4 --dp 4 --enable-dp-attention --chunked-prefill-size -1", True, (64, -1, 0.3)),
        ("--tp 4 --dp 2 --enable-dp-attention --schedule-conservativeness 2", True, (128, 1024, 0.6)),
        ("--dp 4", False, (256, 2048, 1.0)),
        ("--tp 4 --enable-dp-attention", False, (256, 2048, 1.0)),
    ],
)
def test_dp_attention_divides_what_is_the_workers(flags: str, is_on: bool, of_rank: tuple[int, int, float]) -> None:
    effective = parse(["--model-path", "m", *flags.split()]).effective()
    assert effective["enable_dp_attention"] is is_on
    told = tuple(effective[f"{name}_per_dp_rank"] for name in ("max_running_requests", "chunked_prefill_size"))
    assert (*told, effective["schedule_conservativeness"]) == of_rank


def test_dry_run_prints_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(["--model-path", "demo", "--tp", "3", "--dry-run"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "demo: tp 3; ranks: 3, schedulers: 1"
    assert [line.split()[:3] for line in out[-4:-1]] == [["0", "0", "0"], ["1", "0", "1"], ["2", "0", "2"]]
    assert out[-1].startswith("this would not start: --tp 3 does not divide the model's 8 attention heads")


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
