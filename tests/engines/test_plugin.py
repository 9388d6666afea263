"""How vLLM comes to know FA4: discovery, registration, pickling into spawned processes, and the CPU platform that ignores selections."""

from __future__ import annotations

import copy
import enum
import os
import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pytest

from fa4_integration.vllm_backend import names, plugin
from tests.engines.tiny_models import write_llama


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, text=True, capture_output=True, timeout=900)


def backends() -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum


def test_vllm_discovers_the_plugin_by_its_entry_point() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="fa4")
    assert found.load() is plugin.register


def test_entry_point_module_is_light() -> None:
    """vLLM only logs a plugin's failing import; what is not imported cannot fail."""
    done = run_python(
        "import sys, time; begin = time.process_time(); import fa4_integration.vllm_backend.plugin; seconds = time.process_time() - begin\n"
        "heavy = {'torch', 'vllm', 'cutlass', 'numpy'} & set(sys.modules); assert not heavy, heavy; assert seconds < 1, seconds"
    )
    assert done.returncode == 0, done.stderr


def test_register_twice_gives_one_member() -> None:
    plugin.register()
    member = backends()["FA4"]
    plugin.register()
    assert backends()["FA4"] is member
    assert list(backends().__members__).count("FA4") == 1
    assert member.get_class().get_name() == "FA4"


def test_member_survives_copies_and_pickles() -> None:
    plugin.register()
    member = backends()["FA4"]
    for copied in (
        copy.copy(member),
        copy.deepcopy(member),
        pickle.loads(pickle.dumps(member)),
        cloudpickle.loads(cloudpickle.dumps(member)),
    ):
        assert copied is member


def test_member_unpickles_in_a_process_that_loaded_no_plugin() -> None:
    """What spawn does: vLLM unpickles its configuration before it loads plugins. Without our reduction this is a ValueError."""
    plugin.register()
    data = pickle.dumps({"backend": backends()["FA4"]})
    done = run_python(f"import pickle; print(pickle.loads({data!r})['backend'].name)", VLLM_PLUGINS="")
    assert done.stdout.strip() == "FA4", done.stderr


def test_enum_without_register_is_extended() -> None:
    """vLLM 0.26 has no `register`."""

    class OldEnum(enum.Enum):
        FLASH_ATTN = "somewhere.FlashAttention"

    member = plugin.add_member(OldEnum)
    assert plugin.add_member(OldEnum) is member
    assert OldEnum["FA4"] is member and OldEnum(names.BACKEND_PATH) is member and OldEnum.FA4 is member  # type: ignore[attr-defined]
    assert list(OldEnum) == [OldEnum.FLASH_ATTN, member] and isinstance(member, OldEnum)


def test_a_backend_of_vllm_with_our_name_is_refused() -> None:
    class TakenEnum(enum.Enum):
        FA4 = "vllm.its_own"

    with pytest.raises(RuntimeError, match=r"expected no such backend in vLLM, got vllm\.its_own"):
        plugin.add_member(TakenEnum)


def test_without_the_plugin_vllm_says_so(tmp_path: Path) -> None:
    model = write_llama(tmp_path)
    code = f"from vllm.engine.arg_utils import EngineArgs; EngineArgs(model={str(model)!r}, attention_backend='FA4').create_engine_config()"
    done = run_python(code, VLLM_PLUGINS="another")
    assert done.returncode != 0
    assert "Unknown attention backend: 'FA4'" in done.stderr, done.stderr[-2000:]


