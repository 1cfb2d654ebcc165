"""Linear algebra as pure functions of tensors; letters here are those of the papers."""
