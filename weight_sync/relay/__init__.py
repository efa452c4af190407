"""Staging of versions on every node: engines pull from the stager beside them, and stagers from the learner, once.

| module | what it is |
|---|---|
| `frames` | requests and answers between an engine, a stager and a sender, over TCP |
| `keeping` | which versions a stager keeps: a plain class |
| `serving` | a thread that answers requests for bytes |
| `stager` | holds versions in shared memory, pulls what it lacks, serves what it has; the class of the actor |
"""
