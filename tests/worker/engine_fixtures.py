"""Tiny models made with transformers, what transformers makes of them, and how to run ours over prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from warmroute_worker import engine as engines
from warmroute_worker import step_plan_wire
from warmroute_worker.args import WorkerArgs
from warmroute_worker.messages import Generate, Row, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from warmroute_worker.engine import Engine
    from warmroute_worker.executor.ranks import RankExecutor
    from warmroute_worker.step_plan import StepPlan

VOCAB_SIZE = 320
NEW_TOKENS = 32
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 40, 77, 130)
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Reference:
    """A model folder and transformers' greedy answers to `prompts`."""

    folder: Path
    prompts: list[list[int]]
    answers: list[list[int]]
    smallest_gap: float
    """Between the two largest logits, over all steps: below the engines' difference, equality would be luck."""


# Weights are drawn with a standard deviation of 0.25: with the usual 0.02 a model without positions passes.
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}


UNEVEN: dict[str, Any] = {
    "vocab_size": 331,
    "intermediate_size": 100,
    "num_attention_heads": 6,
    "hidden_size": 66,
    "num_key_value_heads": 3,
    "head_dim": 24,
}
"""Sizes that nothing divides evenly; heads are not hidden / heads wide."""

MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}

MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen2Moe": MOE | {"shared_expert_intermediate_size": 64, "norm_topk_prob": True},
    # Its experts count for more than the defaults make them: with those, leaving out the shared one changed 40 % only.
    "DeepseekV2": MLA
    | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 4.0}
    | {"moe_intermediate_size": 64, "n_shared_experts": 2},
    "DeepseekV3": MLA | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "Qwen3Moe": MOE | {"head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": []},
}
"""What transformers' configuration of a family needs beside the numbers that all have."""


def make_model(folder: Path, family: str, seed: int = 0, kept: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Save a random model into `folder`, as numbers of `kept`, and return transformers' own with the same."""
    import transformers

    torch.manual_seed(seed)
    settings = SETTINGS | FAMILIES[family] | changes
    config = getattr(transformers, f"{family}Config")(**settings)
    model: Any = getattr(transformers, f"{family}ForCausalLM")(config)
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh norms are one and fresh biases zero, so that leaving them out would go unnoticed.
            if name.endswith(("norm.weight", "bias")):
                parameter += 0.25 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.25 * torch.randn_like(buffer)
        for numbers in model.state_dict().values():
            numbers.copy_(numbers.to(kept))
    model.save_pretrained(folder, state_dict={name: tensor.to(kept) for name, tensor in model.state_dict().items()})
    return model


def make_llama(folder: Path, seed: int = 0, **changes: Any) -> Any:
    return make_model(folder, "Llama", seed, **changes)


def make_reference(
    folder: Path, seed: int = 0, lengths: Sequence[int] = PROMPT_LENGTHS, family: str = "Llama", **changes: Any
) -> Reference:
    model = make_model(folder, family, seed, **changes)
    draw = random.Random(seed)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]
    answers, gaps = [], []
    for prompt in prompts:
        answer: list[int] = []
        for _ in range(NEW_TOKENS):
            logits = last_logits(model, prompt + answer)
            first, second = logits.topk(2).values.tolist()
            gaps.append(first - second)
            answer.append(int(logits.argmax()))
        answers.append(answer)
    return Reference(folder, prompts, answers, min(gaps))


@torch.no_grad()
def last_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """transformers' logits after the last token, [vocab], without its cache."""
    logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0, -1]
    return logits


def logits_of(executor: RankExecutor, plan: StepPlan) -> torch.Tensor:
    """[sampled, vocab]: what the driver would draw from, where it does so itself."""
    executor.links.send_plan(step_plan_wire.encode(plan))
    logits = executor.rank.runner.forward(plan)
    return torch.empty(0) if logits is None else logits


def load_engine(folder: Path, **changes: Any) -> Engine:
    settings: dict[str, Any] = {"device": "cpu", "threads": 1, "max_total_tokens": 4096}
    return engines.load(WorkerArgs(str(folder), "tiny", **(settings | changes)))


def run_all(
    engine: Engine, requests: Sequence[Generate], each_step: Callable[[], None] | None = None
) -> dict[str, Row]:
    """Run to the end. The rows of each request, put together."""
    for request in requests:
        engine.scheduler.add(request)
    answers: dict[str, Row] = {}
    while not engine.is_idle:
        for row in engine.step().rows:
            before = answers.get(row.rid)
            answers[row.rid] = row if before is None else row._replace(token_ids=before.token_ids + row.token_ids)
        engine.scheduler.check_integrity()
        if each_step is not None:
            each_step()
    return answers


def greedy(engine: Engine, prompts: Sequence[list[int]], new_tokens: int = NEW_TOKENS) -> list[Row]:
    """All prompts at once."""
    answers = run_all(
        engine, [Generate(str(n), prompt, new_tokens, sampling=GREEDY) for n, prompt in enumerate(prompts)]
    )
    return [answers[str(n)] for n in range(len(prompts))]
