"""The OPT decoder and its heads, and what a call checks and returns."""
