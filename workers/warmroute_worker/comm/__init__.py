"""How ranks compute together: sums, parts put together, and what one hands to the next."""
