"""Matrices as integers of a few bits with scales by groups of inputs, as GPTQ and AWQ make them.

`QuantizedMatrix` is what methods and files hand over. `PackedLinear` is a layer that keeps the bits packed in memory.
`packed_models.py` has the functions for models.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int8, Int32, UInt8, UInt32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [N, K], outputs by inputs, as in PyTorch: `(integers - zeros) * scales`, by groups of inputs.

    Attributes:
      integers: 0 to 2**bits - 1.
      scales: one for each output and group.
      zeros: the integers that mean 0, one for each output and group; 2**(bits - 1) of a symmetric grid.
      groups: the group of each input. Without act-order it is `arange(K) // group_size`.
      bits: 2 to 8.
    """

    integers: UInt8[Array, "N K"]
    scales: Float32[Array, "N G"]
    zeros: Float32[Array, "N G"]
    groups: Int32[Array, " K"]
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.integers.shape
        return rows, columns

    def dequantize(self) -> Float32[Array, "N K"]:
        """The matrix in float32."""
        integers = self.integers.astype(jnp.float32)
        return (integers - self.zeros[:, self.groups]) * self.scales[:, self.groups]


# Packing -------------------------------------------------------------------------------------------------------


def period(bits: int) -> int:
    """The number of integers that fill complete words of 32 bits: 8 of 4 bits fill one, 32 of 3 bits fill three."""
    return 32 // math.gcd(32, bits)


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


# Products ------------------------------------------------------------------------------------------------------

FEW_ROWS_CPU, FEW_ROWS = 2, 12  # up to so many rows of x, a product reads the packed bytes only


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def product(
    x: Float[Array, "R S"] | Int8[Array, "R S"],
    qweight: UInt32[Array, "W N"],
    scales: Float32[Array, "G N"],
    zeros: UInt8[Array, "G N"] | None,
    bits: int,
) -> Float32[Array, "R N"]:
    """x times the dequantized matrix, for the arrays of a `PackedLinear`.

    How depends on the number of rows. To decode, the packed bytes are read once, and the integers exist in registers
    or beside the processor only. For the many rows of a prompt, floats are written first: on a CPU those of a part of
    the inputs, elsewhere those of the matrix.

    int8 x: a product of integers. It needs 8 bits, one group and no `zeros`.
    """
    return lax.platform_dependent(
        x,
        qweight,
        scales,
        zeros,
        cpu=partial(_on_cpu, bits=bits),
        tpu=partial(_by_groups, bits=bits, least_rows=8),
        default=partial(_by_groups, bits=bits, least_rows=1),
    )


@product.defjvp
def _(_bits: Any, _primals: Any, _tangents: Any):
    raise ValueError("packed matrices have no gradients: use opt_jax.dequantize(model)")


