"""The converter: `python -m convert SRC DST` turns any OPT checkpoint into an Orbax directory."""
