"""Which tensors the script trains, and which it should train and does not."""
