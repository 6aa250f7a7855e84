"""What a layer does before and after the paged attention: projections, norms and turns of queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from warmroute_worker.layers.linear import Linear, RmsNorm

if TYPE_CHECKING:
    from warmroute_worker.layers.attention import AttentionBatch, PagedAttention
    from warmroute_worker.layers.rope import RotaryEmbedding
    from warmroute_worker.model_config import MlaConfig, ModelConfig
    from warmroute_worker.weights.source import WeightSource

CosSin = tuple[torch.Tensor, torch.Tensor]

# DeepSeek's inner norms have this, whatever `rms_norm_eps` says.
LATENT_NORM_EPS = 1e-6


class GroupedAttention:
    """Queries of many heads, keys and values of fewer; in some families a norm over each head."""

    def __init__(self, config: ModelConfig, source: WeightSource, name: str, index: int) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self._index = index
        self._head_dim = config.head_dim
        self._num_heads, self._num_kv_heads = config.num_heads, config.num_kv_heads
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        projections = [f"{name}.{part}_proj" for part in "qkv"]
        self._qkv = Linear(source, projections, hidden, [query_size, kv_size, kv_size], config.qkv_bias)
        self._output = Linear(source, [f"{name}.o_proj"], query_size, [hidden], config.output_bias)
        self._head_norms: tuple[RmsNorm, RmsNorm] | None = None
        if config.query_key_norm:
            query_norm, key_norm = (RmsNorm(source, f"{name}.{x}_norm", config.head_dim, eps) for x in "qk")
            self._head_norms = query_norm, key_norm

    def __call__(
        self, x: torch.Tensor, cos_sin: CosSin, rope: RotaryEmbedding, attention: PagedAttention, batch: AttentionBatch
    ) -> torch.Tensor:
        """[tokens, hidden] -> the same"""
        heads, kv_heads = self._num_heads, self._num_kv_heads
        qkv = self._qkv(x).view(len(x), heads + 2 * kv_heads, self._head_dim)
        unturned = qkv[:, : heads + kv_heads]
        if self._head_norms is not None:
            query_norm, key_norm = self._head_norms
            unturned = torch.cat((query_norm(qkv[:, :heads]), key_norm(qkv[:, heads : heads + kv_heads])), dim=1)
        turned = rope.rotate(unturned, cos_sin)
        values = qkv[:, heads + kv_heads :]
        return self._output(attention.attend(self._index, turned[:, :heads], turned[:, heads:], values, batch))


class LatentAttention:
    """DeepSeek's multi-head latent attention (arXiv 2405.04434, section 2.1), absorbed: heads look at the latent rows
    as they are, since what would make keys and values of them stands before the query and behind the output."""

    def __init__(self, config: ModelConfig, source: WeightSource, name: str, index: int) -> None:
        mla = config.mla
        assert mla is not None
        hidden, heads = config.hidden_size, config.num_heads
        self._index, self._mla, self._num_heads = index, mla, heads
        query_dim = mla.plain_dim + mla.rope_dim
        self._scale = query_dim**-0.5 * config.rope.score_factor
        self._query_down: Linear | None = None
        if mla.query_rank is None:
            self._query = Linear(source, [f"{name}.q_proj"], hidden, [heads * query_dim], bias=False)
        else:
            rank = mla.query_rank
            self._query_down = Linear(source, [f"{name}.q_a_proj"], hidden, [rank], mla.bias)
            self._query_norm = RmsNorm(source, f"{name}.q_a_layernorm", rank, LATENT_NORM_EPS)
            self._query = Linear(source, [f"{name}.q_b_proj"], rank, [heads * query_dim], bias=False)
        self._latent = Linear(source, [f"{name}.kv_a_proj_with_mqa"], hidden, [mla.row_dim], mla.bias)
        self._latent_norm = RmsNorm(source, f"{name}.kv_a_layernorm", mla.latent_rank, LATENT_NORM_EPS)
        parts = mla.plain_dim + mla.value_dim
        expand = source.tensor(f"{name}.kv_b_proj.weight", (heads * parts, mla.latent_rank))
        expand = expand.view(heads, parts, mla.latent_rank)
        self._to_key, self._to_value = expand[:, : mla.plain_dim], expand[:, mla.plain_dim :].transpose(1, 2)
        self._output = Linear(source, [f"{name}.o_proj"], heads * mla.value_dim, [hidden], mla.bias)
        if mla.interleaved:
            _part_pairs(self._query, heads, mla)
            _part_pairs(self._latent, 1, mla)

    def __call__(
        self, x: torch.Tensor, cos_sin: CosSin, rope: RotaryEmbedding, attention: PagedAttention, batch: AttentionBatch
    ) -> torch.Tensor:
        """[tokens, hidden] -> the same"""
        mla, heads = self._mla, self._num_heads
        inner = x if self._query_down is None else self._query_norm(self._query_down(x))
        queries = self._query(inner).view(len(x), heads, mla.plain_dim + mla.rope_dim)
        latent = self._latent(x)
        turned = rope.rotate(queries[..., mla.plain_dim :], cos_sin)
        # [heads, tokens, plain] x [heads, plain, rank]
        absorbed = torch.bmm(queries[..., : mla.plain_dim].transpose(0, 1), self._to_key).transpose(0, 1)
        turned_key = rope.rotate(latent[:, None, mla.latent_rank :], cos_sin).squeeze(1)
        rows = torch.cat((self._latent_norm(latent[:, : mla.latent_rank]), turned_key), dim=1)
        queries = torch.cat((absorbed, turned), dim=2)
        seen = attention.attend_latent(self._index, queries, rows, mla.latent_rank, self._scale, batch)
        # [heads, tokens, rank] x [heads, rank, value]
        values = torch.bmm(seen.view(len(x), heads, mla.latent_rank).transpose(0, 1), self._to_value)
        return self._output(values.transpose(0, 1).reshape(len(x), -1))


def _part_pairs(linear: Linear, heads: int, mla: MlaConfig) -> None:
    """Put the first of each pair into the first half of what is turned, the second into the second half.

    Queries and keys both have it then, so that their products stay what they were.
    """
    for tensor in (linear.weight, linear.bias):
        if tensor is None:
            continue
        turned = tensor.view(heads, -1, *tensor.shape[1:])[:, -mla.rope_dim :]
        turned.copy_(torch.cat((turned[:, ::2], turned[:, 1::2]), dim=1))
