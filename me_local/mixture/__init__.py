"""The mathematics: from logits to distributions over pieces, weights by routers, mixtures, and what a word is.

Pure functions on NumPy arrays. Knows nothing of llama.cpp, of prompts or of caches.
"""
