"""A discrete-event simulator of a fleet behind the real core: deterministic, seeded, no sockets, no sleeps."""
