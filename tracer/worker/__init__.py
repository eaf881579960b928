"""What runs in vLLM's processes, and the only code that knows vLLM.

`plugin.register` is called by vLLM in every process. In the process that calls the engine it hooks the output
processor (`frontend`: generation spans). In a worker it wraps the model runner (`runner_v1`, `runner_v2`) and each
attention layer's `impl.forward` (`hooks`); `batch` maps rows to requests, `logits`, `attention` and `keys` turn
tensors into numbers, `step` puts one engine step together. Private vLLM names live in `compat`.
"""
