"""The decoder that all families share: pre-norm attention with rotary positions, then a gated MLP or experts.

Llama, Mistral, Mixtral, Qwen2, Qwen3 and DeepSeek differ in biases, in a norm of queries and keys, in what is cached of
a token, and in what the MLP is: `ModelConfig` says which. What a rank has of a layer, the layer says; what it has of
the decoder, `Stage`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from warmroute_worker.comm.background import Background
from warmroute_worker.comm.rank_links import Groups
from warmroute_worker.comm.tensor_group import Alone
from warmroute_worker.layers.compiled_mlp import CompiledMlp
from warmroute_worker.layers.expert_exchange import Statistics
from warmroute_worker.layers.expert_map import ExpertLayout
from warmroute_worker.layers.linear import Embedding, Head, RmsNorm
from warmroute_worker.layers.mlp import GatedMlp, gated_mlp
from warmroute_worker.layers.moe import ExpertParallel, MixtureOfExperts
from warmroute_worker.layers.native import Matrix
from warmroute_worker.layers.rope import RotaryEmbedding
from warmroute_worker.models.halves import Half, forward
from warmroute_worker.models.self_attention import GroupedAttention, LatentAttention
from warmroute_worker.models.whole_decoder import WholeDecoder, can_sum, native_layer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmroute_worker import _native
    from warmroute_worker.comm.step_rows import StepRows
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
    groups: Groups
    experts: ExpertParallel
    dp_attention: bool = False
    """Those who share heads are fewer than those who share MLPs."""
    split_head: bool = True
    """The head is divided among all ranks of the stage, not only among those that share the attention's heads."""

    @classmethod
    def whole(cls, config: ModelConfig) -> Stage:
        alone = Alone()
        experts = ExpertParallel(ExpertLayout(), alone, Background(), Statistics())
        return cls(range(config.num_layers), True, True, Groups(alone, alone, alone), experts)


