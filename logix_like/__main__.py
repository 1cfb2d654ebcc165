"""``python -m logix_like`` is the command ``logix-like``."""

from logix_like.cli import app

if __name__ == "__main__":
    app()