def _by_groups(
    x: Array, qweight: Array, scales: Array, zeros: Array | None, bits: int, least_rows: int
) -> Float32[Array, "R N"]:
    """One product of integers for each group, then the scales. XLA unpacks inside the product.

    Fewer than `least_rows` are filled up: for them XLA would leave a TPU's matrix unit idle. Compiled for TPUs, 2, 4
    and 8 bits are unpacked inside. Those that cross words (3, 5, 6, 7) are first taken apart into on-chip memory, which
    takes longer than to read bfloat16.
    """
    rows, (groups, outputs) = x.shape[0], scales.shape
    if x.dtype != jnp.int8 and not (isinstance(rows, int) and rows <= FEW_ROWS):
        kernel = dequantized(qweight, scales, zeros, bits).astype(x.dtype)
        return jnp.dot(x, kernel, preferred_element_type=jnp.float32)
    if isinstance(rows, int) and rows < least_rows:
        x = jnp.pad(x, ((0, least_rows - rows), (0, 0)))
    middle = 2 ** (bits - 1)
    integers = _periods(qweight.reshape(groups, -1, outputs), bits).astype(jnp.int32) - middle
    x = x.reshape(x.shape[0], groups, *integers.shape[1:3])
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    spec = "rgup,gupn->grn"
    out = jnp.einsum(spec, x, integers.astype(x.dtype), preferred_element_type=kind).astype(jnp.float32)
    if zeros is not None:
        total = x.astype(jnp.float32).sum((2, 3)).T
        out -= total[:, :, None] * (zeros.astype(jnp.float32) - middle)[:, None]
    return (out * scales[:, None]).sum(0)[:rows]


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
    rows = x.shape[0]
    few = isinstance(rows, int) and rows <= FEW_ROWS_CPU
    slots = 32 if few else 128 if isinstance(rows, int) and rows <= 256 else 1024
    return (_multiplied if few else _in_parts)(x.astype(jnp.float32), qweight, scales, zeros, bits, slots)


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
    x: Float32[Array, "R S"], qweight: Array, scales: Array, zeros: Array | None, bits: int, slots: int
) -> Float32[Array, "R N"]:
    rows, outputs, parts = x.shape[0], scales.shape[1], _Parts.of(x, scales, bits, slots)
    threads = math.gcd(outputs, 16) if outputs >= 1024 else 1  # XLA splits a loop over an outer axis only
    lanes = threads, outputs // threads
    words = qweight.reshape(parts.steps, parts.groups, -1, *lanes)
    x = x.reshape(rows, parts.steps, parts.groups, -1, period(bits))
    scales = scales.reshape(-1, parts.groups, *lanes)
    zeros = None if zeros is None else zeros.reshape(scales.shape)
    length = period(bits) * bits // 32

    def step(i: Array, total: Array) -> Array:
        numbers = lax.dynamic_index_in_dim(x, i, 1, False)
        for g in range(parts.groups):
            middle = jnp.float32(2 ** (bits - 1))
            if zeros is not None:
                middle = _row(zeros, i // parts.repeats, g).astype(jnp.float32)
            group = -numbers[:, g].sum((1, 2))[:, None, None] * middle
            for k, word in itertools.product(range(numbers.shape[2]), range(length)):
                row = _row(words, i, g, k * length + word)
                for number, factor, bit, mask in _pieces(bits, word):
                    taken = (row >> jnp.uint32(bit) if bit else row) & jnp.uint32(mask)
                    scaled = numbers[:, g, k, number, None, None] * jnp.float32(factor)
                    group += scaled * taken.astype(jnp.int32).astype(jnp.float32)
            total += group * _row(scales, i // parts.repeats, g)
        return total

    return lax.fori_loop(0, parts.steps, step, jnp.zeros((rows, *lanes), jnp.float32)).reshape(rows, outputs)


def _row(array: Array, *index: Any) -> Float[Array, "1 threads lanes"]:
    """The last two axes at an index of the others."""
    start = [jnp.asarray(i, jnp.int32) for i in (*index, 0, 0)]
    return lax.dynamic_slice(array, start, (*(1,) * len(index), *array.shape[-2:])).reshape(1, *array.shape[-2:])


def _pieces(bits: int, word: int) -> list[tuple[int, float, int, int]]:
    """(number, factor, shift, mask) of the pieces of a period's integers that lie in one of its words.

    An integer is the sum of `factor * ((word >> shift) & mask)` over its one or two pieces. A piece that does not end
    at bit 31 is not shifted, but divided by a factor, which is exact in float32 and free.
    """
    pieces: list[tuple[int, float, int, int]] = []
    for number in range(period(bits)):
        first, last = number * bits - 32 * word, (number + 1) * bits - 32 * word
        inside = 2 ** min(last, 32) - 2 ** max(first, 0)  # its bits of this word
        if last == 32:
            pieces.append((number, 1.0, first, 2**bits - 1))
        elif last > 0 and first < 32:
            pieces.append((number, 2.0**-first, 0, inside) if last < 32 else (number, 1.0, first, inside >> first))
    return pieces


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


# Layers --------------------------------------------------------------------------------------------------------


class PackedLinear(nnx.Module):
    """`nnx.Linear` whose kernel [K, N], inputs by outputs, is a `QuantizedMatrix` of packed integers.

    Inputs are sorted by their group. Each of the G groups has S / G slots, a multiple of `period(bits)`. Slots that a
    smaller group leaves over hold `zeros`, and read a 0.

    The constructor takes these arrays by name; what is None is left out.

    Attributes:
      qweight: uint32 [S * bits / 32, N], see `pack`. Without act-order it is the `qweight` of GPTQ's files.
      scales: float32 [G, N].
      zeros: uint8 [G, N], the integers that mean 0; None: all are 2**(bits - 1).
      order: int32 [S], the input that each slot reads, K if it is left over; None: slot k reads input k, and S is K.
      bias: [N], or None.
      in_features: K.
      bits: 2 to 8.
      dtype: the compute dtype.
      activation_bits: 8: inputs are rounded to int8 as well (see `from_matrix`); None: they are not.
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],
        bias: nnx.Param[Any] | None,
        *,
        in_features: int,
        bits: int,
        dtype: DTypeLike,
        activation_bits: int | None = None,
    ):
        self.qweight, self.scales = nnx.Param(arrays["qweight"]), nnx.Param(arrays["scales"])
        self.zeros = nnx.data(nnx.Param(arrays["zeros"]) if "zeros" in arrays else None)
        self.order = nnx.data(nnx.Param(arrays["order"]) if "order" in arrays else None)
        self.bias = nnx.data(bias)
        self.in_features, self.bits, self.dtype = in_features, bits, jnp.dtype(dtype)
        self.activation_bits = activation_bits

    @classmethod
    def from_matrix(
        cls,
        matrix: QuantizedMatrix,
        bias: nnx.Param[Any] | None = None,
        dtype: DTypeLike = jnp.float32,
        activation_bits: int | None = None,
    ) -> "PackedLinear":
        """A layer with the matrix as its kernel.

        Args:
          matrix: concrete arrays, on one device.
          bias: the bias of the layer that it replaces.
          dtype: the compute dtype.
          activation_bits: 8: W8A8, as SmoothQuant has it. Each token's inputs are rounded to multiples, -127 to 127, of
            absmax / 127, and the product is one of integers. It needs a symmetric grid of 8 bits with one group.

        Raises:
          ValueError: bits, zeros or groups that cannot be packed; other `activation_bits`.
        """
        _check(matrix, activation_bits)
        inputs = matrix.shape[1]
        order, size = _slots(np.asarray(matrix.groups), matrix.scales.shape[1], matrix.bits)
        symmetric = bool((matrix.zeros == 2 ** (matrix.bits - 1)).all())
        is_identity = len(order) == inputs and (order == np.arange(inputs)).all()
        arrays: dict[str, jax.Array] = {} if is_identity else {"order": jnp.asarray(order, jnp.int32)}
        arrays |= {} if symmetric else {"zeros": matrix.zeros.T.astype(jnp.uint8)}
        arrays["scales"] = matrix.scales.T.astype(jnp.float32)
        arrays["qweight"] = _packed(matrix, arrays.get("order"), size)
        return cls(arrays, bias, in_features=inputs, bits=matrix.bits, dtype=dtype, activation_bits=activation_bits)

    @property
    def out_features(self) -> int:
        """N."""
        return self.scales.get_value().shape[-1]

    @property
    def group_slots(self) -> int:
        """The number of slots of each group: the group size, unless groups are uneven."""
        slots = self.qweight.get_value().shape[0] * 32 // self.bits
        return slots // self.scales.get_value().shape[0]

    def matrix(self) -> QuantizedMatrix:
        """The matrix that `from_matrix` packed, bit by bit."""
        integers = unpack(self.qweight.get_value(), self.bits).T.astype(jnp.uint8)
        groups = jnp.arange(integers.shape[1], dtype=jnp.int32) // self.group_slots
        if self.order is not None:
            order = self.order.get_value()
            slot = jnp.zeros(self.in_features, jnp.int32).at[order].set(jnp.arange(len(order), dtype=jnp.int32))
            integers, groups = integers[:, slot], groups[slot]
        scales = self.scales.get_value().T
        zeros = jnp.full_like(scales, 2 ** (self.bits - 1)) if self.zeros is None else self.zeros.get_value().T
        return QuantizedMatrix(integers, scales, zeros.astype(jnp.float32), groups, self.bits)

    def __call__(self, x: Float[Array, "*B K"]) -> Float[Array, "*B N"]:
        """The product with the dequantized kernel, in the compute dtype."""
        x = x.astype(self.dtype)
        if self.order is not None:
            x = jnp.take(x, self.order.get_value(), axis=-1, mode="fill", fill_value=0)
        rows, step = x.reshape(-1, x.shape[-1]), None
        if self.activation_bits is not None:
            wide = rows.astype(jnp.float32)
            step = jnp.maximum(jnp.abs(wide).max(-1, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
            rows = jnp.round(wide / step).astype(jnp.int8)
        zeros = None if self.zeros is None else self.zeros.get_value()
        out = product(rows, self.qweight.get_value(), self.scales.get_value(), zeros, self.bits)
        out = out if step is None else out * step
        if self.bias is not None:
            out += self.bias.get_value().astype(jnp.float32)[None]
        return out.astype(self.dtype).reshape(*x.shape[:-1], -1)


def check_not_packed(model: nnx.Module, what: str) -> None:
    """Raise ValueError if a model has packed matrices. what: takes floats, for the message."""
    if any(isinstance(node, PackedLinear) for _, node in nnx.iter_graph(model)):
        raise ValueError(f"{what} takes matrices of floats, and this model's are packed: use opt_jax.dequantize(model)")


def _check(matrix: QuantizedMatrix, activation_bits: int | None) -> None:
    if not 2 <= matrix.bits <= 8:
        raise ValueError(f"bits={matrix.bits}: packed matrices have 2 to 8")
    zeros, groups = np.asarray(matrix.zeros), np.asarray(matrix.groups)
    if not ((zeros >= 0) & (zeros <= 255) & (zeros == np.round(zeros))).all():
        raise ValueError("zeros of a packed matrix are integers from 0 to 255")
    if groups.min() < 0 or groups.max() >= zeros.shape[1]:
        raise ValueError(f"groups of a packed matrix are 0 to {zeros.shape[1] - 1}, the last one of its scales")
    if activation_bits is not None:
        if activation_bits != 8:
            raise ValueError(f"activation_bits={activation_bits}: use 8, or None for inputs that are not rounded")
        if matrix.bits != 8 or zeros.shape[1] > 1 or (zeros != 128).any():
            raise ValueError("activation_bits=8 needs a matrix of 8 bits, symmetric, with one group: quantize it so")


def _slots(groups: np.ndarray, count: int, bits: int) -> tuple[np.ndarray, int]:
    """The input of each slot, `len(groups)` for none, and the number of slots of a group."""
    sizes = np.bincount(groups, minlength=count)
    size = -(-int(sizes.max()) // period(bits)) * period(bits)
    by_group = np.argsort(groups, kind="stable")
    order = np.full((count, size), len(groups), np.int32)
    order[np.arange(size)[None] < sizes[:, None]] = by_group
    return order.reshape(-1), size


@partial(jax.jit, static_argnums=2)
def _packed(matrix: QuantizedMatrix, order: Any, size: int) -> UInt32[Array, "W N"]:
    integers = matrix.integers.T
    if order is not None:
        zeros = jnp.repeat(matrix.zeros.T.astype(jnp.uint8), size, axis=0)
        taken = jnp.take(integers, order, axis=0, mode="clip")
        integers = jnp.where((order < len(integers))[:, None], taken, zeros)
    return pack(integers, matrix.bits)
