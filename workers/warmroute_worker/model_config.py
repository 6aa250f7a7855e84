"""config.json and generation_config.json of a model folder, as transformers v4 and v5 write them. Imports no torch.

After `read` nobody looks into these files again: what the engine does not implement has been refused by name here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from warmroute_worker import topology
from warmroute_worker.startup_error import StartupError

if TYPE_CHECKING:
    from pathlib import Path

    from warmroute_worker.topology import Layout

SUPPORTED_ARCHITECTURES = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
QUANT_METHODS = ("int8_per_channel", "fp8")


class ModelError(StartupError):
    """The model folder cannot be served; the message is one line for the user."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. The llama3 fields are those of transformers' `rope_parameters` of the same names."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    """This one to `mscale_all_dim` are yarn's."""
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """What cos and sin are multiplied with."""
    mscale_all_dim: float = 0.0

    @property
    def score_factor(self) -> float:
        """What attention scores are multiplied with, in models that say `mscale_all_dim`."""
        return _yarn_mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclass(frozen=True)
class MoeConfig:
    """A layer's MLP as a choice of experts."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    """Of each expert."""
    normalised: bool
    """The chosen experts' weights sum to one."""
    dense_layers: frozenset[int] = frozenset()
    """Layers that have an ordinary MLP."""
    module: str = "mlp"
    """What the checkpoint calls the block, and gate, up and down projection of an expert."""
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_intermediate_size: int = 0
    """Of the expert that every token goes through; 0: there is none."""
    shared_module: str = "shared_expert"
    shared_gated: bool = True
    """The shared expert has a gate of its own."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    score_bias: bool = False
    """Added to the scores for the choice, not for the weights."""
    float32_router: bool = False
    groups: int = 1
    """Experts stand in groups of equal size, of which the best `chosen_groups` are chosen from."""
    chosen_groups: int = 1
    best_of_group: int = 1
    """A group is worth the sum of so many of its best scores."""
    weight_factor: float = 1.0


@dataclass(frozen=True)
class MlaConfig:
    """Attention over latents: what is cached of a token is one row that all heads share."""

    query_rank: int | None
    """None: queries are projected at once."""
    latent_rank: int
    plain_dim: int
    """Of a head's query and key, what has no position; below: what is turned by it."""
    rope_dim: int
    value_dim: int
    interleaved: bool
    """Pairs to be turned stand side by side in the checkpoint, not half a head apart."""
    bias: bool

    @property
    def row_dim(self) -> int:
        return self.latent_rank + self.rope_dim


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder-only transformer. Sizes are in elements."""

    architectures: tuple[str, ...]
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    """Of the attention's output projection."""
    mlp_bias: bool
    query_key_norm: bool
    """Each head's query and key are normed before they are turned."""
    moe: MoeConfig | None
    mla: MlaConfig | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    """What the checkpoint was made in: float32, bfloat16 or float16."""
    initializer_range: float
    quant_method: str | None
    weight_block: tuple[int, int]
    """Of fp8: rows and columns that share a scale."""

    def kv_shape(self, tp_rank: int, tp_size: int) -> tuple[int, int, int]:
        """(parts, heads, dim) of what a layer caches of a token on a rank: key and value of each of its heads, or one
        latent row, which every rank has."""
        if self.mla is not None:
            return (1, 1, self.mla.row_dim)
        return (2, len(topology.kv_heads(self.num_heads, self.num_kv_heads, tp_rank, tp_size)), self.head_dim)

    @property
    def architecture(self) -> str:
        """The one of `architectures` that is implemented."""
        return next(name for name in self.architectures if name in SUPPORTED_ARCHITECTURES)


