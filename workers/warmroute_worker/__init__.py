"""A torch inference server with a paged KV pool and a radix prefix cache."""
