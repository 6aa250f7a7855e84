"""The mathematics of each model family."""
