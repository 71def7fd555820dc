"""Environments of the processes that tests start."""

import os
import re


def environment(devices: int = 1, **changes: str) -> dict[str, str]:
    """That of the tests (see conftest.py), but for the number of CPU devices, and `changes`."""
    flag = "--xla_force_host_platform_device_count"
    return os.environ | {"XLA_FLAGS": re.sub(rf"{flag}=\d+", f"{flag}={devices}", os.environ["XLA_FLAGS"])} | changes
