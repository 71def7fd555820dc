"""Everything that knows a foreign checkpoint format; `python -m convert SRC DST` turns one into an Orbax directory."""
