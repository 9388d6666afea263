"""vLLM: `vllm serve MODEL --attention-backend FA4`.

plugin -> selection (which backend a layer gets) -> backend (what is supported) -> metadata_builder (once a step) -> impl (once a layer)
"""
