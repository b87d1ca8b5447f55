"""What `OscillationControl` keeps of each layer's weights."""
