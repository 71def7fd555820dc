"""The operating system: files, temporary names, signals, and its errors. No jax."""
