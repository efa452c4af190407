"""The Megatron-Core backend: tensor, pipeline, data and expert parallelism. Only rank processes that use it import `megatron`."""
