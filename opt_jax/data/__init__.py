"""Training data: files, documents, streams of token ids, windows whose order is fixed by (seed, step). No jax."""
