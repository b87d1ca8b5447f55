"""The mechanism behind the data modules: order and random numbers, image files, decoding, cache, splits."""
