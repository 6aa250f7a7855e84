"""Checkpoints of bfloat16 on a CPU: kept in 16 bits, computed in float32, exactly as transformers does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.worker.engine_fixtures import (
    GREEDY,
    UNEVEN,
    greedy,
    load_engine,
    logits_of,
    make_model,
    make_reference,
)
from tests.worker.test_engine_ranks import ranks
from warmroute_worker.executor.ranks import RankExecutor
from warmroute_worker.layers import native
from warmroute_worker.messages import Generate

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not native.Matrix.usable, reason="products of our own need AVX2")

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "biases, uneven": ("Qwen2", UNEVEN),
    "tied": ("Qwen3", {"tie_word_embeddings": True}),
    "experts": ("Qwen3Moe", {}),
    "latent rows": ("DeepseekV3", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_as_transformers(tmp_path: Path, name: str) -> None:
    family, changes = MODELS[name]
    reference = make_reference(tmp_path, 2, family=family, kept=torch.bfloat16, **changes)
    assert reference.smallest_gap > 3e-5
    engine = load_engine(tmp_path)
    assert engine.ready.dtype == "float32"
    for _ in range(2):
        assert [row.token_ids for row in greedy(engine, reference.prompts)] == reference.answers
    for tp, pp in ((2, 1), (1, 2)):
        with ranks(tmp_path, tp, pp) as (divided, _):
            assert [row.token_ids for row in greedy(divided, reference.prompts)] == reference.answers, (tp, pp)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "tied"])
def test_the_same_bits_as_from_the_same_numbers_in_float32(tmp_path: Path, name: str) -> None:
    """A tied head is multiplied by another routine there."""
    family, changes = MODELS[name]
    logits = []
    for kept in (torch.bfloat16, torch.float32):
        folder = tmp_path / str(kept)
        rounded = make_model(folder, family, kept=torch.bfloat16, **changes)
        if kept == torch.float32:
            rounded.save_pretrained(folder)
        engine = load_engine(folder)
        assert isinstance(engine.executor, RankExecutor)
        for count in (1, 9, 33):
            prompt = [(7 * count + 3 * k * k + k) % 320 for k in range(count)]
            engine.scheduler.add(Generate(str(count), prompt, 1, sampling=GREEDY))
        logits.append(logits_of(engine.executor, engine.scheduler.schedule()))
    assert torch.equal(*logits)


def test_a_matrix_weighs_two_bytes_a_number(tmp_path: Path) -> None:
    """As `test_weight_bytes_per_rank_follow_the_formula` has it, but for the norms."""
    make_model(tmp_path / "untied", "Llama", kept=torch.bfloat16)
    make_model(tmp_path / "tied", "Llama", kept=torch.bfloat16, tie_word_embeddings=True)
    norms = (2 * 3 + 1) * 64
    for tp in (1, 2):
        kv_heads = 2 // tp
        attention = 64 * 16 * (4 // tp + 2 * kv_heads) + 64 * 16 * 4 // tp
        matrices = 2 * 320 * 64 // tp + 3 * (attention + 3 * 64 * 128 // tp)
        # A tied head has its own copy, in the order of products.
        for folder in ("untied", "tied"):
            with ranks(tmp_path / folder, tp) as (engine, region):
                assert [region.status(rank)["weight_bytes"] for rank in range(tp)] == [2 * matrices + 4 * norms] * tp
                assert engine.ready.weight_bytes == (2 * matrices + 4 * norms) * tp


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_who_writes_to_the_files_does_not_change_what_is_loaded(tmp_path: Path, kept: torch.dtype) -> None:
    reference = make_reference(tmp_path, 2, (3, 40), kept=kept)
    engine = load_engine(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert [row.token_ids for row in greedy(engine, reference.prompts)] == reference.answers


def test_dummy_weights_stand_for_a_checkpoint_of_the_dtype_of_the_configuration(tmp_path: Path) -> None:
    make_model(tmp_path, "Llama")
    config = tmp_path / "config.json"
    bytes_of = {}
    for dtype in ("float32", "bfloat16"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": dtype}))
        bytes_of[dtype] = load_engine(tmp_path, load_format="dummy").ready.weight_bytes
    norms = (2 * 3 + 1) * 64
    assert bytes_of["bfloat16"] - 4 * norms == (bytes_of["float32"] - 4 * norms) / 2


def test_experts_that_may_move_and_compiled_mlps_are_kept_in_float32(tmp_path: Path) -> None:
    """Which are not for our own products."""
    reference = make_reference(tmp_path, family="Qwen3Moe", kept=torch.bfloat16)
    together = load_engine(tmp_path, moe_runner_backend="triton")
    assert together.ready.weight_bytes > load_engine(tmp_path).ready.weight_bytes
    assert [row.token_ids for row in greedy(together, reference.prompts)] == reference.answers
