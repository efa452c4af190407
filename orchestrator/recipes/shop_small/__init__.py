"""A small Qwen3 with its own vocabulary, warmed up on the shop's demonstrations. See :mod:`.build`."""
