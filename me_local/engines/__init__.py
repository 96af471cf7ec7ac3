"""Members that are evaluated by something that is there already, and that me-local only drives.

Each module knows one such thing, and makes of it what `model` asks of a member. Knows nothing of how pieces are drawn.
"""
