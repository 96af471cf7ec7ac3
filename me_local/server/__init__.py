"""`me-local serve`: an ensemble behind the OpenAI protocol, and a page to chat with it. Needs `me-local[server]`.

One thread uses the ensemble; requests wait for it in a queue. Knows nothing of members, caches or tokens.
"""
