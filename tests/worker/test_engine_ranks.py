"""Several ranks, each a process of its own, against transformers; and that they really share the work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from tests.worker.engine_fixtures import (
    FAMILIES,
    GREEDY,
    UNEVEN,
    greedy,
    last_logits,
    logits_of,
    make_model,
    make_reference,
)
from tests.worker.worker_process import until
from warmroute_worker import model_config, offline
from warmroute_worker.args import WorkerArgs
from warmroute_worker.comm.rank_links import CollectiveError
from warmroute_worker.comm.tensor_group import SharedMemoryGroup
from warmroute_worker.executor import model_runner
from warmroute_worker.executor.ranks import RankExecutor
from warmroute_worker.messages import Generate, Sampling
from warmroute_worker.model_config import ModelError
from warmroute_worker.startup_error import StartupError
from warmroute_worker.weights.safetensors_reader import SafetensorsReader
from warmroute_worker.weights.source import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tests.worker.engine_fixtures import Reference
    from warmroute_worker._native import Region
    from warmroute_worker.engine import Engine

SLOW = pytest.mark.slow
QUICK = ("Llama", "Mixtral", "DeepseekV3")
"""Families whose logits `make test` looks at; `make test-all` looks at all."""
LAYOUTS = {"tp 2": (2, 1), "tp 4": (4, 1), "pp 2": (1, 2), "tp 2, pp 2": (2, 2)}


def ranks(
    folder: Path, tp: int = 1, pp: int = 1, prepare: Callable[[], None] | None = None, **changes: Any
) -> AbstractContextManager[tuple[Engine, Region]]:
    settings: dict[str, Any] = {"device": "cpu", "threads": 1, "max_total_tokens": 4096, "watchdog_timeout": 60.0}
    args = WorkerArgs(str(folder), "tiny", tp_size=tp, pp_size=pp, **(settings | changes))
    return offline.ranks(args, prepare)


def answers(rows: list[Any]) -> list[list[int]]:
    return [row.token_ids for row in rows]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    name: str = request.param
    return make_reference(tmp_path_factory.mktemp(name), family=name)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("llama"))


def test_the_same_tokens(family: Reference) -> None:
    check_tokens(family, *LAYOUTS["tp 2"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp 4", "pp 2", "tp 2, pp 2"])
def test_the_same_tokens_with_other_layouts(family: Reference, layout: str) -> None:
    check_tokens(family, *LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["tp 4", "pp 2", "tp 2, pp 2"])
def test_the_same_tokens_of_llama(llama: Reference, layout: str) -> None:
    check_tokens(llama, *LAYOUTS[layout])


def test_stages_agree_on_rounded_steps(tmp_path: Path) -> None:
    """Deterministic mode, and a head in torch's order: the last stage cannot compute a step in one call."""
    reference = make_reference(tmp_path, tie_word_embeddings=True)
    with ranks(tmp_path, 1, 2, enable_deterministic_inference=True) as (engine, _):
        assert answers(greedy(engine, reference.prompts)) == reference.answers


def check_tokens(family: Reference, tp: int, pp: int) -> None:
    """Cold and warm, in chunks, all prompts at once."""
    with ranks(family.folder, tp, pp, chunked_prefill_size=64) as (engine, _):
        for _ in range(2):
            assert answers(greedy(engine, family.prompts)) == family.answers
            engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    ("tp", "pp"), [(2, 1), (6, 1), (2, 3), pytest.param(3, 1, marks=SLOW), pytest.param(1, 3, marks=SLOW)]
)
def test_sizes_that_do_not_divide(tmp_path: Path, tp: int, pp: int) -> None:
    """6 heads over 3 KV heads, vocabulary 331, MLP 100; 6 ranks share 3 KV heads, 2 ranks cut one in half."""
    reference = make_reference(tmp_path, 1, (3, 16, 50, 130), "Qwen2", **UNEVEN)
    with ranks(tmp_path, tp, pp) as (engine, _):
        assert answers(greedy(engine, reference.prompts)) == reference.answers


def _in_16_bits() -> None:
    model_runner._dtype = lambda *_: torch.bfloat16


