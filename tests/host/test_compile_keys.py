"""A key holds all that is compiled in: configs that differ in anything have other digests, and lists count in what the key says."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from fa4_backend import AttentionProblem, BatchLimits, MaskFeatures, plan_attention
from fa4_backend.compile import describe
from fa4_backend.compile_cache import object_entry
from fa4_backend.kernels.common.prefill_config import TileShape
from fa4_backend.kernels.decode.config import DecodeConfig
from fa4_backend.kernels.families import KernelSet
from fa4_backend.kernels.mla_decode.config import MlaDecodeConfig
from fa4_backend.kernels.mla_decode.sm100.config import MlaSm100Config
from fa4_backend.kernels.schedule.config import ScheduleConfig
from fa4_backend.kernels.sm90 import tuning as sm90_tuning
from fa4_backend.kernels.sm90.config import Sm90Config
from fa4_backend.kernels.sm100 import tuning as sm100_tuning
from fa4_backend.kernels.sm100.config import Sm100Config
from fa4_backend.problem import LATENT

LIMITS = BatchLimits(max_num_seqs=8, max_num_tokens=64, max_seqlen_k=4096)


def kernels_of(arch: str, *, head_dim: int = 128, **facts: Any) -> KernelSet:
    problem = AttentionProblem(8, 2, head_dim, head_dim, "bfloat16", 16, arch, **facts)
    plan = plan_attention(problem, LIMITS)
    assert plan.kernels is not None
    return plan.kernels


def latent_kernels_of(arch: str) -> KernelSet:
    plan = plan_attention(AttentionProblem(16, 1, 576, 512, "bfloat16", 64, arch, kv_source=LATENT), BatchLimits(1, 8, 64, 8))
    assert plan.kernels is not None
    return plan.kernels


def configs() -> dict[str, Any]:
    """A key of each class that is compiled."""
    hopper, blackwell = kernels_of("sm_90a"), kernels_of("sm_100a")
    keys = {"schedule": hopper.schedule, "decode": hopper.decode, "sm90 prefill": hopper.prefill, "sm100 prefill": blackwell.prefill}
    return keys | {f"{arch} latent decode": latent_kernels_of(arch).decode for arch in ("sm_90a", "sm_100a")}


# Another value that the config's own checks allow, where adding one does not do: path of the field -> value.
OTHER_VALUES: dict[str, Any] = {
    "dtype": "float16", "kernel.dtype": "float16", "kv_dtype": "float8_e4m3fn", "kernel.kv_dtype": "float8_e4m3fn",
    "out_dtype": "float8_e4m3fn", "kernel.out_dtype": "float8_e4m3fn", "q_dtype": "float8_e4m3fn", "kernel.q_dtype": "float8_e4m3fn",
    "kernel.head_dim_v": 64, "kernel.tile.tile_m": 192, "kernel.tile.tile_n": 64, "kernel.box_rows": 32,
    "tuning.cta_group": 2, "tuning.p_first_columns": 64, "tuning.softmax_registers": 192, "tuning.correction_registers": 48,
    "tuning.other_registers": 48,
}  # fmt: skip
OTHER_TEXTS = {"sm_90a": "sm_100a", "sm_100a": "sm_103a", "float32": "bfloat16", "paged": "ragged"}


def fields_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf of a config, nested dataclasses walked."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def other_value(path: str, value: Any) -> Any:
    """A value unlike `value`."""
    if path in OTHER_VALUES:
        return OTHER_VALUES[path]
    if isinstance(value, bool):
        return not value
    return OTHER_TEXTS[value] if isinstance(value, str) else value + 1


def changed(config: Any, path: str, value: Any) -> Any:
    """The config with the field at `path` replaced."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


def variants(config: Any) -> dict[str, Any]:
    """The config, and one for each of its fields that differs in that field alone."""
    found = {"as it is": config}
    for path, value in fields_of(config):
        # A causal mask has no right window, so that this field is told from others beside a mask that is not causal.
        base = changed(config, path.replace("has_window_right", "is_causal"), False) if path.endswith("has_window_right") else config
        found[path] = changed(base, path, other_value(path, value))
    return found


@pytest.mark.parametrize("kind", configs())
def test_every_field_is_in_the_digest(kind: str) -> None:
    """Two configs that differ in any field have other descriptions and other folders in the cache, and are unequal as keys in memory."""
    found = variants(configs()[kind])
    assert len(found) > 2
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        assert a != b, f"{one} and {other} are the same key in memory"
        assert describe(a) != describe(b), f"{one} and {other} have the same description"
        assert object_entry(a).folder != object_entry(b).folder, f"{one} and {other} have the same place in the cache"


