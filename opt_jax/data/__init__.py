"""Training data: files, documents, streams of token ids, windows in an order fixed by (seed, step). No jax."""
