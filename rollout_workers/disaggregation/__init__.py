"""Prefill and decode on engines of their own: which pair takes a request, and how keys and values get across."""
