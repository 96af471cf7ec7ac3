"""`me-local serve`: an ensemble behind the OpenAI protocol. Needs the extra `me-local[server]`."""
