"""Presets of settings, as YAML files: ``default``, ``language_model`` and ``vision``."""
