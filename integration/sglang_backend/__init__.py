"""SGLang: `python -m sglang.launch_server --model-path MODEL --attention-backend fa4_plugin`.

plugin -> resolution (page size, what is refused before a model loads) -> backend -> batch (a step's lengths), page_tables -> layers, steps
(one plan for each kind of layer) -> kv_pool. `draft` is the drafter's side of speculative decoding.
"""
