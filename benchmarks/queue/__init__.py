"""`millrace bench queue`: how fast episodes go into the queue and groups come out, beside other queues."""
