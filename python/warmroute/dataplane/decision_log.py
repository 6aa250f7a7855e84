"""`--log-decisions SHARE`: why a request goes where it goes, in the log, for a share of the requests."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from warmroute._core import Core, Explanation, RoutedRequest
    from warmroute.directory import Directory

log = logging.getLogger(__name__)

MOST_CANDIDATES = 8
"""In a line; those with the longest matches."""


class DecisionLog:
    """Explains before the core decides: the same state, so the same decision, unless another process comes between."""

    def __init__(self, core: Core, directory: Directory, share: float) -> None:
        self._core = core
        self._directory = directory
        self._share = share
        # Of its own: who samples shall not change what is drawn for anything else.
        self._generator = random.Random()

    def sample(self, request: RoutedRequest, request_id: bytes, now_ns: int) -> None:
        """Raises UnknownModel, RegionBusy."""
        if self._generator.random() < self._share:
            self._explain(self._core.explain_request(request, now_ns), request, request_id)

    def _explain(self, explained: Explanation, request: RoutedRequest, request_id: bytes) -> None:
        chosen = "nobody" if explained.chosen is None else self._name(explained.chosen)
        ranked = sorted(explained.candidates, key=lambda candidate: -candidate[1])
        shown = [self._candidate(*candidate) for candidate in ranked[:MOST_CANDIDATES]]
        rest = len(ranked) - len(shown)
        log.info(
            "decision %s: model %s, prompt of %d bytes -> %s (%s: %s); %s%s",
            request_id.decode("latin-1"),
            request.model,
            explained.prompt_bytes,
            chosen,
            explained.policy,
            explained.reason,
            ", ".join(shown) or "no candidates",
            f" and {rest} more" if rest else "",
        )

    def _candidate(self, slot: int, match_bytes: int, load: int, outstanding_tokens: int, cost: float | None) -> str:
        costs = "" if cost is None else f", costs {cost * 1e3:.1f} ms"
        work = f"{load} in flight with {outstanding_tokens} tokens to read"
        return f"{self._name(slot)} holds {match_bytes} bytes, {work}{costs}"

    def _name(self, slot: int) -> str:
        address = self._directory.address(slot)
        return address.url if address else f"slot {slot}"
