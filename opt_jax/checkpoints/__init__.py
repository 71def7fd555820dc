"""Models on disk: arrays in chunks with checksums, directories that appear all at once, and names of the hub."""
