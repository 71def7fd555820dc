"""What the operating system gives and refuses: files, temporary names, signals. No jax."""
