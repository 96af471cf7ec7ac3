"""What the operating system gives: processors and memory, files that are replaced whole, threads, locks and forks.

Knows nothing of models, of text or of replies.
"""
