"""The SGLang engine: a server of its own, driven over HTTP."""
