"""Is it right, and is it fast? Checks and timings of an ensemble on the machine where it runs.

Looks into engine, members and caches, which nothing else above them does. Changes nothing that a reply depends on.
"""
