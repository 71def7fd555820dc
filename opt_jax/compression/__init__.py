"""Quantisation and pruning of OPT after training, by the methods of papers. Each module names its paper."""
