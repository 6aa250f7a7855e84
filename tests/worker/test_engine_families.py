"""Every family of models against transformers: the same greedy tokens, cold and warm, and the same logits.

And the other way round: a part of a family that is left out or mixed up is seen here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.worker.engine_fixtures import (
    FAMILIES,
    GREEDY,
    UNEVEN,
    greedy,
    last_logits,
    load_engine,
    logits_of,
    make_model,
    make_reference,
)
from warmroute_worker.executor import model_runner
from warmroute_worker.executor.ranks import RankExecutor
from warmroute_worker.layers import linear, native
from warmroute_worker.layers.experts import Experts
from warmroute_worker.layers.linear import RmsNorm
from warmroute_worker.layers.moe import MixtureOfExperts
from warmroute_worker.layers.router import Router
from warmroute_worker.messages import Generate
from warmroute_worker.model_config import ModelError, read
from warmroute_worker.weights.source import Packing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "beta_fast": 32,
    "beta_slow": 1,
}
OTHERS = [family for family in FAMILIES if family != "Llama"]  # test_engine_exact.py has that one in every detail
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "uneven sizes": (
        "Qwen2",
        UNEVEN,
    ),
    "tied": ("Qwen3", {"tie_word_embeddings": True}),
    "experts not normalised": ("Qwen3Moe", {"norm_topk_prob": False}),
    "some layers dense": ("Qwen2Moe", {"decoder_sparse_step": 2}),
    "listed layers dense": ("Qwen3Moe", {"mlp_only_layers": [0]}),
    "one expert each": ("Mixtral", {"num_experts_per_tok": 1}),
    "queries through a rank": ("DeepseekV2", {"q_lora_rank": 24}),
    "groups by their best": (
        "DeepseekV2",
        {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    ),
    "yarn": ("DeepseekV3", {"rope_parameters": YARN}),
    "yarn with one mscale": ("DeepseekV2", {"rope_parameters": YARN | {"mscale": None, "mscale_all_dim": None}}),
    "yarn elsewhere": ("Qwen3", {"rope_parameters": YARN | {"mscale": None, "mscale_all_dim": None}}),
    "pairs apart": ("DeepseekV3", {"rope_interleave": False}),
    "biases and three shared": ("DeepseekV3", {"attention_bias": True, "n_shared_experts": 3}),
    "a window that is wide enough": ("Mistral", {"sliding_window": 300}),
}


def answers(rows: list[Any]) -> list[list[int]]:
    return [row.token_ids for row in rows]


def worst_logit(folder: Path, model: Any) -> float:
    """The largest difference of any logit, after prompts of several lengths in one batch."""
    prompts = [[(7 * n + 3 * k * k + k) % 320 for k in range(length)] for n, length in enumerate((1, 9, 33, 70))]
    engine = load_engine(folder)
    executor = engine.executor
    assert isinstance(executor, RankExecutor)
    for n, prompt in enumerate(prompts):
        engine.scheduler.add(Generate(str(n), prompt, 1, sampling=GREEDY))
    ours = logits_of(executor, engine.scheduler.schedule())
    return max(float((row - last_logits(model, prompt)).abs().max()) for row, prompt in zip(ours, prompts, strict=True))


@pytest.mark.parametrize("family", OTHERS)
def test_the_same_tokens(tmp_path: Path, family: str) -> None:
    reference = make_reference(tmp_path, family=family)
    assert reference.smallest_gap > 2e-4
    for chunk in (-1, 17):
        engine = load_engine(tmp_path, chunked_prefill_size=chunk)
        for _ in range(2):
            assert answers(greedy(engine, reference.prompts)) == reference.answers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_from_packed_weights(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices as small as these are not packed otherwise."""
    monkeypatch.setattr(model_runner, "Packing", lambda **_: Packing(smallest=0))
    reference = make_reference(tmp_path, family=family)
    assert answers(greedy(load_engine(tmp_path, chunked_prefill_size=17), reference.prompts)) == reference.answers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_without_our_kernels(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(native, "usable", lambda dtype, device: False)
    reference = make_reference(tmp_path, family=family)
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
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel is not supported; supported: Deepseek.*Qwen3MoeForCausalLM"):
        read(tmp_path)


def test_a_latent_row_is_all_that_is_cached(tmp_path: Path) -> None:
    make_model(tmp_path, "DeepseekV3")
    engine = load_engine(tmp_path, max_total_tokens=1024, page_size=16)
    executor = engine.executor
    assert isinstance(executor, RankExecutor)
    # (latent rank + turned part) x 4 bytes x layers, whatever the heads.
    assert executor.facts.kv_pool_bytes == executor.facts.num_pages * 16 * (32 + 8) * 4 * 3
    assert executor.rank.runner.pool.data.shape[1] == 1


def test_fp8_blocks_are_dequantised(tmp_path: Path) -> None:
    """A checkpoint as DeepSeek-V3 ships it against the same numbers in float32."""
    folder, plain = tmp_path / "fp8", tmp_path / "plain"
    make_model(plain, "DeepseekV3")
    make_model(folder, "DeepseekV3")
    block = 24  # cuts blocks off at the edges of 64 and 128 rows
    tensors = load_file(folder / "model.safetensors")
    stored, exact = {}, {}
    for name, tensor in tensors.items():
        exact[name] = tensor
        stored[name] = tensor
        if tensor.dim() == 2 and "proj" in name:
            rows, columns = (-(-size // block) for size in tensor.shape)
            scale = torch.rand(rows, columns) + 0.5
            spread = scale.repeat_interleave(block, 0)[: len(tensor)].repeat_interleave(block, 1)[:, : tensor.shape[1]]
            stored[name] = (tensor / spread).to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = scale
            exact[name] = stored[name].float() * spread
    save_file(stored, folder / "model.safetensors")
    save_file(exact, plain / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config))
    prompts = [[(7 * n + 3 * k * k + k) % 320 for k in range(20)] for n in range(3)]
    assert answers(greedy(load_engine(folder), prompts)) == answers(greedy(load_engine(plain), prompts))


# ---- can these tests fail?


def _no_norm_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RmsNorm, "of_heads", lambda self, x: x)


def _swapped_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Experts.weighted_sums
    monkeypatch.setattr(Experts, "weighted_sums", lambda self, x, chosen, weights: real(self, x, chosen ^ 1, weights))


def _weights_for_another_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Experts.weighted_sums
    monkeypatch.setattr(
        Experts, "weighted_sums", lambda self, x, chosen, weights: real(self, x, chosen, weights.flip(dims=(1,)))
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
    real = linear.product
    monkeypatch.setattr(linear, "product", lambda packing, weight, bias=None: real(packing, weight))


def _no_score_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Router.__call__

    def wrong(self: Router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._score_bias = None
        return real(self, x)

    monkeypatch.setattr(Router, "__call__", wrong)


def _every_group_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Router, "_of_the_best_groups", lambda self, worth: worth)


def _pairs_left_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warmroute_worker.models.self_attention._parter", lambda heads, mla: None)


def _latents_without_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = RmsNorm.__call__
    monkeypatch.setattr(RmsNorm, "__call__", lambda self, x: x if x.shape[-1] == 32 else real(self, x))


PLANTED: list[tuple[str, Callable[[pytest.MonkeyPatch], None]]] = [
    ("Qwen3", _no_norm_of_heads),
    ("Qwen2", _no_bias),
    ("Mixtral", _swapped_experts),
    ("Qwen3Moe", _weights_for_another_expert),
    ("Mixtral", _not_normalised),
    ("Qwen2Moe", _no_shared_expert),
    ("Qwen2Moe", _open_shared_gate),
    ("DeepseekV3", _no_score_bias),
    ("DeepseekV3", _every_group_is_open),
    ("DeepseekV3", _pairs_left_together),
    ("DeepseekV2", _latents_without_a_norm),
    ("DeepseekV2", _no_shared_expert),
]


@pytest.mark.parametrize(("family", "bug"), PLANTED, ids=[f"{family}{bug.__name__}" for family, bug in PLANTED])
def test_a_planted_bug_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, bug: Callable[[pytest.MonkeyPatch], None]
) -> None:
    reference = make_reference(tmp_path, 2, (5, 20, 40), family)
    bug(monkeypatch)
    wrong = answers(greedy(load_engine(tmp_path), reference.prompts))
    assert all(ours != theirs for ours, theirs in zip(wrong, reference.answers, strict=True))


# ---- do the models feel what could go wrong? (each family; perturbations of transformers' own model)


def _next_tokens(model: Any, prompts: list[list[int]], **more: Any) -> list[int]:
    with torch.no_grad():
        return [int(model(torch.tensor([prompt]), **more).logits[0, -1].argmax()) for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_sensitive(tmp_path: Path, family: str) -> None:
    """At least 80 % of the next tokens change with any of these, so that equal tokens are no accident."""
    model = make_model(tmp_path, family)
    prompts = [[(n * 13 + k * k) % 320 for k in range(40)] for n in range(20)]
    before = _next_tokens(model, prompts)

    def changed(after: list[int]) -> float:
        return sum(a != b for a, b in zip(before, after, strict=True)) / len(before)

    def with_zeros(pick: Callable[[Any], torch.Tensor | None]) -> list[int]:
        """Next tokens with what `pick` finds in each layer set to zero, which is then put back."""
        found = [tensor for layer in model.model.layers if (tensor := pick(layer)) is not None]
        assert found
        kept = [tensor.clone() for tensor in found]
        with torch.no_grad():
            for tensor in found:
                tensor.zero_()
            after = _next_tokens(model, prompts)
            for tensor, values in zip(found, kept, strict=True):
                tensor.copy_(values)
        return after

    assert changed(_next_tokens(model, [prompt[-2::-1] + prompt[-1:] for prompt in prompts])) >= 0.8
    assert changed(_next_tokens(model, prompts, position_ids=torch.zeros(1, 40, dtype=torch.long))) >= 0.8
    assert changed(with_zeros(lambda layer: layer.self_attn.o_proj.weight)) >= 0.8
    if family in ("Qwen2Moe", "DeepseekV2", "DeepseekV3"):
        name = "shared_expert" if family == "Qwen2Moe" else "shared_experts"

        def shared(layer: Any) -> torch.Tensor | None:
            expert = getattr(layer.mlp, name, None)
            return None if expert is None else expert.down_proj.weight

        assert changed(with_zeros(shared)) >= 0.8
    if family in MIXTURES:
        assert changed(_with_swapped_experts(model, prompts)) >= 0.8
    assert _next_tokens(model, prompts) == before, "all is put back"


MIXTURES = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV2", "DeepseekV3")


def _with_swapped_experts(model: Any, prompts: list[list[int]]) -> list[int]:
    """Each expert in its neighbour's place, in every layer."""
    experts = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    assert experts

    def swap() -> None:
        with torch.no_grad():
            for layer in experts:
                for tensor in (layer.gate_up_proj, layer.down_proj):
                    order = torch.arange(len(tensor)) ^ 1
                    tensor.copy_(tensor[order].clone())

    swap()
    after = _next_tokens(model, prompts)
    swap()
    return after
