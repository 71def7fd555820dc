"""The OPT decoder and its heads: modules, KV cache, checks of inputs, and outputs."""
