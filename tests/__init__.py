"""A package of its own, so that another one called ``tests`` in the environment does not hide it."""
