"""The models that are on this machine already: where programs keep them, and what the headers of their files say.

Looks at the disk alone, never at the network. Knows nothing of how models are loaded or run.
"""
