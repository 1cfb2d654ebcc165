"""A run: what a training loop talks to, and the parts that it is made of."""
