"""Members that something else runs: a program's own `Llama` objects, a llama-server, or a vLLM with all its machines.

An engine elsewhere is sent ids and gives the largest logits after them; its own prefix cache is the synchronisation.
Loads members, of whichever kind. Knows nothing of how pieces are drawn.
"""
