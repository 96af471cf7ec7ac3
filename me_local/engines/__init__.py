"""Members that run elsewhere: behind a llama-server, or a vLLM with as many GPUs and machines as it has.

An engine is sent ids and gives the largest logits after them; its own prefix cache is the synchronisation. Loads
members, of whichever kind. Knows nothing of how pieces are drawn.
"""
