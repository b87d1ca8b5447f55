"""What `QuantizeModel` does beside the conversion: when a network is built, optimizer groups, checkpoints."""