class Decoder:
    """Token ids to logits, or a stage of that. Holds the weights; keys and values are the attention's business."""

    def __init__(self, config: ModelConfig, source: WeightSource, context_length: int, stage: Stage) -> None:
        """Raises ModelError if `source` lacks a tensor or has it in another shape."""
        hidden, vocab = config.hidden_size, config.vocab_size
        self._stage, self._hidden = stage, hidden
        among = stage.groups.attention
        self._embedding: Embedding | None = None
        self._head: Head | None = None
        self._head_sees_all = False
        embedding, tied = "model.embed_tokens", config.tie_word_embeddings
        # A head in 16 bits has an order of its own; in the embedding's it would have to be widened for every product.
        shared = tied and stage.ends and source.matrix_dtype(f"{embedding}.weight") == source.dtype
        if stage.embeds or shared:
            self._embedding = Embedding(source, embedding, vocab, hidden, among)
        self.layers = [DecoderLayer(config, source, number, index, stage) for index, number in enumerate(stage.layers)]
        if stage.ends:
            self._norm = RmsNorm(source, "model.norm", hidden, config.rms_norm_eps)
            if shared and self._embedding is not None:
                self._head = Head.tied(self._embedding, vocab, among)
            elif tied:
                self._head = Head(source, embedding, vocab, hidden, among)
            else:
                self._head_sees_all = stage.split_head
                group = stage.groups.stage if stage.split_head else among
                self._head = Head(source, "lm_head", vocab, hidden, group)
        self._rope = RotaryEmbedding(config.rope, config.head_dim, context_length, source.dtype, source.device)

    def whole(self, attention: PagedAttention) -> WholeDecoder | None:
        """All of it as one call for steps in which every token decodes; None: there is something that it cannot do."""
        layers, group = [layer.native for layer in self.layers], self._stage.groups.stage
        native = [layer for layer in layers if layer is not None]
        if not can_sum(group) or len(native) < len(layers):
            return None
        end = None
        # All ranks find the same: a head of one row is no `Matrix`.
        if self._head is not None and isinstance(self._head.product, Matrix) and min(self._head.widths) > 1:
            end = self._norm, self._head
        embedding = self._embedding if self._stage.embeds else None
        return WholeDecoder(native, self._hidden, embedding, self._rope, end, attention, group)

    def compiled_mlps(self) -> list[CompiledMlp]:
        """Those of layers and of shared experts."""
        found = [
            layer.mlp.shared_mlp if isinstance(layer.mlp, MixtureOfExperts) else layer.mlp for layer in self.layers
        ]
        return [mlp for mlp in found if isinstance(mlp, CompiledMlp)]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, hidden]; in the first stage only."""
        assert self._embedding is not None
        return self._embedding(token_ids)

    def forward(
        self, x: torch.Tensor, attention: PagedAttention, batch: AttentionBatch, rows: StepRows
    ) -> torch.Tensor:
        """[tokens, hidden] -> the same, through the layers of this stage."""
        cos_sin = self._rope.at(batch.positions)
        for layer in self.layers:
            x = layer(x, cos_sin, self._rope, attention, batch, rows)
        return x

    def forward_halves(
        self, x: torch.Tensor, attention: PagedAttention, halves: Sequence[tuple[AttentionBatch, StepRows]]
    ) -> torch.Tensor:
        """The same, of a step in two halves."""
        sizes = [len(batch.positions) for batch, _ in halves]
        first, second = (
            Half(part, self._rope.at(batch.positions), batch, rows)
            for part, (batch, rows) in zip(torch.split(x, sizes), halves, strict=True)
        )
        return forward(self.layers, (first, second), self._rope, attention)

    def logits(self, x: torch.Tensor, rows: StepRows, *, samples: bool) -> torch.Tensor | None:
        """[wanted, hidden] -> [wanted, vocab] float32 where tokens are drawn, None elsewhere; in the last stage only.
        `rows`: who wants how many."""
        assert self._head is not None
        x = self._norm(x)
        own = range(len(x))
        if self._head_sees_all:
            x, own = rows.all(x), rows.own
        logits = self._head(x, own if samples else None)
        return None if logits is None else logits.float()


class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)): each a sum over the ranks, and the only ones there are."""

    def __init__(self, config: ModelConfig, source: WeightSource, number: int, index: int, stage: Stage) -> None:
        """`number`: of the layer in the model; `index`: in this stage."""
        name, hidden, eps = f"model.layers.{number}", config.hidden_size, config.rms_norm_eps
        kind = GroupedAttention if config.mla is None else LatentAttention
        group = stage.groups.stage
        self._heads = stage.groups.attention
        self._attention_norm = RmsNorm(source, f"{name}.input_layernorm", hidden, eps)
        self._attention = kind(config, source, f"{name}.self_attn", index, self._heads)
        self._mlp_norm = RmsNorm(source, f"{name}.post_attention_layernorm", hidden, eps)
        self.mlp: GatedMlp | CompiledMlp | MixtureOfExperts
        moe = config.moe
        if moe is None or number in moe.dense_layers:
            self.mlp = gated_mlp(source, f"{name}.mlp", hidden, config.intermediate_size, config.mlp_bias, group)
        else:
            self.mlp = MixtureOfExperts(source, f"{name}.{moe.module}", hidden, moe, group, stage.experts, number)
        self.sends = isinstance(self.mlp, MixtureOfExperts) and self.mlp.sends
        self.native: _native.Layer | None = None
        if not stage.dp_attention:
            self.native = native_layer(self._attention_norm, self._attention, self._mlp_norm, self.mlp)

    def __call__(
        self,
        x: torch.Tensor,
        cos_sin: CosSin,
        rope: RotaryEmbedding,
        attention: PagedAttention,
        batch: AttentionBatch,
        rows: StepRows,
    ) -> torch.Tensor:
        """[tokens, hidden] -> the same, in x."""
        inner = self.attend(x, cos_sin, rope, attention, batch)
        if self.sends:
            x += rows.joined(self.mlp(rows.single(inner)))
        else:
            x += rows.summed(self.mlp(rows.all(inner)))
        return x

    def attend(
        self, x: torch.Tensor, cos_sin: CosSin, rope: RotaryEmbedding, attention: PagedAttention, batch: AttentionBatch
    ) -> torch.Tensor:
        """Add to `x` what attention makes of it; the norm of that, for the MLP."""
        seen = self._heads.sum(self._attention(self._attention_norm(x), cos_sin, rope, attention, batch))
        return self._mlp_norm.after_adding(x, seen)
