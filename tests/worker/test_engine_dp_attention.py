"""Data-parallel ranks that go in step, each a process, against transformers: over all ways to divide attention and
experts; and that caches, pools and admission are each rank's own while MLPs and experts are everybody's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.worker.driver_fixtures import drivers
from tests.worker.engine_fixtures import GREEDY, NEW_TOKENS, make_reference
from tests.worker.worker_process import worker_process
from warmroute_worker import model_folder
from warmroute_worker.command_line import parse
from warmroute_worker.messages import Generate, Profile

if TYPE_CHECKING:
    from tests.worker.engine_fixtures import Reference
    from warmroute_worker.offline_drivers import Drivers

SLOW = pytest.mark.slow
FAMILIES = ("DeepseekV2", "DeepseekV3", "Qwen3Moe", "Mixtral", "Llama")
SENT = {"moe_a2a_backend": "deepep"}


def layout(tp: int, dp: int = 1, ep: int = 1, *, sent: bool = False, pp: int = 1) -> dict[str, Any]:
    settings: dict[str, Any] = {"tp_size": tp, "dp_size": dp, "enable_dp_attention": dp > 1, "pp_size": pp}
    return settings | (SENT if sent else {"ep_size": ep})


LAYOUTS = {
    "tp 2, ep 2": layout(2, ep=2),
    "tp 2, rows sent": layout(2, sent=True),
    "tp 2, dp 2": layout(2, 2),
    "tp 2, dp 2, ep 2": layout(2, 2, 2),
    "tp 2, dp 2, rows sent": layout(2, 2, sent=True),
    "tp 4, dp 2, ep 2": layout(4, 2, 2),
    "tp 4, dp 2, rows sent": layout(4, 2, sent=True),
    "tp 4, dp 4, rows sent": layout(4, 4, sent=True),
    "tp 4, dp 4": layout(4, 4),
    "tp 2, dp 2, ep 2, pp 2": layout(2, 2, 2, pp=2),
    "tp 2, dp 2, rows sent, pp 2": layout(2, 2, sent=True, pp=2),
}
QUICK = {
    ("DeepseekV3", "tp 2, dp 2, ep 2"),
    ("DeepseekV3", "tp 2, dp 2, ep 2, pp 2"),
    ("DeepseekV2", "tp 2, dp 2, rows sent"),
    ("Qwen3Moe", "tp 2, dp 2, ep 2"),
    ("Mixtral", "tp 2, ep 2"),
    ("Llama", "tp 2, dp 2"),
}
"""The others come with `make test-all`."""


def cases() -> list[Any]:
    found = []
    for family in FAMILIES:
        names = [name for name in LAYOUTS if family != "Llama" or ("ep" not in name and "sent" not in name)]
        names += ["tp 4, dp 2"] * (family == "Llama")
        found += [
            pytest.param(family, name, marks=() if (family, name) in QUICK else SLOW, id=f"{family}: {name}")
            for name in names
        ]
    return found


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    return {family: make_reference(tmp_path_factory.mktemp(family), family=family) for family in FAMILIES}


@pytest.fixture(scope="module")
def deepseek(references: dict[str, Reference]) -> Reference:
    return references["DeepseekV3"]


def requests(reference: Reference, dp_size: int) -> list[tuple[int, Generate]]:
    """The prompts, in turn over the ranks."""
    return [
        (n % dp_size, Generate(str(n), prompt, NEW_TOKENS, sampling=GREEDY))
        for n, prompt in enumerate(reference.prompts)
    ]


@pytest.mark.parametrize(("family", "name"), cases())
def test_the_same_tokens(references: dict[str, Reference], family: str, name: str) -> None:
    """Cold and warm, in chunks."""
    reference = references[family]
    changes = LAYOUTS.get(name) or layout(4, 2)
    with drivers(reference.folder, chunked_prefill_size=64, **changes) as worker:
        for _ in range(2):
            assert worker.answers(requests(reference, worker.args.dp_size)) == reference.answers


@pytest.mark.parametrize(
    "changes",
    [
        layout(2, 2, sent=True) | {"disable_custom_all_reduce": True},
        layout(4, 2, 2) | {"enable_dp_lm_head": True},
        pytest.param(layout(2, 2, sent=True) | {"ep_rows": "expert"}, marks=SLOW),
        pytest.param(layout(2, 2, 2) | {"moe_runner_backend": "grouped_mm"}, marks=SLOW),
        pytest.param(layout(2, 2, sent=True) | {"moe_runner_backend": "grouped_mm"}, marks=SLOW),
        pytest.param(layout(2, 2, 2) | {"enable_deterministic_inference": True}, marks=SLOW),
        layout(2, 2, sent=True) | {"enable_deterministic_inference": True},
    ],
    ids=["gloo", "dp head", "row per expert", "grouped", "grouped, rows sent", "deterministic", "deterministic, sent"],
)
def test_other_ways_to_the_same_tokens(deepseek: Reference, changes: dict[str, Any]) -> None:
    with drivers(deepseek.folder, chunked_prefill_size=64, **changes) as worker:
        assert worker.answers(requests(deepseek, worker.args.dp_size)) == deepseek.answers


@pytest.mark.parametrize(
    ("tied", "ranks"), [(True, 2), pytest.param(True, 4, marks=SLOW), pytest.param(False, 4, marks=SLOW)]
)
def test_a_dense_model_with_tied_embeddings(tmp_path: Path, tied: bool, ranks: int) -> None:
    reference = make_reference(tmp_path, 3, (3, 16, 50), tie_word_embeddings=tied)
    with drivers(tmp_path, **layout(ranks, 2)) as worker:
        assert worker.answers(requests(reference, 2)) == reference.answers


def test_replicas_are_alone(deepseek: Reference) -> None:
    """Without DP attention each has the whole model, and goes at its own pace."""
    with drivers(deepseek.folder, dp_size=2) as worker:
        assert worker.answers(requests(deepseek, 2)) == deepseek.answers
        first, second = worker.statuses()
        assert first["weight_bytes"] == second["weight_bytes"]
        assert first["idle_steps"] == second["idle_steps"] == 0
        assert sum(rank["all_reduce_calls"] + rank["gather_calls"] for rank in (first, second)) == 0
        assert len({first["pid"], second["pid"], os.getpid()}) == 3


def test_prefill_decode_and_idle_in_one_step(deepseek: Reference, tmp_path: Path) -> None:
    with drivers(deepseek.folder, chunked_prefill_size=64, **layout(4, 4, sent=True)) as worker:
        for dp_rank in range(4):
            worker.send(dp_rank, Profile(1, str(tmp_path)))
        worker.until(lambda: len(worker.replies) == 4)
        worker.send(0, Generate("long", deepseek.prompts[0], 120, ignore_eos=True, sampling=GREEDY))
        worker.until(lambda: len(worker.rows["long"]) > 3)
        worker.send(1, Generate("prompt", deepseek.prompts[7] * 2, 4, ignore_eos=True, sampling=GREEDY))
        worker.until(worker.finished(["long", "prompt"]))
        for dp_rank in range(4):
            worker.send(dp_rank, Profile(2, None))
        worker.until(lambda: len(worker.replies) == 8)
    modes: dict[str, set[str]] = {}
    files = sorted(tmp_path.glob("rank*.trace.json"))
    assert len(files) == 4
    for path in files:
        for event in json.loads(path.read_text())["traceEvents"]:
            name = event.get("name", "")
            if event.get("cat") == "user_annotation" and name.startswith("step "):
                number, _, what = name.removeprefix("step ").partition(": ")
                modes.setdefault(number, set()).add(what.split()[0])
    assert {"prefill", "decode", "idle"} in modes.values()


def kv_bytes(worker: Drivers) -> list[int]:
    return [status["stored_bytes"] for status in worker.statuses()]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=SLOW)])
def test_each_token_is_cached_once(deepseek: Reference, ranks: int) -> None:
    """Latent rows are the same for all heads: with plain tensor parallelism every rank has all of them."""
    stored = {}
    for name, changes in (("plain", layout(ranks)), ("dp", layout(ranks, ranks))):
        with drivers(deepseek.folder, **changes) as worker:
            assert worker.answers(requests(deepseek, worker.args.dp_size)) == deepseek.answers
            stored[name] = kv_bytes(worker)
    assert len(set(stored["plain"])) == 1
    assert sum(stored["dp"]) == stored["plain"][0]
    assert all(0 < own < stored["plain"][0] * 2 / ranks for own in stored["dp"])


def test_what_one_rank_has_cached_another_has_not(deepseek: Reference) -> None:
    prompt = deepseek.prompts[7]
    with drivers(deepseek.folder, **layout(2, 2)) as worker:

        def cached(rid: str, dp_rank: int) -> int:
            assert worker.answers([(dp_rank, Generate(rid, prompt, 2, sampling=GREEDY))]) == [deepseek.answers[7][:2]]
            return worker.rows[rid][-1].cached_tokens

        assert cached("cold", 0) == 0
        assert cached("elsewhere", 1) == 0
        assert cached("again", 0) == cached("there again", 1) == len(prompt) // 16 * 16


def test_a_full_rank_leaves_others_admitting(deepseek: Reference) -> None:
    """A pool holds one request of this size; those that want rank 0 wait for each other, rank 1's do not wait."""
    prompt = deepseek.prompts[7]
    with drivers(deepseek.folder, max_total_tokens=256, **layout(2, 2)) as worker:
        waiting = [Generate(f"waits {n}", [n, *prompt], 100, ignore_eos=True, sampling=GREEDY) for n in range(4)]
        for request in waiting:
            worker.send(0, request)
        worker.until(lambda: bool(worker.rows["waits 0"]))
        assert worker.answers([(1, Generate("other", prompt, 4, sampling=GREEDY))]) == [deepseek.answers[7][:4]]
        assert not worker.rows["waits 3"]
        loads = {dp_rank: output.load for dp_rank, output in worker.outputs}
        assert loads[0].waiting >= 2
        assert loads[1].waiting == 0
        worker.until(worker.finished([request.rid for request in waiting]))


