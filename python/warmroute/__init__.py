"""Sends each LLM request to the worker whose KV cache is already warm."""
