"""Readers of checkpoints that other programs have written: safetensors, torch zip files, Hugging Face's names."""
