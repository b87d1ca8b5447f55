"""oneDNN's convolutions of bytes, as torch ships them for x86 processors."""