@pytest.mark.parametrize("kind", configs())
def test_a_key_has_no_state_beside_its_fields(kind: str) -> None:
    """Frozen, compared by all fields, none of them left out of the comparison: what a builder reads is what the digest covers."""
    config = configs()[kind]
    pending = [config]
    while pending:
        part = pending.pop()
        assert part.__dataclass_params__.frozen and part.__dataclass_params__.eq, type(part)
        assert all(f.compare and f.init for f in dataclasses.fields(part)), type(part)
        assert set(vars(part)) == {f.name for f in dataclasses.fields(part)}, type(part)
        pending += [value for f in dataclasses.fields(part) if dataclasses.is_dataclass(value := getattr(part, f.name))]


def test_every_class_of_key_is_walked() -> None:
    assert {type(config) for config in configs().values()} == {
        ScheduleConfig, DecodeConfig, Sm90Config, Sm100Config, MlaDecodeConfig, MlaSm100Config,
    }  # fmt: skip


def test_features_of_a_problem_reach_its_keys() -> None:
    """Every mask feature and mode is another kernel: of the prefill family always, of the decode family where it serves it."""
    plain = kernels_of("sm_100a", mask=MaskFeatures(is_causal=False))
    seen = [plain]
    for name in ("has_window_left", "has_window_right", "has_softcap", "has_sinks", "has_alibi"):
        seen.append(kernels_of("sm_100a", mask=MaskFeatures(is_causal=False, **{name: True})))
    seen += [kernels_of("sm_100a"), kernels_of("sm_100a", mask=MaskFeatures(is_causal=False), has_lse=True)]
    for family in ("prefill", "decode"):
        assert len({object_entry(getattr(kernels, family)).folder for kernels in seen}) == len(seen), family
    invariant = kernels_of("sm_100a", mask=MaskFeatures(is_causal=False), batch_invariant=True)
    assert invariant.decode != plain.decode


def is_another(before: KernelSet, after: KernelSet) -> bool:
    """Whether the prefill kernel of `after` is not compiled or found as that of `before`."""
    a, b = before.prefill, after.prefill
    return a != b and describe(a) != describe(b) and object_entry(a).folder != object_entry(b).folder


def test_an_edit_of_the_blackwell_tables_changes_key_and_list_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """CTA pairs for (128, 128), as docs/sm100.md invites: a stale kernel would leave half of each item's rows unwritten."""
    before = kernels_of("sm_100a")
    monkeypatch.setitem(sm100_tuning.CTA_GROUP, (128, 128), 2)
    after = kernels_of("sm_100a")
    assert is_another(before, after) and before.prefill.name != after.prefill.name
    assert (before.work.tokens_per_item, after.work.tokens_per_item) == (64, 128)
    assert (before.prefill.tokens_per_item, after.prefill.tokens_per_item) == (64, 128)
    assert after.work.prefill_groups == before.work.prefill_groups // 2


@pytest.mark.parametrize(("arch", "table"), [("sm_90a", sm90_tuning.TILES), ("sm_100a", sm100_tuning.TILES)])
@pytest.mark.parametrize(
    "change",
    [{"tile_m": 64}, {"tile_n": 64}, {"kv_stage": 3}, {"ping_pong": None}, {"rescale_threshold": 4.0}],
    ids=lambda change: next(iter(change)),
)
def test_an_edit_of_a_tile_changes_key_and_list_together(
    arch: str, table: dict[tuple[int, int], TileShape], change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, tile = kernels_of(arch), table[128, 128]
    if "ping_pong" in change:
        change = {"ping_pong": not tile.ping_pong}
    monkeypatch.setitem(table, (128, 128), dataclasses.replace(tile, **change))
    after = kernels_of(arch)
    assert is_another(before, after)
    assert after.work.tokens_per_item == after.prefill.tokens_per_item and after.work.prefill_tile_n == after.prefill.kernel.tile.tile_n
    assert (after.work.tokens_per_item != before.work.tokens_per_item) == ("tile_m" in change)
    assert (after.work.prefill_tile_n != before.work.prefill_tile_n) == ("tile_n" in change)


def test_an_edit_of_an_archs_tuned_numbers_changes_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernels_of("sm_100a")
    for field in dataclasses.fields(sm100_tuning.Sm100Tuning):
        if field.name == "cta_group":
            continue  # of the shape, not of the arch: see above
        row = sm100_tuning.ROWS["sm_100a"]
        value = other_value(f"tuning.{field.name}", getattr(row, field.name))
        with monkeypatch.context() as patch:
            patch.setitem(sm100_tuning.ROWS, "sm_100a", dataclasses.replace(row, **{field.name: value}))
            assert is_another(before, kernels_of("sm_100a")), field.name
