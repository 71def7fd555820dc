"""Models on disk: arrays in chunks with checksums, directories that appear complete or not at all, names of the hub."""
