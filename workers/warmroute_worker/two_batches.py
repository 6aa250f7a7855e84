"""Where a step is cut in two, so that one half is computed while the rows of the other are on their way. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from warmroute_worker.step_plan import StepPlan


def first_half(plan: StepPlan, threshold: float) -> int:
    """Tokens of the first half; 0 if there are not two.

    Between two sequences, where the halves differ least. If the smaller one has less than a share of `threshold`, a
    prefill is cut in the middle instead (SGLang's two-chunk overlap); 0 forbids that.
    """
    total = len(plan.token_ids)
    if total < 2:
        return 0
    ends = np.cumsum(plan.lengths)[:-1]
    best = int(ends[np.abs(2 * ends - total).argmin()]) if len(ends) else 0
    if best and min(best, total - best) >= threshold * total:
        return best
    middle = total // 2
    before = int(np.searchsorted(np.cumsum(plan.lengths), middle, side="right"))
    # Decodes have one token each, and their borders were looked at.
    return middle if threshold > 0 and int(plan.lengths[before]) > 1 else best
