"""Every family of models against transformers: the same greedy tokens, cold and warm, and the same logits.

And the other way round: a part of a family that is left out or mixed up is seen here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.worker.engine_fixtures import (
    FAMILIES,
    GREEDY,
    greedy,
    last_logits,
    load_engine,
    make_model,
    make_reference,
)
from warmroute_worker.executor.in_process import InProcessExecutor
from warmroute_worker.layers.experts import Experts, MixtureOfExperts
from warmroute_worker.layers.linear import RmsNorm
from warmroute_worker.messages import Generate
from warmroute_worker.model_config import ModelError, read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OTHERS = [family for family in FAMILIES if family != "Llama"]  # test_engine_exact.py has that one in every detail
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "uneven sizes": (
        "Qwen2",
        {
            "vocab_size": 331,
            "intermediate_size": 100,
            "num_attention_heads": 6,
            "hidden_size": 66,
            "num_key_value_heads": 3,
            "head_dim": 24,
        },
    ),
    "tied": ("Qwen3", {"tie_word_embeddings": True}),
    "experts not normalised": ("Qwen3Moe", {"norm_topk_prob": False}),
    "some layers dense": ("Qwen2Moe", {"decoder_sparse_step": 2}),
    "listed layers dense": ("Qwen3Moe", {"mlp_only_layers": [0]}),
    "one expert each": ("Mixtral", {"num_experts_per_tok": 1}),
    "a window that is wide enough": ("Mistral", {"sliding_window": 300}),
}


def answers(rows: list[Any]) -> list[list[int]]:
    return [row.token_ids for row in rows]


def worst_logit(folder: Path, model: Any) -> float:
    """The largest difference of any logit, after prompts of several lengths in one batch."""
    prompts = [[(7 * n + 3 * k * k + k) % 320 for k in range(length)] for n, length in enumerate((1, 9, 33, 70))]
    engine = load_engine(folder)
    executor = engine._executor
    assert isinstance(executor, InProcessExecutor)
    for n, prompt in enumerate(prompts):
        engine.scheduler.add(Generate(str(n), prompt, 1, sampling=GREEDY))
    ours = executor.logits(engine.scheduler.schedule())
    return max(float((row - last_logits(model, prompt)).abs().max()) for row, prompt in zip(ours, prompts, strict=True))


@pytest.mark.parametrize("family", OTHERS)
def test_the_same_tokens(tmp_path: Path, family: str) -> None:
    reference = make_reference(tmp_path, family=family)
    assert reference.smallest_gap > 2e-4
    for chunk in (-1, 17):
        engine = load_engine(tmp_path, chunked_prefill_size=chunk)
        for _ in range(2):
            assert answers(greedy(engine, reference.prompts)) == reference.answers


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(tmp_path: Path, variant: str) -> None:
    family, changes = VARIANTS[variant]
    reference = make_reference(tmp_path, 1, (3, 16, 50, 130), family, **changes)
    assert reference.smallest_gap > 2e-4
    engine = load_engine(tmp_path)
    for _ in range(2):
        assert answers(greedy(engine, reference.prompts)) == reference.answers


@pytest.mark.parametrize("family", OTHERS)
def test_logits_are_within_2e_4(tmp_path: Path, family: str) -> None:
    model = make_model(tmp_path, family)
    assert 0 < worst_logit(tmp_path, model) < 2e-4


def test_a_window_ends_the_context(tmp_path: Path) -> None:
    make_model(tmp_path, "Mistral", sliding_window=100)
    assert read(tmp_path).max_position_embeddings == 100
    make_model(tmp_path, "Qwen2", sliding_window=100, use_sliding_window=False)
    assert read(tmp_path).max_position_embeddings == 512


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel is not supported; supported: Llama.*Qwen3MoeForCausalLM"):
        read(tmp_path)


# ---- can these tests fail?


def _no_norm_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    real = RmsNorm.__call__
    monkeypatch.setattr(RmsNorm, "__call__", lambda self, x: x if x.dim() == 3 else real(self, x))


def _swapped_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Experts.__call__
    monkeypatch.setattr(Experts, "__call__", lambda self, x, chosen, weights: real(self, x, chosen ^ 1, weights))


def _weights_for_another_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Experts.__call__
    monkeypatch.setattr(
        Experts, "__call__", lambda self, x, chosen, weights: real(self, x, chosen, weights.flip(dims=(1,)))
    )


def _not_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    real = MixtureOfExperts._route

    def wrong(self: MixtureOfExperts, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = real(self, x)
        return weights * 0.7, chosen

    monkeypatch.setattr(MixtureOfExperts, "_route", wrong)


def _no_shared_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    real = MixtureOfExperts.__call__

    def wrong(self: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
        self._shared = None
        return real(self, x)

    monkeypatch.setattr(MixtureOfExperts, "__call__", wrong)


def _open_shared_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "sigmoid", torch.ones_like)


def _no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn import functional

    real = functional.linear
    monkeypatch.setattr(functional, "linear", lambda x, weight, bias=None: real(x, weight))


PLANTED: list[tuple[str, Callable[[pytest.MonkeyPatch], None]]] = [
    ("Qwen3", _no_norm_of_heads),
    ("Qwen2", _no_bias),
    ("Mixtral", _swapped_experts),
    ("Qwen3Moe", _weights_for_another_expert),
    ("Mixtral", _not_normalised),
    ("Qwen2Moe", _no_shared_expert),
    ("Qwen2Moe", _open_shared_gate),
]


@pytest.mark.parametrize(("family", "bug"), PLANTED, ids=[bug.__name__ for _, bug in PLANTED])
def test_a_planted_bug_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, bug: Callable[[pytest.MonkeyPatch], None]
) -> None:
    reference = make_reference(tmp_path, 2, (5, 20, 40), family)
    bug(monkeypatch)
    wrong = answers(greedy(load_engine(tmp_path), reference.prompts))
    assert all(ours != theirs for ours, theirs in zip(wrong, reference.answers, strict=True))