def test_ranks_that_chose_another_dtype_do_not_begin(tmp_path: Path) -> None:
    """As on a host with other devices, where `auto` means something else."""
    make_model(tmp_path, "Llama")
    with pytest.raises((StartupError, CollectiveError)) as error, ranks(tmp_path, 2, prepare=_in_16_bits):
        pass
    assert str(error.value) == (
        "all ranks need the same --device and --dtype; found rank 0: float32 on cpu, rank 1: bfloat16 on cpu"
    )


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("layout", ["tp 2", "tp 2, pp 2"])
def test_tied_embeddings_and_biases(tmp_path: Path, changes: dict[str, Any], layout: str) -> None:
    reference = make_reference(tmp_path, 2, (3, 16, 50), **changes)
    tp, pp = LAYOUTS[layout]
    with ranks(tmp_path, tp, pp) as (engine, _):
        assert answers(greedy(engine, reference.prompts)) == reference.answers


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in FAMILIES])
@pytest.mark.parametrize("tp", [2, 4])
def test_logits_are_within_2e_4(tmp_path: Path, name: str, tp: int) -> None:
    model = make_model(tmp_path, name)
    prompts = [[(7 * n + 3 * k * k + k) % 320 for k in range(length)] for n, length in enumerate((1, 9, 33, 70))]
    with ranks(tmp_path, tp) as (engine, _):
        executor = engine.executor
        assert isinstance(executor, RankExecutor)
        for n, prompt in enumerate(prompts):
            engine.scheduler.add(Generate(str(n), prompt, 1, sampling=GREEDY))
        ours = logits_of(executor, engine.scheduler.schedule())
        worst = max((row - last_logits(model, prompt)).abs().max() for row, prompt in zip(ours, prompts, strict=True))
        assert 0 < worst < 2e-4
        engine.scheduler.apply(ours.argmax(dim=1).tolist())


