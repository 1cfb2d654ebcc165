"""From module calls to projected per-sample gradients."""
