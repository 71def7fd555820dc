"""Integers of a few bits in words of 32 bits, and products with them."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, UInt8, UInt32


def period(bits: int) -> int:
    """The number of integers that fill complete words of 32 bits: 8 of 4 bits fill one, 32 of 3 bits fill three."""
    return 32 // math.gcd(32, bits)


def slots_of_groups(groups: np.ndarray, count: int, bits: int) -> tuple[np.ndarray | None, int]:
    """How `PackedLinear` sorts inputs: each of `count` groups has the same number of slots, which fill complete words.

    Returns:
      The input of each slot, `len(groups)` for none, or None if it is the slot's number; the slots of a group.
    """
    sizes = np.bincount(groups, minlength=count)
    size = -(-int(sizes.max()) // period(bits)) * period(bits)
    order = np.full((count, size), len(groups), np.int32)
    order[np.arange(size)[None] < sizes[:, None]] = np.argsort(groups, kind="stable")
    order = order.reshape(-1)
    return (None if np.array_equal(order, np.arange(len(groups))) else order), size


def pack(integers: UInt8[Array, "S N"], bits: int) -> UInt32[Array, "W N"]:
    """Integers below 2**bits, packed along the first axis: a stream of bits, lowest first, as in AutoGPTQ's files.

    S is a multiple of `period(bits)`, and W is S * bits / 32.
    """
    values = integers.reshape(-1, period(bits), integers.shape[1]).astype(jnp.uint32)
    words = [jnp.zeros_like(values[:, 0])] * (period(bits) * bits // 32)
    for i in range(period(bits)):
        word, shift = divmod(i * bits, 32)
        words[word] |= values[:, i] << shift
        if shift + bits > 32:
            words[word + 1] |= values[:, i] >> (32 - shift)
    return jnp.stack(words, axis=1).reshape(-1, integers.shape[1])


def unpack(words: UInt32[Array, "W N"], bits: int) -> UInt32[Array, "S N"]:
    """The inverse of `pack`."""
    return _periods(words[None], bits).reshape(-1, words.shape[1])


def _periods(words: UInt32[Array, "G W N"], bits: int, on_cpu: bool = False) -> UInt32[Array, "G U P N"]:
    """The integers of U periods.

    Words are chosen by broadcasts and selections, which XLA can fuse into a product on a TPU. A CPU gathers rows.
    """
    length = period(bits) * bits // 32
    groups = words.reshape(len(words), -1, length, words.shape[2])
    word, shift = np.divmod(np.arange(period(bits), dtype=np.uint32) * bits, 32)

    def chosen(word: np.ndarray) -> jax.Array:
        if on_cpu and length > 1:
            return jnp.take(groups, jnp.asarray(word, jnp.int32), axis=2, mode="clip")
        out = groups[:, :, :1]
        for i in range(1, length):
            out = jnp.where((word < i)[None, None, :, None], out, groups[:, :, i : i + 1])
        return out

    values = chosen(word) >> jnp.asarray(shift, jnp.uint32)[None, None, :, None]
    if length > 1:  # the rest of an integer that ends in the next word
        left = jnp.asarray(np.where(shift + bits > 32, 32 - shift, 0), jnp.uint32)[None, None, :, None]
        rest = chosen(np.minimum(word + 1, length - 1)) << left
        values |= jnp.where(left > 0, rest, jnp.uint32(0))
    return values & jnp.uint32(2**bits - 1)


FEW_ROWS = {"cpu": 2, "tpu": 12, "gpu": 8}  # up to so many rows of x, no floats of more than a few inputs are written


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def product(
    x: Float[Array, "R S"] | Int8[Array, "R S"],
    qweight: UInt32[Array, "W N"],
    scales: Float32[Array, "G N"],
    zeros: UInt8[Array, "G N"] | None,
    bits: int,
) -> Float32[Array, "R N"]:
    """x times the dequantized matrix, for the arrays of a `PackedLinear`.

    For few rows (see `FEW_ROWS`) it reads the packed bytes once and writes no floats of the matrix. For the many rows
    of a prompt it writes them first: on a CPU those of a few inputs at a time, elsewhere those of all.

    int8 x: a product of integers, for many rows on GPUs and TPUs with int32 sums, else with float32 sums. It needs 8
    bits, one group and no `zeros`.
    """
    return lax.platform_dependent(
        x,
        qweight,
        scales,
        zeros,
        cpu=partial(_on_cpu, bits=bits),
        tpu=partial(_on_tpu, bits=bits),
        default=partial(_on_gpu, bits=bits),
    )


@product.defjvp
def _(_bits: Any, _primals: Any, _tangents: Any):
    raise ValueError("packed matrices have no gradients: use opt_jax.dequantize(model)")


def _are_few(x: Array, platform: str) -> bool:
    return isinstance(x.shape[0], int) and x.shape[0] <= FEW_ROWS[platform]  # symbolic in `jax.export`


def _on_tpu(x: Array, qweight: Array, scales: Array, zeros: Array | None, bits: int) -> Float32[Array, "R N"]:
    """A product for each group, then the scales. Integers of up to 8 bits are exact in bfloat16.

    XLA unpacks 2, 4 and 8 bits inside the product. Integers that cross words (3, 5, 6, 7 bits) it first takes apart in
    on-chip memory, which takes longer than reading bfloat16. Few rows are filled up to eight: for fewer, XLA would
    leave the matrix unit idle.
    """
    if not _are_few(x, "tpu"):
        return _after_unpacking(x, qweight, scales, zeros, bits)
    rows, (groups, outputs), middle = x.shape[0], scales.shape, 2 ** (bits - 1)
    integers = _periods(qweight.reshape(groups, -1, outputs), bits).astype(jnp.int32) - middle
    x = jnp.pad(x, ((0, max(0, 8 - rows)), (0, 0))).reshape(-1, groups, *integers.shape[1:3])
    x = x.astype(jnp.bfloat16) if x.dtype == jnp.int8 else x  # exact; XLA does not unpack inside a product of int8
    out = jnp.einsum("rgup,gupn->grn", x, integers.astype(x.dtype), preferred_element_type=jnp.float32)
    if zeros is not None:
        total = x.astype(jnp.float32).sum((2, 3)).T
        out -= total[:, :, None] * (zeros.astype(jnp.float32) - middle)[:, None]
    return (out * scales[:, None]).sum(0)[:rows]


def _on_gpu(x: Array, qweight: Array, scales: Array, zeros: Array | None, bits: int) -> Float32[Array, "R N"]:
    """Products number by number and sums, which XLA fuses into one kernel: it reads each word once for all rows.

    It sums up to 16 periods at a time. Longer sums XLA would transpose first, or not fuse.
    """
    if not _are_few(x, "gpu"):
        return _after_unpacking(x, qweight, scales, zeros, bits)
    (groups, outputs), length = scales.shape, period(bits) * bits // 32
    summed = _largest_divisor(len(qweight) // groups // length, 16)
    words = qweight.reshape(groups, -1, summed, length, outputs)
    numbers = x.astype(jnp.float32).reshape(len(x), groups, -1, summed, period(bits))
    terms = [jnp.zeros((), jnp.float32)] * len(x)
    for word in range(length):
        for number, factor, taken in _pieces(words[..., word, :], bits, word):
            scaled = numbers[..., number, None] * jnp.float32(factor)
            terms = [term + scaled[row] * taken for row, term in enumerate(terms)]
    sums = lax.optimization_barrier([term.sum(2) for term in terms])
    middle = jnp.float32(2 ** (bits - 1)) if zeros is None else zeros.astype(jnp.float32)
    total = numbers.sum((2, 3, 4))[..., None]
    return jnp.stack([((each.sum(1) - total[row] * middle) * scales).sum(0) for row, each in enumerate(sums)])


def _after_unpacking(x: Array, qweight: Array, scales: Array, zeros: Array | None, bits: int) -> Float32[Array, "R N"]:
    """The product with a kernel that is written to memory first, in the dtype of x."""
    if x.dtype == jnp.int8:
        kernel = (unpack(qweight, bits).astype(jnp.int32) - 128).astype(jnp.int8)
        return jnp.dot(x, kernel, preferred_element_type=jnp.int32).astype(jnp.float32) * scales
    kernel = dequantized(qweight, scales, zeros, bits).astype(x.dtype)
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def dequantized(
    qweight: UInt32[Array, "W N"], scales: Float32[Array, "G N"], zeros: UInt8[Array, "G N"] | None, bits: int
) -> Float32[Array, "S N"]:
    """The kernel in float32."""
    integers = _periods(qweight.reshape(len(scales), -1, scales.shape[1]), bits).astype(jnp.int32)
    middle = jnp.float32(2 ** (bits - 1)) if zeros is None else zeros.astype(jnp.float32)[:, None, None]
    return ((integers.astype(jnp.float32) - middle) * scales[:, None, None]).reshape(-1, scales.shape[1])


def _on_cpu(x: Array, qweight: Array, scales: Array, zeros: Array | None, bits: int) -> Float32[Array, "R N"]:
    """The product in a loop over parts of the inputs.

    XLA's CPU compiler does not fuse the unpacking into a matrix product. Without a loop it writes all floats to memory,
    which takes 20 times as long as the product. One or two rows are multiplied number by number, with the outputs as
    the vector's axis. For more rows a step writes the floats of its inputs to the cache, and multiplies matrices.
    """
    x, rows = x.astype(jnp.float32), x.shape[0]
    if _are_few(x, "cpu"):
        return _multiplied(x, qweight, scales, zeros, bits)
    slots = 128 if isinstance(rows, int) and rows <= 256 else 1024
    return _in_parts(x, qweight, scales, zeros, bits, slots)


def _in_parts(
    x: Float32[Array, "R S"], qweight: Array, scales: Array, zeros: Array | None, bits: int, slots: int
) -> Float32[Array, "R N"]:
    outputs, parts = scales.shape[1], _Parts.of(x, scales, bits, slots)
    words, x = qweight.reshape(parts.steps, parts.groups, -1, outputs), x.reshape(x.shape[0], parts.steps, -1)
    scales = scales.reshape(-1, parts.groups, outputs)

    def step(i: Array, total: Array) -> Array:
        scale = lax.dynamic_index_in_dim(scales, i // parts.repeats, 0, False)
        middle: Any = jnp.float32(2 ** (bits - 1))
        if zeros is not None:
            middle = lax.dynamic_index_in_dim(zeros.reshape(scales.shape), i // parts.repeats, 0, False)
        shift, scale = (middle.astype(jnp.float32) * scale)[:, None, None], scale[:, None, None]
        integers = _periods(lax.dynamic_index_in_dim(words, i, 0, False), bits, on_cpu=True).astype(jnp.int32)
        kernel = (integers.astype(jnp.float32) * scale - shift).reshape(-1, outputs)
        return total + jnp.dot(lax.dynamic_index_in_dim(x, i, 1, False), kernel)

    return lax.fori_loop(0, parts.steps, step, jnp.zeros((x.shape[0], outputs), jnp.float32))


def _multiplied(
    x: Float32[Array, "R S"], qweight: Array, scales: Array, zeros: Array | None, bits: int
) -> Float32[Array, "R N"]:
    rows, outputs, parts = x.shape[0], scales.shape[1], _Parts.of(x, scales, bits, 32)
    threads = math.gcd(outputs, 16) if outputs >= 1024 else 1  # XLA splits a loop over an outer axis only
    lanes = threads, outputs // threads
    words, scales = qweight.reshape(-1, *lanes), scales.reshape(-1, *lanes)
    zeros = None if zeros is None else zeros.reshape(scales.shape)
    x = x.reshape(rows, parts.steps, parts.groups, -1, period(bits))
    length = period(bits) * bits // 32

    def row(array: Array, index: Any) -> Float[Array, "1 threads lanes"]:
        return lax.dynamic_index_in_dim(array, jnp.asarray(index, jnp.int32), 0)

    def step(i: Array, total: Array) -> Array:
        numbers = lax.dynamic_index_in_dim(x, i, 1, False)
        for g in range(parts.groups):
            group, middle = i // parts.repeats * parts.groups + g, jnp.float32(2 ** (bits - 1))
            if zeros is not None:
                middle = row(zeros, group).astype(jnp.float32)
            sums = -numbers[:, g].sum((1, 2))[:, None, None] * middle
            for k, word in itertools.product(range(numbers.shape[2]), range(length)):
                at = ((i * parts.groups + g) * numbers.shape[2] + k) * length + word
                for number, factor, taken in _pieces(row(words, at), bits, word):
                    sums += numbers[:, g, k, number, None, None] * jnp.float32(factor) * taken
            total += sums * row(scales, group)
        return total

    return lax.fori_loop(0, parts.steps, step, jnp.zeros((rows, *lanes), jnp.float32)).reshape(rows, outputs)


def _pieces(words: UInt32[Array, "..."], bits: int, word: int) -> Iterator[tuple[int, float, Float32[Array, "..."]]]:
    """(number, factor, piece): the pieces of a period's integers that lie in one of its words.

    An integer is the sum of factor * piece over its one or two pieces. A piece is not shifted but divided by a factor,
    which is exact in float32 and free, unless it ends at bit 31, the sign of int32.
    """
    for number in range(period(bits)):
        first, last = number * bits - 32 * word, (number + 1) * bits - 32 * word
        if last <= 0 or first >= 32:
            continue
        factor, taken = 2.0**-first, words & jnp.uint32(2 ** min(last, 32) - 2 ** max(first, 0))
        if last >= 32:
            factor, taken = 1.0, words >> jnp.uint32(first)
        yield number, factor, taken.astype(jnp.int32).astype(jnp.float32)


class _Parts(NamedTuple):
    """A loop over the slots of a matrix. Each step takes `groups` complete groups, or one of `repeats` parts of one."""

    steps: int
    groups: int
    repeats: int

    @classmethod
    def of(cls, x: Array, scales: Array, bits: int, slots: int) -> "_Parts":
        """Steps of at most `slots` slots, or of one period of bits."""
        count, periods = len(scales), x.shape[1] // len(scales) // period(bits)
        most = max(1, slots // period(bits))
        groups = _largest_divisor(count, most // periods) if periods <= most else 1
        repeats = 1 if periods <= most else periods // _largest_divisor(periods, most)
        return cls(count * repeats // groups, groups, repeats)


def _largest_divisor(number: int, most: int) -> int:
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)
