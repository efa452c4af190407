"""How the bytes of a version move: one interface (:mod:`.protocol`), two transports so far."""
