"""Asking a store which samples matter: queries, the engine that answers, and its results."""
