"""What a layer does before and after the paged attention: projections, norms and turns of queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from warmroute_worker import topology
from warmroute_worker.layers.linear import Linear, RmsNorm
from warmroute_worker.weights.source import Part

if TYPE_CHECKING:
    from collections.abc import Callable

    from warmroute_worker.comm.tensor_group import TensorGroup
    from warmroute_worker.layers.attention import AttentionBatch, PagedAttention
    from warmroute_worker.layers.rope import RotaryEmbedding
    from warmroute_worker.model_config import MlaConfig, ModelConfig
    from warmroute_worker.weights.source import WeightSource

CosSin = tuple[torch.Tensor, torch.Tensor]

# DeepSeek's inner norms have this, whatever `rms_norm_eps` says.
LATENT_NORM_EPS = 1e-6


class GroupedAttention:
    """Queries of many heads, keys and values of fewer; in some families a norm over each head.

    `WholeDecoder` makes one native call of what stands here, and of all layers.
    """

    def __init__(self, config: ModelConfig, source: WeightSource, name: str, index: int, group: TensorGroup) -> None:
        """`index`: which of the pool's layers is this one's."""
        hidden, eps, dim = config.hidden_size, config.rms_norm_eps, config.head_dim
        self.index = index
        self.head_dim = dim
        heads = topology.share(config.num_heads, group.rank, group.size)
        kv_heads = topology.kv_heads(config.num_heads, config.num_kv_heads, group.rank, group.size)
        self.num_heads, self.num_kv_heads = len(heads), len(kv_heads)
        query_size, kv_size = config.num_heads * dim, config.num_kv_heads * dim
        own = range(heads.start * dim, heads.stop * dim)
        of_keys = Part.of_heads(kv_heads, dim)
        sizes, parts = [query_size, kv_size, kv_size], [Part.of_rows(own), of_keys, of_keys]
        self.qkv = Linear(source, [f"{name}.{x}_proj" for x in "qkv"], hidden, sizes, config.qkv_bias, parts)
        self.output = Linear(source, [f"{name}.o_proj"], query_size, [hidden], config.output_bias, [Part(columns=own)])
        self.head_norms: tuple[RmsNorm, RmsNorm] | None = None
        if config.query_key_norm:
            query_norm, key_norm = (RmsNorm(source, f"{name}.{x}_norm", config.head_dim, eps) for x in "qk")
            self.head_norms = query_norm, key_norm

    def __call__(
        self, x: torch.Tensor, cos_sin: CosSin, rope: RotaryEmbedding, attention: PagedAttention, batch: AttentionBatch
    ) -> torch.Tensor:
        """[tokens, hidden] -> this rank's part of the sum, [tokens, hidden]"""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x).view(len(x), heads + 2 * kv_heads, self.head_dim)
        unturned = qkv[:, : heads + kv_heads]
        if self.head_norms is not None:
            query_norm, key_norm = self.head_norms
            queries, keys = query_norm.of_heads(qkv[:, :heads]), key_norm.of_heads(qkv[:, heads : heads + kv_heads])
            unturned = _beside(queries, keys)
        turned = rope.rotate(unturned, cos_sin)
        values = qkv[:, heads + kv_heads :]
        return self.output(attention.attend(self.index, turned[:, :heads], turned[:, heads:], values, batch))


class LatentAttention:
    """DeepSeek's multi-head latent attention (arXiv 2405.04434, section 2.1), absorbed: heads look at the latent rows
    as they are, since what would make keys and values of them stands before the query and behind the output."""

    def __init__(self, config: ModelConfig, source: WeightSource, name: str, index: int, group: TensorGroup) -> None:
        """`index`: which of the pool's layers is this one's. Heads are divided; latent rows every rank has."""
        mla = config.mla
        assert mla is not None
        hidden = config.hidden_size
        all_heads, own = config.num_heads, topology.share(config.num_heads, group.rank, group.size)
        heads = len(own)
        self._index, self._mla, self._num_heads = index, mla, heads
        query_dim = mla.plain_dim + mla.rope_dim
        self._scale = query_dim**-0.5 * config.rope.score_factor
        queries = [Part.of_rows(range(own.start * query_dim, own.stop * query_dim))]
        turn = _parter(heads, mla)
        self._query_down: Linear | None = None
        if mla.query_rank is None:
            self._query = Linear(source, [f"{name}.q_proj"], hidden, [all_heads * query_dim], False, queries, turn)
        else:
            rank = mla.query_rank
            self._query_down = Linear(source, [f"{name}.q_a_proj"], hidden, [rank], mla.bias)
            self._query_norm = RmsNorm(source, f"{name}.q_a_layernorm", rank, LATENT_NORM_EPS)
            self._query = Linear(source, [f"{name}.q_b_proj"], rank, [all_heads * query_dim], False, queries, turn)
        turn = _parter(1, mla)
        self._latent = Linear(source, [f"{name}.kv_a_proj_with_mqa"], hidden, [mla.row_dim], mla.bias, arrange=turn)
        self._latent_norm = RmsNorm(source, f"{name}.kv_a_layernorm", mla.latent_rank, LATENT_NORM_EPS)
        parts = mla.plain_dim + mla.value_dim
        rows = Part.of_rows(range(own.start * parts, own.stop * parts))
        expand = source.tensor(f"{name}.kv_b_proj.weight", (all_heads * parts, mla.latent_rank), part=rows)
        expand = expand.view(heads, parts, mla.latent_rank)
        self._to_key, self._to_value = expand[:, : mla.plain_dim], expand[:, mla.plain_dim :].transpose(1, 2)
        outputs = [Part(columns=range(own.start * mla.value_dim, own.stop * mla.value_dim))]
        self._output = Linear(source, [f"{name}.o_proj"], all_heads * mla.value_dim, [hidden], mla.bias, outputs)

    def __call__(
        self, x: torch.Tensor, cos_sin: CosSin, rope: RotaryEmbedding, attention: PagedAttention, batch: AttentionBatch
    ) -> torch.Tensor:
        """[tokens, hidden] -> this rank's part of the sum, [tokens, hidden]"""
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
        return self._output(values.transpose(0, 1).flatten(1))


def _beside(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[tokens, a, dim] and [tokens, b, dim] as one; without a copy where they stand side by side already."""
    if left.data_ptr() + left.shape[1] * left.stride(1) * left.itemsize == right.data_ptr():
        shape = (left.shape[0], left.shape[1] + right.shape[1], left.shape[2])
        return left.as_strided(shape, left.stride())
    return torch.cat((left, right), dim=1)


def _parter(heads: int, mla: MlaConfig) -> Callable[[torch.Tensor], None] | None:
    """What puts the first of each pair into the first half of what is turned, the second into the second half.

    Queries and keys both have it then, so that their products stay what they were.
    """

    def part(tensor: torch.Tensor) -> None:
        turned = tensor.view(heads, -1, *tensor.shape[1:])[:, -mla.rope_dim :]
        turned.copy_(torch.cat((turned[:, ::2], turned[:, 1::2]), dim=1))

    return part if mla.interleaved else None
