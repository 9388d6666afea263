"""vLLM: `vllm serve MODEL --attention-backend FA4`.

plugin -> cpu_platform (machines without a GPU) -> backend (what is supported) -> metadata_builder (once a step) -> impl (once a layer)
"""
