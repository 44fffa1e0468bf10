"""4-bit formats and the tensors that hold them."""
