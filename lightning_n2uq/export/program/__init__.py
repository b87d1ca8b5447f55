"""Export by torch's own exporter: quantized layers become integers, everything around them stays as it is."""
