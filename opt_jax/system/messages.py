"""Quotes values and texts from outside in messages of one line, whatever they hold. No jax."""


def one_line(text: object, limit: int = 1000) -> str:
    """`text` as one printable line of at most `limit` characters."""
    line = " ".join(str(text).split())
    if not line.isprintable():
        line = line.encode("unicode_escape").decode()
    return line if len(line) <= limit else f"{line[: limit * 2 // 3]} ... {line[-(limit // 4) :]}"


def shown(value: object, limit: int = 100) -> str:
    """`repr(value)` as one printable line of at most `limit` characters. Of an array, its shape and dtype."""
    shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", None)
    try:
        return one_line(f"an array of shape {shape}, {dtype}" if shape else repr(value), limit)
    except ValueError:  # an integer of thousands of digits
        return f"a very large {type(value).__name__}"
