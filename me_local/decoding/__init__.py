"""The loop: one reply or many, piece by piece; and the likelihood of texts that are there already.

Draws members, has their caches brought up to date, samples, and ends replies. Knows nothing of files, commands or HTTP.
"""
