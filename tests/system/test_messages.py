"""Messages quote foreign values in one printable line of limited length."""

import jax.numpy as jnp
import numpy as np

from opt_jax.system.messages import one_line, shown


def test_texts_become_one_printable_line():
    assert one_line("two\nlines\tand  spaces") == "two lines and spaces"
    assert one_line("a bell \x07") == "a bell \\x07"
    line = one_line("a" * 700 + "b" * 700, limit=120)
    assert line == "a" * 80 + " ... " + "b" * 30 and len(line) <= 120


def test_values_are_quoted_whatever_they_are():
    assert shown("x\n") == "'x\\n'" and len(shown(["y"] * 1000)) <= 100
    assert shown(np.int64(7)) == repr(np.int64(7))
    assert shown(10**5000) == "a very large int"  # Python refuses to write out its digits


def test_of_an_array_shape_and_dtype_are_quoted():
    for array in (np.arange(12, dtype=np.float32).reshape(3, 4), jnp.ones((3, 4), jnp.float32)):
        assert shown(array) == "an array of shape (3, 4), float32"
    assert shown(np.array(3)) == "array(3)" and shown(np.zeros(0)) == "an array of shape (0,), float64"
