"""The paged KV pool: who owns which page, what the prefix cache holds, and the tensors themselves."""
