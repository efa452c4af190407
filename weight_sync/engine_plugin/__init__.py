"""The weights' way into inference servers: what runs inside a server's own environment.

It needs torch, msgspec and the light modules of `weight_sync`, nothing else of Millrace. The repository (or a directory
with `weight_sync` in it) is on the server's PYTHONPATH.

| module | runs in |
|---|---|
| `checkpoint` | any process: which tensors a model directory holds, and whether an offer has the same |
| `shadow` | the server's worker: fetches an offered version in a thread, beside the weights that are served |
| `sglang_messages` | both sides: what Millrace asks of its plugin in SGLang, and the answers |
| `sglang_loader` | SGLang's scheduler (``--custom-weight-loader``): stages, and loads between two steps |
| `vllm_extension` | vLLM's worker (``--worker-extension-cls``): loads a fetched version between two steps |
"""
