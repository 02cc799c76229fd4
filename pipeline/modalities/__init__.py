"""How a row becomes tensors, one file each."""
