"""Callbacks for trainers of other libraries; each needs the extra of that library."""
