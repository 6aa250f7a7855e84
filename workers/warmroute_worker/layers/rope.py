"""Rotary position embedding: each pair (i, i + head_dim / 2) of a head is turned by position x frequency_i."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from warmroute_worker.layers import native

if TYPE_CHECKING:
    from warmroute_worker.model_config import RopeConfig


class RotaryEmbedding:
    """Tables of cos and sin for every position of the context, made once in float32."""

    def __init__(
        self, config: RopeConfig, head_dim: int, context_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        positions = torch.arange(context_length, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(config, head_dim))
        cos, sin = angles.cos() * config.attention_factor, angles.sin() * config.attention_factor
        # The first half of a head gets -sin, the second +sin, so that one multiply-add with the rolled head is enough.
        self._cos = torch.cat((cos, cos), dim=-1).to(device, dtype)
        self._sin = torch.cat((-sin, sin), dim=-1).to(device, dtype)
        self._half = head_dim // 2
        self._native = native.usable(dtype, device)

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin, [positions, head_dim] each."""
        return self._cos, self._sin

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin of [tokens] positions, each [tokens, 1, head_dim]: once per step, for all layers."""
        if self._native:
            cos, sin = (native.rows_of(table, 0, positions) for table in (self._cos, self._sin))
            return cos.unsqueeze(1), sin.unsqueeze(1)
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def rotate(self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[tokens, heads, head_dim] -> the same, turned; x may be overwritten."""
        cos, sin = cos_sin
        if native.usable(x.dtype, x.device) and native.stands_in_rows(x):
            return native.rotate(x, cos, sin)
        return torch.addcmul(x * cos, torch.roll(x, self._half, dims=-1), sin)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] radians per position, float32.

    `llama3` (Llama 3.1): wavelengths longer than original_context / low_freq_factor are stretched by `factor`, those
    shorter than original_context / high_freq_factor are kept, those between are blended linearly in 1 / wavelength.
    `yarn`: pairs that turn more than beta_fast times in the original context are kept, those that turn less than
    beta_slow times stretched, those between blended linearly in their number.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies: torch.Tensor = 1.0 / config.theta**exponents
    if config.rope_type == "linear":
        return frequencies / config.factor
    if config.rope_type == "llama3":
        turns = config.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = config.low_freq_factor, config.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / config.factor
    if config.rope_type == "yarn":
        low, high = (_pair_that_turns(config, head_dim, turns) for turns in (config.beta_fast, config.beta_slow))
        if config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low or 0.001
        stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
        return frequencies / config.factor * stretched + frequencies * (1 - stretched)
    return frequencies


def _pair_that_turns(config: RopeConfig, head_dim: int, turns: float) -> float:
    """The number of the pair that turns so often in the original context; a fraction between two."""
    span = config.original_max_position_embeddings / (turns * 2 * math.pi)
    return head_dim * math.log(span) / (2 * math.log(config.theta))
