"""Runs step plans: model, pool and sampler behind one call."""
