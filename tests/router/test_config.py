"""Configuration and command line: defaults, origins, what is refused and how."""

import dataclasses
from pathlib import Path

import pytest

from warmroute.command_line import parse_router_command_line
from warmroute.config import ConfigError, RouterConfig
from warmroute.refused_flags import REFUSED_FLAGS


def test_seed_documents_command_line() -> None:
    """The exact example of the documents the product implements."""
    argv = """--worker-urls http://worker1:8000 http://worker2:8000 --policy cache_aware --cache-threshold 0.5
        --balance-abs-threshold 32 --balance-rel-threshold 1.5 --eviction-interval-secs 120 --max-tree-size 67108864
        --host 0.0.0.0 --port 30000"""
    config = parse_router_command_line(argv.split(), {}).config
    assert config == RouterConfig(worker_urls=("http://worker1:8000", "http://worker2:8000"))


def test_origins() -> None:
    environment = {"WARMROUTE_PORT": "777", "WARMROUTE_POLICY": "random", "WARMROUTE_DISABLE_RETRIES": "yes"}
    settings = parse_router_command_line(["--policy", "round_robin", "--api-key", "s3cret"], environment)
    shown = settings.with_drawn(seed=5).shown()
    assert shown["policy"] == {"value": "round_robin", "origin": "command line"}
    assert shown["port"] == {"value": 777, "origin": "environment"}
    assert shown["disable_retries"] == {"value": True, "origin": "environment"}
    assert shown["cache_threshold"] == {"value": 0.5, "origin": "default"}
    assert shown["seed"] == {"value": 5, "origin": "drawn at start"}
    assert shown["api_key"]["value"] == "***"
    assert shown.keys() == {field.name for field in dataclasses.fields(RouterConfig)}


def test_lists_accumulate() -> None:
    argv = ["--worker-urls", "a:1", "b:2", "--worker-urls", "c:3", "--prometheus-duration-buckets", "0.1", "1", "10"]
    config = parse_router_command_line(argv, {}).config
    assert config.worker_urls == ("a:1", "b:2", "c:3")
    assert config.prometheus_duration_buckets == (0.1, 1.0, 10.0)
    assert parse_router_command_line([], {"WARMROUTE_WORKER_URLS": "a:1,b:2"}).config.worker_urls == ("a:1", "b:2")


BAD_VALUES = [
    ("cache_threshold", 1.01),
    ("cache_threshold", -0.1),
    ("cache_threshold", float("nan")),
    ("balance_abs_threshold", -1),
    ("balance_rel_threshold", 0.99),
    ("balance_rel_threshold", float("inf")),
    ("eviction_interval_secs", 0.0),
    ("max_tree_size", 0),
    ("index_memory", 1000),
    ("policy", "best"),
    ("seed", -1),
    ("hash_seed", 1 << 64),
    ("host", " "),
    ("port", 0),
    ("port", 65536),
    ("prometheus_port", 0),
    ("prometheus_port", 30000),
    ("prometheus_host", ""),
    ("prometheus_duration_buckets", ()),
    ("prometheus_duration_buckets", (1.0, 0.5)),
    ("max_payload_size", 0),
    ("request_timeout_secs", 0.0),
    ("request_timeout_secs", float("inf")),
    ("shutdown_grace_period_secs", -1.0),
    ("request_id_headers", ()),
    ("request_id_headers", ("x request id",)),
    ("worker_urls", ("ftp://worker",)),
    ("worker_urls", ("worker:8000", "http://worker:8000")),
    ("retry_max_retries", 0),
    ("retry_initial_backoff_ms", 0),
    ("retry_max_backoff_ms", 10),
    ("retry_backoff_multiplier", 0.9),
    ("retry_jitter_factor", 1.1),
    ("cb_failure_threshold", 0),
    ("cb_success_threshold", 0),
    ("cb_timeout_duration_secs", 0.0),
    ("cb_window_duration_secs", 0.0),
    ("health_failure_threshold", 0),
    ("health_success_threshold", 0),
    ("health_check_timeout_secs", 0.0),
    ("health_check_interval_secs", 0.0),
    ("health_check_endpoint", "health"),
    ("worker_startup_timeout_secs", 0.0),
    ("worker_startup_check_interval", 0.0),
    ("log_level", "loud"),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_bad_value_is_refused_and_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        RouterConfig(**{name: value})  # type: ignore[arg-type]
    assert caught.value.name == name
    shown = value[-1] if name == "worker_urls" and isinstance(value, tuple) else value
    assert str(caught.value).startswith(f"{name}: {shown!r} ")


def test_api_key_is_refused_without_repeating_it() -> None:
    with pytest.raises(ConfigError) as caught:
        RouterConfig(api_key="two\nlines")
    assert "two" not in str(caught.value)


def test_power_of_two_needs_two() -> None:
    with pytest.raises(ConfigError, match="at least 2 workers"):
        RouterConfig(policy="power_of_two", worker_urls=("a:1",))
    assert RouterConfig(policy="power_of_two").worker_urls == ()  # they may come by POST /workers


COMPLAINTS = [
    ("--no-such-flag", "--no-such-flag"),
    ("--cache 0.5", "--cache"),  # no abbreviations
    ("--policy best", "cache_aware"),
    ("--port x", "--port"),
    ("--cache-threshold 2", "cache_threshold: 2.0"),
    ("--prefill http://a:1 9000", "--prefill: prefill/decode"),
    *((f"--{flag} x", reason) for flag, reason in REFUSED_FLAGS.items()),
]


@pytest.mark.parametrize(("line", "complaint"), COMPLAINTS)
def test_command_line_complains_in_one_line(line: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_router_command_line(line.split(), {})
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert complaint in output.err
    assert output.err.count("\n") == 1


def test_bad_environment_names_the_variable(capsys: pytest.CaptureFixture[str]) -> None:
    for variable, value in (("WARMROUTE_PORT", "x"), ("WARMROUTE_STRICT_MODEL", "maybe")):
        with pytest.raises(SystemExit):
            parse_router_command_line([], {variable: value})
        assert f"{variable}: {value!r}" in capsys.readouterr().err


def test_no_flag_is_both_built_and_refused() -> None:
    built = {field.name.replace("_", "-") for field in dataclasses.fields(RouterConfig)}
    assert not built & REFUSED_FLAGS.keys()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RouterConfig)])
def test_every_field_is_read_by_some_logic(name: str) -> None:
    package = Path(__file__).parents[2] / "python" / "warmroute"
    sources = [path for path in package.rglob("*.py") if path.name not in ("config.py", "command_line.py")]
    assert any(f"config.{name}" in path.read_text() for path in sources)


def test_help_shows_every_flag_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_router_command_line(["--help"], {})
    assert caught.value.code == 0
    shown = capsys.readouterr().out.split("options:")[1]
    for field in dataclasses.fields(RouterConfig):
        lines = [line for line in shown.splitlines() if line.startswith(f"  --{field.name.replace('_', '-')}")]
        assert len(lines) >= 1, field.name
    assert "--prefill" not in shown
