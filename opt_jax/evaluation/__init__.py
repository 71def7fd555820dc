"""Perplexity, and tasks of the lm-evaluation-harness."""
