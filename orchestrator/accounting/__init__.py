"""Why an accelerator was idle: attribution, the words for it, and the trace of a run."""
