"""Stop strings outside of compiled code."""

import numpy as np

from opt_jax.text.streaming import StopStrings


def stop_lengths(stops: StopStrings, tokens: np.ndarray) -> list[int | None]:
    """For each row of `tokens` [B, N]: the number of tokens after which a stop string is complete, or None."""
    lengths = []
    for state, row in zip(stops.states.tolist(), tokens.tolist(), strict=True):
        length = None
        for n, token in enumerate(row, 1):
            state = stops.table[state, token]
            if state == len(stops.table) - 1 and length is None:
                length = n
        lengths.append(length)
    return lengths
