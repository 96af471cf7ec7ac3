"""The one place that runs llama.cpp: weights, contexts and their caches, and batches of tokens that go through them.

A member's cache is brought to hold exactly the ids that it is given. Knows nothing of how pieces are drawn.
"""
