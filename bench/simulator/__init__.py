"""A discrete-event simulator of a fleet behind the real routing core: deterministic, seeded, without sockets or sleeps."""