def selector(**facts: Any) -> Any:
    import torch
    from vllm.v1.attention.selector import AttentionSelectorConfig

    return AttentionSelectorConfig(**{"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, **facts})


@pytest.mark.parametrize("selected", ["CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", None])
def test_cpu_platform_treats_other_selections_as_before(selected: str | None) -> None:
    from vllm.platforms import current_platform

    plugin.register()
    member = None if selected is None else backends()[selected]
    assert current_platform.get_attn_backend_cls(member, selector()) == backends().CPU_ATTN.get_path()


def test_cpu_platform_honours_fa4() -> None:
    from vllm.platforms import current_platform

    plugin.register()
    plugin.register()
    assert current_platform.get_attn_backend_cls(backends()["FA4"], selector()) == names.BACKEND_PATH


MLA = {"use_mla": True, "head_size": 576}


@pytest.mark.parametrize("name", ["FA4", "FA4_MLA"])
def test_the_kind_of_a_layer_chooses_the_backend(name: str) -> None:
    """A model may have layers of both kinds, as one with MLA and a dense drafter has; either name serves both."""
    from vllm.platforms import current_platform

    plugin.register()
    member = backends()[name]
    assert current_platform.get_attn_backend_cls(member, selector()) == names.BACKEND_PATH
    assert current_platform.get_attn_backend_cls(member, selector(**MLA)) == names.MLA_BACKEND_PATH
    assert pickle.loads(pickle.dumps(member)) is member and backends()["FA4_MLA"].get_class().get_name() == "FA4_MLA"


@pytest.mark.parametrize("selected", ["CPU_MLA", "FLASH_ATTN_MLA", None])
def test_layers_with_mla_under_other_selections_are_as_before(selected: str | None) -> None:
    from vllm.platforms import current_platform

    plugin.register()
    member = None if selected is None else backends()[selected]
    assert current_platform.get_attn_backend_cls(member, selector(**MLA)) in {
        backends()[name].get_path() for name in ("CPU_MLA", "AMX_MLA")
    }


@pytest.fixture
def cuda_platform(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own CUDA platform, of which only the device is made up, as `register` leaves it on a GPU."""
    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("operators that a build for CPUs has not"))
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    from fa4_integration.vllm_backend.selection import wrap_platform

    plugin.register()
    monkeypatch.setattr("fa4_integration.vllm_backend.answers.serving_arch", lambda capability=None: "cpu")

    class Hopper(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(9, 0)

    wrap_platform(Hopper, {name: backends()[name] for name in names.PATHS})
    return Hopper


def test_cuda_platform_chooses_by_kind_too(cuda_platform: Any) -> None:
    for name in names.PATHS:
        assert cuda_platform.get_attn_backend_cls(backends()[name], selector()) == names.BACKEND_PATH
        assert cuda_platform.get_attn_backend_cls(backends()[name], selector(**MLA)) == names.MLA_BACKEND_PATH


def test_cuda_platform_refuses_what_the_backend_of_the_kind_refuses(cuda_platform: Any) -> None:
    with pytest.raises(ValueError, match=r"Selected backend AttentionBackendEnum.FA4_MLA is not valid .*belongs to vLLM's"):
        cuda_platform.get_attn_backend_cls(backends()["FA4"], selector(**MLA, use_sparse=True))
    with pytest.raises(ValueError, match="FLASH_ATTN is not valid"):  # as without us
        cuda_platform.get_attn_backend_cls(backends()["FLASH_ATTN"], selector(**MLA))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"head_size": 100}, "expected a multiple of 8, got 100"),
        ({"block_size": 24}, "page_size: expected a multiple of 16, got 24"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype: expected one of auto, float16, bfloat16, fp8, fp8_e4m3, got fp8_e5m2"),
        ({"kv_cache_dtype": "float16"}, "kv_dtype on cpu: expected bfloat16 or float8_e4m3fn with q in bfloat16, got float16"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported: FA4 serves decoder layers"),
        ({"attn_type": "encoder_decoder"}, "cross attention want another --attention-backend"),
        ({"use_non_causal": True}, "non-causal attention not supported: FA4 serves causal"),
        ({"use_mm_prefix": True}, "--language-model-only serves its text on FA4"),
        ({"use_dcp": True}, "DCP not supported: FA4 wants all KV of a sequence's heads on one GPU: --decode-context-parallel-size 1"),
        ({"use_pcp": True}, "PCP not supported: FA4 wants all tokens of a prompt on one GPU"),
        ({"use_sparse": True}, "sparse not supported"),
    ],
)
def test_cpu_platform_refuses_with_a_reason(facts: dict[str, Any], reason: str) -> None:
    from vllm.platforms import current_platform

    plugin.register()
    with pytest.raises(ValueError, match="Selected backend FA4 is not valid for this configuration") as error:
        current_platform.get_attn_backend_cls(backends()["FA4"], selector(**facts))
    assert reason in str(error.value)
