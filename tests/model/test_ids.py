"""What is accepted as token ids and as a mask, and what is refused."""

import ml_dtypes
import numpy as np
import pytest

from opt_jax.model.ids import as_array, as_ids, as_mask


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_ids_of_every_dtype(dtype):
    ids = as_ids("x", np.array([[5, 7]], dtype), 0, 9)
    assert ids.dtype == np.int32 and ids.tolist() == [[5, 7]]
    assert as_ids("x", np.zeros((0, 3), dtype)).shape == (0, 3)
    with pytest.raises(ValueError, match=r"x holds 7, outside \[0, 6\]"):
        as_ids("x", np.array([5, 7], dtype), 0, 6)


class Unreadable:
    """NumPy cannot convert it, as torch's tensors of bfloat16."""

    def __array__(self, *args, **kwargs):
        raise TypeError("no array of this")


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.array([2**32 + 5], np.uint64), "holds 4294967301"),
        (np.array([2**63 + 5], np.uint64), "holds 9223372036854775813"),
        (np.array([2**32 + 5]), "holds 4294967301"),
        (np.array([5 - 2**32]), "holds -4294967291"),
        (np.array([2**32 - 1], np.uint32), "holds 4294967295"),
        (np.array([2**31], ">u4"), "holds 2147483648"),
        ([2**64 + 5], "must be numbers, not object"),
        ([5.0], "must be integers, not float64"),
        ([True], "must be integers, not bool"),
        (["5"], "must be numbers, not <U1"),
        ([[5], [6, 7]], "rows have different lengths"),
        (np.zeros(1, [("a", int)]), "must be numbers"),
        (np.ma.array([5, 7], mask=[False, True]), "has masked entries: fill them"),
        (Unreadable(), "cannot be read as an array: no array of this"),
        (np.array([5], np.longdouble), "must be numbers that JAX has"),
    ],
)
def test_what_is_no_id(ids, words):
    with pytest.raises(ValueError, match=f"x:? {words}"):
        as_ids("x", ids)


def test_a_masked_array_that_hides_nothing_is_an_array():
    assert as_ids("x", np.ma.array([5, 7])).tolist() == [5, 7]


def test_masks():
    for mask in ([[0, 1]], [[0.0, 0.5]], [[False, True]], np.array([[0, 2**32]]), np.array([[0, 1e-300]])):
        assert as_mask("x", mask).tolist() == [[False, True]]
    for mask in ([[0, -1]], [[0, -np.inf]], [[0, np.nan]]):
        with pytest.raises(ValueError, match="x holds .*: it must be 1 at real tokens and 0 at pads"):
            as_mask("x", mask)
    with pytest.raises(ValueError, match="x must be numbers, not <U1"):
        as_mask("x", [["0", "1"]])


def test_floats_of_jax_are_numbers():
    assert as_array("x", np.zeros(1, ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16
