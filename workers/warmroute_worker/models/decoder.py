"""The decoder that all families share: pre-norm attention with rotary positions, then a gated MLP or experts.

Llama, Mistral, Mixtral, Qwen2, Qwen3 and DeepSeek differ in biases, in a norm of queries and keys, in what is cached of
a token, and in what the MLP is: `ModelConfig` says which. What a rank has of a layer, the layer says; what it has of
the decoder, `Stage`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from warmroute_worker.comm.tensor_group import Alone
from warmroute_worker.layers.experts import GatedMlp, MixtureOfExperts
from warmroute_worker.layers.linear import Embedding, Head, RmsNorm
from warmroute_worker.layers.rope import RotaryEmbedding
from warmroute_worker.models.self_attention import GroupedAttention, LatentAttention
from warmroute_worker.models.whole_layer import DecodeStep, WholeLayer

if TYPE_CHECKING:
    import torch

    from warmroute_worker.comm.tensor_group import TensorGroup
    from warmroute_worker.layers.attention import AttentionBatch, PagedAttention
    from warmroute_worker.model_config import ModelConfig
    from warmroute_worker.models.self_attention import CosSin
    from warmroute_worker.weights.source import WeightSource


@dataclass(frozen=True)
class Stage:
    """A rank's layers, and among whom each of them is divided."""

    layers: range
    embeds: bool
    """It turns token ids into vectors."""
    ends: bool
    """It turns vectors into logits."""
    group: TensorGroup

    @classmethod
    def whole(cls, config: ModelConfig) -> Stage:
        return cls(range(config.num_layers), True, True, Alone())


class Decoder:
    """Token ids to logits, or a stage of that. Holds the weights; keys and values are the attention's business."""

    def __init__(self, config: ModelConfig, source: WeightSource, context_length: int, stage: Stage) -> None:
        """Raises ModelError if `source` lacks a tensor or has it in another shape."""
        hidden, vocab, group = config.hidden_size, config.vocab_size, stage.group
        self._embedding: Embedding | None = None
        self._head: Head | None = None
        tied = config.tie_word_embeddings
        if stage.embeds or (stage.ends and tied):
            self._embedding = Embedding(source, "model.embed_tokens", vocab, hidden, group)
        self._layers = [DecoderLayer(config, source, number, index, group) for index, number in enumerate(stage.layers)]
        if stage.ends:
            self._norm = RmsNorm(source, "model.norm", hidden, config.rms_norm_eps)
            if tied and self._embedding is not None:
                self._head = Head.tied(self._embedding, vocab, group)
            else:
                self._head = Head(source, "lm_head", vocab, hidden, group)
        self._rope = RotaryEmbedding(config.rope, config.head_dim, context_length, source.dtype, source.device)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, hidden]; in the first stage only."""
        assert self._embedding is not None
        return self._embedding(token_ids)

    def forward(self, x: torch.Tensor, attention: PagedAttention, batch: AttentionBatch) -> torch.Tensor:
        """[tokens, hidden] -> the same, through the layers of this stage."""
        cos_sin = self._rope.at(batch.positions)
        step = DecodeStep.of(cos_sin, batch)
        for layer in self._layers:
            x = layer(x, cos_sin, self._rope, attention, batch, step)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor | None:
        """[sampled, hidden] -> [sampled, vocab] float32 at the group's first rank, None at the others; in the last
        stage only."""
        assert self._head is not None
        logits = self._head(self._norm(x))
        return None if logits is None else logits.float()


class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)): each a sum over the ranks, and the only ones there are."""

    def __init__(self, config: ModelConfig, source: WeightSource, number: int, index: int, group: TensorGroup) -> None:
        """`number`: of the layer in the model; `index`: in this stage."""
        name, hidden, eps = f"model.layers.{number}", config.hidden_size, config.rms_norm_eps
        kind = GroupedAttention if config.mla is None else LatentAttention
        self._group = group
        self._attention_norm = RmsNorm(source, f"{name}.input_layernorm", hidden, eps)
        self._attention = kind(config, source, f"{name}.self_attn", index, group)
        self._mlp_norm = RmsNorm(source, f"{name}.post_attention_layernorm", hidden, eps)
        self._mlp: GatedMlp | MixtureOfExperts
        moe = config.moe
        if moe is None or number in moe.dense_layers:
            self._mlp = GatedMlp(source, f"{name}.mlp", hidden, config.intermediate_size, config.mlp_bias, group)
        else:
            self._mlp = MixtureOfExperts(source, f"{name}.{moe.module}", hidden, moe, group)
        self._whole = WholeLayer.of(self._attention_norm, self._attention, self._mlp_norm, self._mlp, group)

    def __call__(
        self,
        x: torch.Tensor,
        cos_sin: CosSin,
        rope: RotaryEmbedding,
        attention: PagedAttention,
        batch: AttentionBatch,
        step: DecodeStep | None,
    ) -> torch.Tensor:
        """[tokens, hidden] -> the same, in x. `step`: if every token decodes."""
        if self._whole is not None and step is not None:
            self._whole(x, step, attention)
            return x
        seen = self._group.sum(self._attention(self._attention_norm(x), cos_sin, rope, attention, batch))
        x += self._group.sum(self._mlp(self._mlp_norm.after_adding(x, seen)))
        return x
