"""What several callbacks use: the quantized layers, their inputs, points in time, terms of the loss."""
