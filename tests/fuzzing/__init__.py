"""Random networks as data, and what must be true of the package on each of them."""
