"""Everything that is not the hot path: registration, probing, the admin API, metrics."""
