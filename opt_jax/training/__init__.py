"""What train.py strings together: data, optimizer, the compiled step, checkpoints, metrics. No argument parsing."""
