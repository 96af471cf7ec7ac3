"""Bytes and token ids: vocabularies, the canonical ids of texts, and prompts by chat templates.

Reads vocabularies from llama.cpp. Knows nothing of weights, contexts or sampling.
"""
