"""Which class implements which architecture of config.json (`model_config.SUPPORTED_ARCHITECTURES` names them)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from warmroute_worker.model_config import SUPPORTED_ARCHITECTURES
from warmroute_worker.models.decoder import Decoder

if TYPE_CHECKING:
    from warmroute_worker.model_config import ModelConfig
    from warmroute_worker.models.decoder import Stage
    from warmroute_worker.weights.source import WeightSource

_CLASSES = dict.fromkeys(SUPPORTED_ARCHITECTURES, Decoder)


def build(config: ModelConfig, source: WeightSource, context_length: int, stage: Stage) -> Decoder:
    """The model, or a stage of it, with its weights. Raises ModelError if `source` does not fit `config`."""
    return _CLASSES[config.architecture](config, source, context_length, stage)
