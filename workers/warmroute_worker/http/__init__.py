"""The process that serves HTTP. Imports no torch."""
