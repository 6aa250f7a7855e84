"""The decoder that all families share: pre-norm attention with rotary positions, then a gated MLP or experts.

Llama, Mistral, Mixtral, Qwen2, Qwen3 and DeepSeek differ in biases, in a norm of queries and keys, in what is cached of
a token, and in what the MLP is: `ModelConfig` says which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from warmroute_worker.layers.experts import GatedMlp, MixtureOfExperts
from warmroute_worker.layers.linear import Embedding, RmsNorm
from warmroute_worker.layers.rope import RotaryEmbedding
from warmroute_worker.models.self_attention import GroupedAttention, LatentAttention

if TYPE_CHECKING:
    import torch

    from warmroute_worker.layers.attention import AttentionBatch, PagedAttention
    from warmroute_worker.model_config import ModelConfig
    from warmroute_worker.models.self_attention import CosSin
    from warmroute_worker.weights.source import WeightSource


class Decoder:
    """Token ids to logits. Holds the weights; keys and values are the attention's business."""

    def __init__(self, config: ModelConfig, source: WeightSource, context_length: int) -> None:
        """Raises ModelError if `source` lacks a tensor or has it in another shape."""
        hidden = config.hidden_size
        self._embedding = Embedding(source, "model.embed_tokens", config.vocab_size, hidden)
        self._layers = [DecoderLayer(config, source, index) for index in range(config.num_layers)]
        self._norm = RmsNorm(source, "model.norm", hidden, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self._head = self._embedding if tied else Embedding(source, "lm_head", config.vocab_size, hidden)
        weight = self._embedding.weight
        self._rope = RotaryEmbedding(config.rope, config.head_dim, context_length, weight.dtype, weight.device)

    def forward(
        self, token_ids: torch.Tensor, wanted: torch.Tensor, attention: PagedAttention, batch: AttentionBatch
    ) -> torch.Tensor:
        """[tokens] ids -> [len(wanted), vocab] float32 logits of the tokens at `wanted`."""
        x = self._embedding(token_ids)
        cos_sin = self._rope.at(batch.positions)
        for layer in self._layers:
            x = layer(x, cos_sin, self._rope, attention, batch)
        return self._head.logits(self._norm(x[wanted])).float()


class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, source: WeightSource, index: int) -> None:
        name, hidden, eps = f"model.layers.{index}", config.hidden_size, config.rms_norm_eps
        kind = GroupedAttention if config.mla is None else LatentAttention
        self._attention_norm = RmsNorm(source, f"{name}.input_layernorm", hidden, eps)
        self._attention = kind(config, source, f"{name}.self_attn", index)
        self._mlp_norm = RmsNorm(source, f"{name}.post_attention_layernorm", hidden, eps)
        self._mlp: GatedMlp | MixtureOfExperts
        moe = config.moe
        if moe is None or index in moe.dense_layers:
            self._mlp = GatedMlp(source, f"{name}.mlp", hidden, config.intermediate_size, config.mlp_bias)
        else:
            self._mlp = MixtureOfExperts(source, f"{name}.{moe.module}", hidden, moe)

    def __call__(
        self, x: torch.Tensor, cos_sin: CosSin, rope: RotaryEmbedding, attention: PagedAttention, batch: AttentionBatch
    ) -> torch.Tensor:
        x = x + self._attention(self._attention_norm(x), cos_sin, rope, attention, batch)
        return x + self._mlp(self._mlp_norm(x))
