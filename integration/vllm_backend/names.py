"""Our backends as vLLM names and finds them."""

NAME = "FA4"
BACKEND_PATH = "fa4_integration.vllm_backend.backend.FA4Backend"
MLA_NAME = "FA4_MLA"  # the name that vLLM prints for layers of multi-head latent attention; either name selects by the kind of a layer
MLA_BACKEND_PATH = "fa4_integration.vllm_backend.mla_backend.FA4MLABackend"
PATHS = {NAME: BACKEND_PATH, MLA_NAME: MLA_BACKEND_PATH}
PREFILL_PATH = "fa4_integration.vllm_backend.mla_prefill.FA4PrefillBackend"  # `NAME` in vLLM's enum of MLA prefill backends
