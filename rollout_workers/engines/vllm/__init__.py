"""The vLLM engine: a server of its own, driven over HTTP."""
