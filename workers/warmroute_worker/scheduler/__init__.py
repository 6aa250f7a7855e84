"""Which tokens the next step computes: pure bookkeeping, no torch, no IO, no clock."""
