"""Scripts around the package; not installed with it."""
