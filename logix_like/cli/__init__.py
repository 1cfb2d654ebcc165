"""The command ``logix-like``: a demo, a look into a store, and questions to one.

Each module adds its group of commands to :data:`app`.
"""

from logix_like.cli import ask, keep, look, plan, show
from logix_like.cli.app import app

__all__ = ["app", "ask", "keep", "look", "plan", "show"]
