"""Tokenizer and pipelines: text in, text out."""
