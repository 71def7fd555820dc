"""The parts of train.py: options, data, optimizer, the compiled step, checkpoints, metrics."""
