"""What is read and kept of tensors: form, values, digest, writes; and the random streams."""