def test_a_stopped_rank_stalls_all_others(deepseek: Reference) -> None:
    with drivers(deepseek.folder, **layout(2, 2)) as worker:
        worker.send(0, Generate("runs", deepseek.prompts[2], 400, ignore_eos=True, sampling=GREEDY))
        worker.until(lambda: len(worker.rows["runs"]) > 5)
        pid = worker.statuses()[1]["pid"]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.3)  # what was under way
        before = worker.statuses()[0]["steps"]
        time.sleep(1.0)
        assert worker.statuses()[0]["steps"] == before
        os.kill(pid, signal.SIGCONT)
        worker.until(worker.finished(["runs"]))


@pytest.mark.parametrize("pp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_when_nobody_has_anything_all_sleep(deepseek: Reference, pp: int) -> None:
    """And who gets work wakes the others, again and again."""
    with drivers(deepseek.folder, **layout(2, 2, 2, pp=pp)) as worker:
        for n in range(4):
            prompt = deepseek.prompts[n]
            asked = [(n % 2, Generate(f"{n}", prompt, 8, ignore_eos=True, sampling=GREEDY))]
            assert worker.answers(asked) == [deepseek.answers[n][:8]]
            time.sleep(0.5)  # the last round
            before = [rank["gather_calls"] for rank in worker.statuses()]
            time.sleep(0.5)
            assert [rank["gather_calls"] for rank in worker.statuses()] == before


def test_bytes_between_ranks(deepseek: Reference) -> None:
    """Per layer everybody's rows once to the MLP and once back, and the vectors of those that get a token."""
    with drivers(deepseek.folder, **layout(2, 2, 2)) as worker:
        before = worker.statuses()
        worker.answers(requests(deepseek, 2))
        after = worker.statuses()
        tokens = sum(map(len, deepseek.prompts)) + len(deepseek.prompts) * (NEW_TOKENS - 1)
        sampled = len(deepseek.prompts) * NEW_TOKENS
        vector, layers, logits = 64 * 4, 3, 320 * 4
        gathered = sum(rank["gather_bytes"] - old["gather_bytes"] for rank, old in zip(after, before, strict=True))
        calls = sum(rank["gather_calls"] - old["gather_calls"] for rank, old in zip(after, before, strict=True))
        # In every step each rank takes part in one per layer, and in two for the head: every step here draws something.
        records = calls - sum(rank["steps"] for rank in after) * (layers + 2)
        assert gathered == tokens * layers * vector + sampled * (vector + logits) + records * 64
        reduced = [rank["reduce_scatter_bytes"] for rank in after]
        assert reduced == [tokens * layers * vector] * 2, "each rank has a part of the sums of all rows"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_ranks(tmp_path: Path) -> None:
    """`launch_worker --tp 8 --dp 8 --ep 8 --enable-dp-attention`, as /debug/ranks tells it: an eighth of the cached
    tokens on each rank on average, all of them once; without DP attention eight times."""
    lengths = (9, 12, 40, 17, 33, 60, 21, 50)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    reference = make_reference(tmp_path, lengths=lengths, family="DeepseekV3", **heads)
    demo = Path(model_folder.__file__).parent / "demo_model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, tmp_path)
    spread = ["--dp", "8", "--enable-dp-attention"]
    stored = {}
    for name, flags in (
        ("plain", []),
        ("dp", [*spread, "--ep", "8"]),
        ("sent", [*spread, "--moe-a2a-backend", "deepep"]),
    ):
        shape = ["--model-path", str(tmp_path), "--port", "0", "--tp", "8", "--max-total-tokens", "4096"]
        with worker_process(*shape, "--device", "cpu", *flags) as worker:
            url = worker.url(180)
            size = httpx.get(url + "/server_info").json()["dp_size"]

            def answer(place: int, url: str = url, size: int = size) -> list[int]:
                body = {
                    "input_ids": reference.prompts[place],
                    "routed_dp_rank": place % size,
                    "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS},
                }
                answered = httpx.post(url + "/generate", json=body, timeout=180).raise_for_status().json()
                assert answered["meta_info"]["dp_rank"] == place % size
                return list(answered["output_ids"])

            with ThreadPoolExecutor(len(lengths)) as pool:
                assert list(pool.map(answer, range(len(lengths)))) == reference.answers
            ranks = httpx.get(url + "/debug/ranks").json()["ranks"]
            assert [rank["dp_rank"] for rank in ranks] == (list(range(8)) if size == 8 else [0] * 8)
            assert len({rank["pid"] for rank in ranks}) == 8
            stored[name] = [rank["stored_bytes"] for rank in ranks]
    assert len(set(stored["plain"])) == 1
    assert sum(stored["dp"]) == stored["plain"][0]
    assert sum(stored["plain"]) == 8 * sum(stored["dp"])
    assert stored["dp"] == stored["sent"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tp", "4", "--dp", "3", "--enable-dp-attention"], "Constraint tp_size % dp_size == 0 not satisfied"),
        (["--tp", "4", "--dp", "3", "--enable-dp-attention"], "--dp-size can be 1, 2, 4"),
        (["--tp", "4", "--ep", "3"], "--ep-size 3 does not divide --tp-size 4; it can be 1, 2, 4"),
        (["--dp", "2", "--nnodes", "2", "--dist-init-addr", "a:1"], "not supported unless dp attention!"),
        (["--tp", "2", "--enable-eplb"], "--enable-eplb and --ep-num-redundant-experts are for --ep-size above 1"),
        (["--tp", "2", "--ep", "2", "--enable-two-batch-overlap"], "wants --moe-a2a-backend other than none"),
    ],
)
def test_what_cannot_be_divided_is_refused(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(["--model-path", "demo-moe", *flags])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_dense_model_is_allowed_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    for model, warned in (("demo", True), ("demo-moe", False)):
        with pytest.raises(SystemExit) as done:
            parse(["--model-path", model, "--tp", "2", "--dp", "2", "--enable-dp-attention", "--dry-run"])
        assert done.value.code == 0
        assert ("a model without experts is allowed" in capsys.readouterr().out) is warned


def test_what_has_no_effect_is_said() -> None:
    args = parse(["--model-path", "demo", "--tp", "2", "--enable-dp-attention"])
    assert args.effective()["enable_dp_attention"] is False
    assert any("no effect" in line for line in args.remarks())
    args = parse(["--model-path", "demo-moe", "--tp", "2", "--moe-a2a-backend", "mooncake"])
    assert args.effective()["ep_size"] == 2
    assert args.effective()["moe_a2a_backend"] == "built-in all-to-all"
    assert any("mooncake" in line for line in args.remarks())
