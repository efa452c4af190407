"""How episodes and groups travel to and from the queue's process: a stream socket of its own, Unix or TCP."""