@pytest.mark.parametrize("tp", [2, 4])
def test_bfloat16_is_as_close_as_transformers_own(tmp_path: Path, tp: int) -> None:
    """To what float32 gives; sums are taken in single precision and rounded once."""
    model = make_model(tmp_path, "Llama")
    prompts = [[(7 * n + 3 * k * k + k) % 320 for k in range(length)] for n, length in enumerate((9, 33, 70, 100))]
    exact = torch.stack([last_logits(model, prompt) for prompt in prompts])
    theirs = torch.stack([last_logits(model.bfloat16(), prompt).float() for prompt in prompts])
    with ranks(tmp_path, tp, dtype="bfloat16") as (engine, _):
        executor = engine.executor
        assert isinstance(executor, RankExecutor)
        for n, prompt in enumerate(prompts):
            engine.scheduler.add(Generate(str(n), prompt, 1, sampling=GREEDY))
        ours = logits_of(executor, engine.scheduler.schedule())
        assert 0 < (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()
        engine.scheduler.apply(ours.argmax(dim=1).tolist())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_small_pool_retracts_and_the_tokens_are_the_same(llama: Reference, layout: str) -> None:
    tp, pp = LAYOUTS[layout]
    pool: dict[str, Any] = {"max_total_tokens": 240, "page_size": 4, "schedule_conservativeness": 0.1}
    with ranks(llama.folder, tp, pp, None, **pool) as (engine, _):
        assert answers(greedy(engine, llama.prompts)) == llama.answers
        assert engine.scheduler.retractions_total > 0
        engine.scheduler.check_integrity()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_seed_gives_the_same_tokens(llama: Reference, layout: str) -> None:
    """Drawn, penalised and reported wherever tokens are drawn."""
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=11, frequency_penalty=0.3, logprobs=2)

    def rows(tp: int, pp: int) -> list[Any]:
        with ranks(llama.folder, tp, pp) as (engine, _):
            for n, prompt in enumerate(llama.prompts):
                engine.scheduler.add(Generate(str(n), prompt, 12, sampling=sampling))
            found = []
            while not engine.is_idle:
                found += engine.step().rows
            return sorted(found, key=lambda row: int(row.rid))

    alone, together = rows(1, 1), rows(*LAYOUTS[layout])
    assert answers(together) == answers(alone)
    for one, other in zip(alone, together, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert other.logprobs.own == pytest.approx(one.logprobs.own, abs=1e-3)
        assert [token for token, _ in other.logprobs.top] == [token for token, _ in one.logprobs.top]


@pytest.mark.parametrize("layout", ["tp 2", "tp 2, pp 2"])
def test_the_same_tokens_over_gloo(llama: Reference, layout: str) -> None:
    tp, pp = LAYOUTS[layout]
    with ranks(llama.folder, tp, pp, disable_custom_all_reduce=True) as (engine, region):
        assert answers(greedy(engine, llama.prompts)) == llama.answers
        assert engine.ready.collectives == "gloo"
        assert [region.status(rank)["all_reduce_calls"] for rank in range(tp * pp)] == [0] * tp * pp


def test_one_stage_or_two_give_the_same_bits(llama: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLANG_USE_1STAGE_ALLREDUCE: vectors of 64 KB and more; in two stages a rank also writes its part of the sum."""
    prompt = [(3 * k * k + k) % 320 for k in range(300)]

    def run(value: str) -> tuple[torch.Tensor, int]:
        # Children inherit the environment of the process that they are forked from, so they are told by themselves.
        monkeypatch.setenv("SGLANG_USE_1STAGE_ALLREDUCE", value)
        with ranks(llama.folder, 4, 1, _one_stage if value == "1" else _two_stages) as (engine, region):
            executor = engine.executor
            assert isinstance(executor, RankExecutor)
            before = region.get(1, "slot_bytes")
            engine.scheduler.add(Generate("r", prompt, 1, sampling=GREEDY))
            logits = logits_of(executor, engine.scheduler.schedule())
            engine.scheduler.apply(logits.argmax(dim=1).tolist())
            return logits, region.get(1, "slot_bytes") - before

    (one, bytes_of_one), (two, bytes_of_two) = run("1"), run("0")
    assert torch.equal(one, two)
    sums = 7 * len(prompt) * 64 * 4
    assert bytes_of_two - bytes_of_one == pytest.approx(sums / 4, abs=7 * 64)


def _one_stage() -> None:
    os.environ["SGLANG_USE_1STAGE_ALLREDUCE"] = "1"


def _two_stages() -> None:
    os.environ["SGLANG_USE_1STAGE_ALLREDUCE"] = "0"


def test_an_abort_while_plans_are_under_way(llama: Reference) -> None:
    with ranks(llama.folder, 1, 2) as (engine, _):
        for n, prompt in enumerate(llama.prompts):
            engine.scheduler.add(Generate(str(n), prompt, 32, sampling=GREEDY))
        for _ in range(4):
            engine.step()
        for n in range(0, len(llama.prompts), 2):
            engine.scheduler.abort(str(n))
        said: dict[str, list[int]] = {}
        while not engine.is_idle:
            for row in engine.step().rows:
                said.setdefault(row.rid, []).extend(row.token_ids)
        engine.scheduler.check_integrity()
        for _ in range(2):
            assert answers(greedy(engine, llama.prompts)) == llama.answers


# ---- who has what


def test_weight_bytes_per_rank_follow_the_formula(llama: Reference) -> None:
    """Hidden 64, MLP 128, 4 heads over 2 KV heads of 16, vocabulary 320, 3 layers, float32."""
    norms = (2 * 3 + 1) * 64

    def numbers(tp: int) -> int:
        kv_heads = max(2 // tp, 1)  # with 4 ranks two share one, and each has a copy
        attention = 64 * 16 * (4 // tp + 2 * kv_heads) + 64 * 16 * 4 // tp
        return 2 * 320 * 64 // tp + 3 * (attention + 3 * 64 * 128 // tp) + norms

    for tp in (1, 2, 4):
        with ranks(llama.folder, tp) as (engine, region):
            statuses = [region.status(rank) for rank in range(tp)]
            assert [status["weight_bytes"] for status in statuses] == [4 * numbers(tp)] * tp
            assert engine.ready.weight_bytes == 4 * numbers(tp) * tp
            pool = engine.ready.max_total_tokens * 3 * 2 * max(2 // tp, 1) * 16 * 4
            assert [status["pool_bytes"] for status in statuses] == [pool] * tp
            pids = {status["pid"] for status in statuses}
            assert len(pids) == tp
            assert os.getpid() in pids


def test_stages_have_their_layers_only(llama: Reference) -> None:
    with ranks(llama.folder, 1, 2) as (_, region):
        layer = 4 * (64 * 16 * (4 + 4 + 4) + 3 * 64 * 128 + 2 * 64)
        ends = 4 * 320 * 64
        assert [region.status(rank)["weight_bytes"] for rank in (0, 1)] == [layer + ends, 2 * layer + ends + 4 * 64]


def test_latent_rows_are_on_every_rank_and_experts_are_not(tmp_path: Path) -> None:
    make_model(tmp_path, "DeepseekV3")
    with ranks(tmp_path) as (engine, region):
        whole = region.status(0)["weight_bytes"]
        pool = engine.ready.kv_pool_bytes
    with ranks(tmp_path, 2) as (engine, region):
        assert [region.status(rank)["pool_bytes"] for rank in (0, 1)] == [pool, pool]
        halves = [region.status(rank)["weight_bytes"] for rank in (0, 1)]
        assert halves[0] == halves[1]
        assert whole / 2 < halves[0] < 0.6 * whole


def test_a_rank_reads_only_its_part(llama: Reference) -> None:
    """And what it reads is what it would have cut out of the whole."""
    reader = SafetensorsReader(llama.folder, torch.float32, torch.device("cpu"), (128, 128))
    name, shape = "model.layers.0.mlp.gate_proj.weight", (128, 64)
    whole = reader.tensor(name, shape)
    part = Part((range(3, 10), range(90, 128), range(3, 5)), range(7, 40))
    assert torch.equal(reader.tensor(name, shape, part=part), part.take(whole))
    wanted: list[object] = []

    class Slice:
        def __init__(self, stored: Any) -> None:
            self._stored = stored

        def get_shape(self) -> object:
            return self._stored.get_shape()

        def __getitem__(self, key: object) -> Any:
            wanted.append(key)
            return self._stored[key]

    class File:
        def get_slice(self, name: str) -> Slice:
            return Slice(file.get_slice(name))

    file = reader._file_of[name]
    reader._file_of[name] = File()
    reader.tensor(name, shape, part=Part.of_rows(range(64, 128)))
    assert wanted == [(slice(64, 128), slice(0, 64))]


@pytest.mark.parametrize("kind", ["fp8 blocks", "int8 rows"])
def test_a_part_is_dequantised_as_the_whole_is(tmp_path: Path, kind: str) -> None:
    """Blocks of 24 are cut by the parts' borders."""
    shape, draw = (100, 70), torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=draw)
    if kind == "fp8 blocks":
        stored, suffix = weight.to(torch.float8_e4m3fn), "_scale_inv"
        scale = torch.rand((5, 3), generator=draw) + 0.5
    else:
        stored, suffix = (weight * 30).to(torch.int8), "_scale"
        scale = torch.rand(100, generator=draw) + 0.5
    save_file({"w.weight": stored, "w.weight" + suffix: scale}, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path, torch.float32, torch.device("cpu"), (24, 24))
    whole = reader.tensor("w.weight", shape)
    for part in (
        Part.of_rows(range(50, 100)),
        Part(columns=range(35, 70)),
        Part((range(3, 60), range(7, 9)), range(23, 49)),
    ):
        assert torch.equal(reader.tensor("w.weight", shape, part=part), part.take(whole))


@pytest.mark.parametrize("tp", [2, 4])
def test_collectives_move_what_the_closed_form_says(llama: Reference, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per token two sums per layer and one for the embedding, each of the hidden size; per sampled row a share of the
    vocabulary. And the bytes written into slots are these, not a counter's fancy."""
    monkeypatch.setenv("SGLANG_USE_1STAGE_ALLREDUCE", "1")  # in two stages sums are written, too
    with ranks(llama.folder, tp, 1, _one_stage, num_continuous_decode_steps=1) as (engine, region):
        before = [region.status(rank) for rank in range(tp)]
        greedy(engine, llama.prompts)
        # The driver may have its tokens before the others have put down what they did.
        until(lambda: len({region.get(rank, "steps") for rank in range(tp)}) == 1, 5)
        after = [region.status(rank) for rank in range(tp)]
        tokens = sum(len(prompt) for prompt in llama.prompts) + 31 * len(llama.prompts)
        rows = 32 * len(llama.prompts)
        steps = after[0]["steps"] - before[0]["steps"]
        for rank in range(tp):
            moved = {key: after[rank][key] - before[rank][key] for key in after[rank]}
            assert moved["all_reduce_bytes"] == tokens * 64 * 4 * (2 * 3 + 1)
            assert moved["all_reduce_calls"] == steps * (2 * 3 + 1)
            assert moved["gather_bytes"] == rows * 320 // tp * 4
            if rank:  # the driver also writes plans
                assert moved["slot_bytes"] == moved["all_reduce_bytes"] + moved["gather_bytes"]


def test_stages_hand_on_each_token_once(llama: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks(llama.folder, 1, 2) as (engine, region):
        executor = engine.executor
        assert isinstance(executor, RankExecutor)
        plans: list[int] = []
        send = executor.links.send_plan

        def counting(data: bytes) -> None:
            plans.append(len(data))
            send(data)

        monkeypatch.setattr(executor.links, "send_plan", counting)
        before = region.status(0)["broadcast_bytes"]
        greedy(engine, llama.prompts)
        moved = region.status(0)["broadcast_bytes"] - before
        tokens = sum(len(prompt) for prompt in llama.prompts) + 31 * len(llama.prompts)
        assert moved == sum(plans) + tokens * 64 * 4


def test_stages_work_at_the_same_time(llama: Reference) -> None:
    """Two plans are under way whenever two requests run, and neither stage does more steps than the other."""
    with ranks(llama.folder, 1, 2) as (engine, region):
        for n, prompt in enumerate(llama.prompts):
            engine.scheduler.add(Generate(str(n), prompt, 32, sampling=GREEDY))
        under_way = []
        while not engine.is_idle:
            engine.step()
            under_way.append(engine._under_way)
        assert sum(under_way) > 0.8 * len(under_way)
        until(lambda: region.get(0, "steps") == region.get(1, "steps"), 5)
        steps = [region.status(rank)["steps"] for rank in (0, 1)]
        assert steps[0] == steps[1] > 40


@pytest.mark.slow
def test_a_rank_has_the_memory_of_its_share(tmp_path: Path) -> None:
    """From outside: what the kernel says that a rank holds, of a model of 252 MB."""
    make_model(tmp_path, "Llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "head_dim": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def held(tp: int) -> float:
        with ranks(tmp_path, tp, load_format="dummy") as (engine, region):
            greedy(engine, [[1, 2, 3]])
            pid = region.status(tp - 1)["pid"]
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024

    two, four = held(2), held(4)
    assert two < 127 + 220, "weights, and what torch takes for itself"
    assert 30 < two - four < 90, "59 MB fewer weights"


# ---- can these tests fail?


def _no_sum() -> None:
    SharedMemoryGroup.sum = lambda self, x: x  # type: ignore[method-assign]


def _half_a_sum() -> None:
    real = SharedMemoryGroup.sum
    SharedMemoryGroup.sum = lambda self, x: real(self, x * 0.5)  # type: ignore[method-assign]


def _one_layer_only() -> None:
    real = SharedMemoryGroup.sum
    calls = iter(range(1 << 30))
    SharedMemoryGroup.sum = (  # type: ignore[method-assign]
        lambda self, x: real(self, torch.zeros_like(x) if next(calls) % 7 == 3 else x)
    )


@pytest.fixture
def restored() -> Iterator[None]:
    real = SharedMemoryGroup.sum
    yield
    SharedMemoryGroup.sum = real  # type: ignore[method-assign]


@pytest.mark.parametrize("bug", [_half_a_sum, _one_layer_only])
def test_a_rank_that_adds_wrongly_is_seen(llama: Reference, bug: Callable[[], None]) -> None:
    with ranks(llama.folder, 2, prepare=bug) as (engine, _):
        wrong = answers(greedy(engine, llama.prompts))
    assert sum(a != b for a, b in zip(wrong, llama.answers, strict=True)) >= 6


def test_without_sums_the_answers_are_others(llama: Reference, restored: None) -> None:
    _no_sum()
    with ranks(llama.folder, 2, prepare=_no_sum) as (engine, _):
        wrong = answers(greedy(engine, llama.prompts))
    assert sum(a != b for a, b in zip(wrong, llama.answers, strict=True)) >= 6


# ---- what cannot be


@pytest.mark.parametrize(
    ("tp", "pp", "said"),
    [
        (3, 1, "--tp 3 does not divide the model's 4 attention heads; it can be 1, 2, 4"),
        (8, 1, "--tp 8 does not divide the model's 4 attention heads; it can be 1, 2, 4"),
        (1, 4, "--pp-size 4 is more than the model's 3 layers"),
    ],
)
def test_layouts_that_cannot_be_are_refused(llama: Reference, tp: int, pp: int, said: str) -> None:
    args = WorkerArgs(str(llama.folder), "tiny", tp_size=tp, pp_size=pp)
    with pytest.raises(ModelError, match=said):
        model_config.check_layout(model_config.read(llama.folder), args.layout)