def read(folder: Path) -> ModelConfig:
    """The configuration of the model in `folder`. Raises ModelError with one line."""
    raw = _json_object(folder / "config.json")
    architectures = tuple(raw.get("architectures") or ())
    if not any(name in SUPPORTED_ARCHITECTURES for name in architectures):
        named = ", ".join(map(str, architectures)) or f"model_type {raw.get('model_type')!r}"
        raise ModelError(
            f"{folder}: architecture {named} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    try:
        config = _parse(raw, architectures, _eos_token_ids(folder, raw))
    except KeyError as error:
        raise ModelError(f"{folder}/config.json: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder}/config.json: {error}") from error
    return config


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raise ModelError if tokenizer.json makes ids the model has no embedding for. Without the file nothing is said."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    raw = _json_object(path)
    vocabulary = (raw.get("model") or {}).get("vocab") or {}
    # Unigram tokenizers list [piece, score] pairs, whose place is the id; the others map text to id.
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    largest = max([*ids, *(token["id"] for token in raw.get("added_tokens") or ())], default=-1)
    if largest >= vocab_size:
        raise ModelError(
            f"{folder}: tokenizer.json has token ids up to {largest}, but config.json says vocab_size {vocab_size}"
        )


def check_layout(config: ModelConfig, layout: Layout) -> None:
    """Raise ModelError if the model cannot be divided among so many ranks."""
    heads, size = config.num_heads, layout.attention_tp_size
    if heads % size:
        choices = [n for n in range(1, heads + 1) if heads % n == 0]
        of_ranks = f"--tp {layout.tp_size}" + (f" / --dp-size {layout.dp_size}" if layout.dp_attention else "")
        raise ModelError(
            f"{of_ranks} does not divide the model's {heads} attention heads; it can be {', '.join(map(str, choices))}"
        )
    moe, ep = config.moe, layout.ep_size
    if ep > 1:
        if moe is None:
            raise ModelError(f"--ep-size {ep}: the model has no routed experts")
        if ep > moe.num_experts:
            raise ModelError(f"--ep-size {ep} is more than the model's {moe.num_experts} experts")
    smallest = min(config.intermediate_size, config.vocab_size)
    if layout.tp_size > smallest:
        raise ModelError(
            f"--tp {layout.tp_size} is more than the {smallest} inner numbers that the ranks have to share"
        )
    if moe is not None and layout.expert_tp_size > moe.intermediate_size:
        raise ModelError(
            f"--tp {layout.tp_size} / --ep-size {ep} is more than an expert's {moe.intermediate_size} inner numbers"
        )
    if layout.pp_size > config.num_layers:
        raise ModelError(f"--pp-size {layout.pp_size} is more than the model's {config.num_layers} layers")


def check_compiled(config: ModelConfig, wanted: bool) -> None:
    """Raises ModelError if there is nothing for `--enable-torch-compile` to compile."""
    moe = config.moe
    if wanted and moe is not None and not moe.dense_layers and not moe.shared_intermediate_size:
        raise ModelError(
            f"--enable-torch-compile compiles ordinary MLPs and shared experts, and this {config.architectures[0]} has "
            "neither; remove it"
        )


def remarks(config: ModelConfig, layout: Layout) -> list[str]:
    """Lines for the operator about a model that is divided like that."""
    if layout.dp_attention and config.moe is None:
        return [
            "DP attention for a model without experts is allowed, and rarely worth it: replicas behind the router "
            "(`launch_server --dp-size`) do not wait for each other"
        ]
    return []


def _parse(raw: dict[str, Any], architectures: tuple[str, ...], eos_token_ids: tuple[int, ...]) -> ModelConfig:
    hidden_size = _size(raw, "hidden_size")
    family = next(name for name in architectures if name in SUPPORTED_ARCHITECTURES).removesuffix("ForCausalLM")
    num_layers = _size(raw, "num_hidden_layers")
    num_heads = _size(raw, "num_attention_heads")
    num_kv_heads = _size(raw, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
    mla = _mla(raw) if family.startswith("Deepseek") else None
    if mla is None and raw.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}")
    head_dim = mla.rope_dim if mla else _size(raw, "head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd; rotary embeddings need pairs")
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act {activation!r} is not supported; supported: silu")
    quantization = raw.get("quantization_config") or {}
    quant_method = quantization.get("quant_method")
    if quant_method is not None and quant_method not in QUANT_METHODS:
        raise ValueError(f"quant_method {quant_method!r} is not supported; supported: {', '.join(QUANT_METHODS)}")
    return ModelConfig(
        architectures=architectures,
        model_type=str(raw.get("model_type", "")),
        vocab_size=_size(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw),
        max_position_embeddings=_context(raw, family),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=_qkv_bias(raw, family),
        output_bias=family in ("Llama", "Qwen3", "Qwen3Moe") and bool(raw.get("attention_bias", False)),
        mlp_bias=family in ("Llama", "DeepseekV2") and bool(raw.get("mlp_bias", False)),
        query_key_norm=family.startswith("Qwen3"),
        moe=_moe(raw, family, num_layers),
        mla=mla,
        eos_token_ids=eos_token_ids,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        initializer_range=float(raw.get("initializer_range", 0.02)),
        quant_method=quant_method,
        weight_block=tuple(quantization.get("weight_block_size") or (128, 128)),
    )


def _qkv_bias(raw: dict[str, Any], family: str) -> bool:
    """Qwen2 has it without saying so, Qwen2-MoE may say `qkv_bias`, Mistral and Mixtral never have it."""
    if family.startswith("Qwen2"):
        return bool(raw.get("qkv_bias", True))
    return family in ("Llama", "Qwen3", "Qwen3Moe") and bool(raw.get("attention_bias", False))


def _context(raw: dict[str, Any], family: str) -> int:
    """Tokens. A sliding window makes no difference to a context that fits into it; longer ones are not served."""
    longest = _size(raw, "max_position_embeddings", 2048)
    slides = raw.get("use_sliding_window", False) if family.startswith("Qwen") else True
    window = raw.get("sliding_window") if slides and family != "Llama" else None
    return longest if window is None else min(longest, int(window))


def _moe(raw: dict[str, Any], family: str, num_layers: int) -> MoeConfig | None:
    if family == "Mixtral":
        return MoeConfig(
            num_experts=_num_experts(raw),
            experts_per_token=_size(raw, "num_experts_per_tok"),
            intermediate_size=_size(raw, "intermediate_size"),
            normalised=True,
            module="block_sparse_moe",
            projections=("w1", "w3", "w2"),
        )
    if family.startswith("Deepseek"):
        return _deepseek_moe(raw, family)
    if not family.endswith("Moe"):
        return None
    step = _size(raw, "decoder_sparse_step", 1)
    listed = raw.get("mlp_only_layers") or ()
    return MoeConfig(
        num_experts=_num_experts(raw),
        experts_per_token=_size(raw, "num_experts_per_tok"),
        intermediate_size=_size(raw, "moe_intermediate_size"),
        normalised=bool(raw.get("norm_topk_prob", False)),
        shared_intermediate_size=_size(raw, "shared_expert_intermediate_size") if family == "Qwen2Moe" else 0,
        dense_layers=frozenset(i for i in range(num_layers) if i in listed or (i + 1) % step),
    )


def _deepseek_moe(raw: dict[str, Any], family: str) -> MoeConfig:
    """V2 chooses by softmax, from groups by their best expert; V3 by sigmoid and a bias, by their two best."""
    size = _size(raw, "moe_intermediate_size")
    v3 = family == "DeepseekV3"
    method = "noaux_tc" if v3 else raw.get("topk_method", "greedy")
    if method not in ("noaux_tc", "greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method {method!r} is not supported; supported: greedy, group_limited_greedy")
    grouped = method != "greedy"
    return MoeConfig(
        num_experts=_num_experts(raw),
        experts_per_token=_size(raw, "num_experts_per_tok"),
        intermediate_size=size,
        normalised=v3 and bool(raw.get("norm_topk_prob", True)),
        dense_layers=frozenset(range(int(raw.get("first_k_dense_replace") or 0))),
        shared_intermediate_size=size * int(raw.get("n_shared_experts") or 0),
        shared_module="shared_experts",
        shared_gated=False,
        scores="sigmoid" if v3 else "softmax",
        score_bias=v3,
        float32_router=True,
        groups=_size(raw, "n_group", 1) if grouped else 1,
        chosen_groups=_size(raw, "topk_group", 1) if grouped else 1,
        best_of_group=2 if v3 else 1,
        weight_factor=float(raw.get("routed_scaling_factor") or 1.0),
    )


def _mla(raw: dict[str, Any]) -> MlaConfig:
    return MlaConfig(
        query_rank=None if raw.get("q_lora_rank") is None else _size(raw, "q_lora_rank"),
        latent_rank=_size(raw, "kv_lora_rank"),
        plain_dim=_size(raw, "qk_nope_head_dim"),
        rope_dim=_size(raw, "qk_rope_head_dim"),
        value_dim=_size(raw, "v_head_dim"),
        interleaved=bool(raw.get("rope_interleave", True)),
        bias=bool(raw.get("attention_bias", False)),
    )


def _num_experts(raw: dict[str, Any]) -> int:
    """Families and versions of transformers have names of their own."""
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    return _size(raw, next((name for name in names if raw.get(name) is not None), names[0]))


def _rope(raw: dict[str, Any]) -> RopeConfig:
    """v5 keeps everything in `rope_parameters`; v4 has `rope_theta` beside an optional `rope_scaling`."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or RopeConfig.theta)
    if rope_type == "default":
        return RopeConfig(theta)
    if rope_type == "linear":
        return RopeConfig(theta, rope_type, float(parameters["factor"]))
    if rope_type == "yarn":
        return _yarn(raw, parameters, theta)
    return RopeConfig(
        theta,
        rope_type,
        float(parameters["factor"]),
        float(parameters["low_freq_factor"]),
        float(parameters["high_freq_factor"]),
        int(parameters["original_max_position_embeddings"]),
    )


def _yarn(raw: dict[str, Any], parameters: dict[str, Any], theta: float) -> RopeConfig:
    """YaRN (arXiv 2309.00071), with DeepSeek's two mscales."""
    original = int(parameters["original_max_position_embeddings"])
    factor = parameters.get("factor")
    factor = _size(raw, "max_position_embeddings") / original if factor is None else float(factor)
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = _yarn_mscale(factor, 1.0)
        if mscale and all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, all_dim)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original_max_position_embeddings=original,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=float(attention_factor),
        mscale_all_dim=float(all_dim or 0.0),
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _eos_token_ids(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json wins over config.json, as in transformers' generate()."""
    path = folder / "generation_config.json"
    value = _json_object(path).get("eos_token_id") if path.is_file() else None
    if value is None:
        value = raw.get("eos_token_id")
    if value is None:
        return ()
    return tuple(int(token) for token in value) if isinstance(value, list) else (int(value),)


def _size(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if value is None:
        raise KeyError(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    return value


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: is not a JSON object")
    return value
