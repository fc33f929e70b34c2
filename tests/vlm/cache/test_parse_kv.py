"""KV caches as text."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from foveate.vlm.cache.akvq import AKVQConfig
from foveate.vlm.cache.dense import Dense, DenseConfig
from foveate.vlm.cache.h2o import H2O
from foveate.vlm.cache.lookm import LookM
from foveate.vlm.cache.packed import Packed, PackedConfig
from foveate.vlm.cache.paged import Paged, PagedConfig
from foveate.vlm.cache.parse import PARTS, STORES, KVSpec, kv_text, parse_kv
from foveate.vlm.cache.quest import Quest
from foveate.vlm.cache.snapkv import SnapKV
from foveate.vlm.cache.streaming import StreamingLLM
from foveate.vlm.cache.vidkv import VidKVConfig
from foveate.vlm.cache.zipvl import ZipVLConfig


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("dense", KVSpec()),
        ("int4", KVSpec(PackedConfig(keys=4, values=4))),
        ("int8", KVSpec(PackedConfig(keys=8, values=8))),
        (" INT2 : group = 32 , residual=64 ", KVSpec(PackedConfig(keys=2, values=2, group=32, residual=64))),
        ("int4:values=1.58,keys_per=token,hadamard=true",
         KVSpec(PackedConfig(keys=4, values=1.58, keys_per="token", hadamard=True))),
        ("streaming:sink=4,window=1024", KVSpec(policy=StreamingLLM(sink=4, window=1024))),
        ("snapkv:keep=0.25,pooling=max+int4", KVSpec(PackedConfig(), SnapKV(keep=0.25, pooling="max"))),
        ("int4+h2o:keep=0.5", KVSpec(PackedConfig(), H2O(keep=0.5))),
        ("look-m:keep=0.3,merge=averaged", KVSpec(policy=LookM(keep=0.3, merge="averaged"))),
        ("quest", KVSpec(PagedConfig(), selector=Quest())),
        ("quest:keep=0.1+paged:page=32", KVSpec(PagedConfig(page=32), selector=Quest(keep=0.1))),
        ("snapkv+quest:tokens=256+int4", KVSpec(PackedConfig(), SnapKV(), Quest(tokens=256))),
        ("zipvl:tau=0.9,low=1", KVSpec(ZipVLConfig(tau=0.9, low=1))),
        ("akvq-vl:pivots=0", KVSpec(AKVQConfig(pivots=0.0))),
        ("vidkv:salient=0", KVSpec(VidKVConfig(salient=0.0))),
    ],
)  # fmt: skip
def test_a_text_says_what_keeps_evicts_and_selects(text: str, spec: KVSpec) -> None:
    assert parse_kv(text) == spec
    assert parse_kv(kv_text(spec)) == spec


def test_duo_is_read_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "Heads.json"
    path.write_text(json.dumps({"gates": [[0.9, 0.1]], "threshold": 0.5, "sink": 8, "window": 32}))
    spec = parse_kv(f"duo:heads={path},window=16+int4")
    assert spec.duo is not None and spec.duo.heads == str(path) and spec.duo.window == 16
    assert spec.store == PackedConfig()
    assert parse_kv(kv_text(spec)) == spec


@pytest.mark.parametrize("name", [name for named in PARTS.values() for name in named if name != "duo"])
def test_every_name_is_made_again_from_its_text(name: str) -> None:
    spec = parse_kv(name)
    text = kv_text(spec)
    assert any(part.partition(":")[0] == name for part in text.split("+"))
    assert parse_kv(text) == spec
    with pytest.raises(FrozenInstanceError):
        setattr(spec, "store", None)  # noqa: B010


def test_the_text_takes_the_name_with_the_closest_defaults() -> None:
    for name in ("int8", "int4", "int2"):
        assert kv_text(KVSpec(replace(STORES[name], group=16))).startswith(f"{name}:")


@pytest.mark.parametrize(
    ("text", "kind", "sinks"),
    [("dense", Dense, 0), ("paged", Paged, 0), ("int4:sink=2", Packed, 6), ("vidkv", Packed, 6)],
)
def test_each_layer_has_a_store_of_its_own(text: str, kind: type, sinks: int) -> None:
    spec = parse_kv(text)
    one, other = spec.store.make(6), spec.store.make(sinks=6)
    assert type(one) is type(other) is kind and one is not other
    assert getattr(one, "sink", 0) == sinks
    assert parse_kv("int4:sink=8").store.make(6).sink == 8  # type: ignore[attr-defined]


def test_it_knows_who_must_be_told_of_visual_tokens() -> None:
    assert parse_kv("look-m").needs_visual and parse_kv("akvq-vl").needs_visual
    assert not parse_kv("snapkv+zipvl").needs_visual


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "kv is ''; accepted: dense, paged, int8, int4, int2, zipvl, akvq-vl, vidkv, streaming, snapkv"),
        ("int4+", "kv is ''; accepted: dense"),
        ("int5", "kv is 'int5'; accepted: dense, "),
        ("int4:bits=4", "int4 has no field 'bits'; accepted: keys, values, group, residual, sink, keys_per"),
        ("int4:group", "int4: 'group' is not FIELD=VALUE; accepted fields: keys, values"),
        ("int4:group=8,group=8", "int4: group is given twice"),
        ("int4:group=half", "int4: group is 'half'; accepted: a whole number"),
        ("int4:group=0", "int4: group is 0; accepted: at least 1"),
        ("int4:keys=3", "int4: keys is 3; accepted: 8, 4, 2, 1.58, 1 bits"),
        ("int4:keys=few", "int4: keys is 'few'; accepted: a whole number, or a number"),
        ("int4:keys_per=head", "int4: keys_per is 'head'; accepted: channel, token"),
        ("int4:hadamard=yes", "int4: hadamard is 'yes'; accepted: true or false"),
        ("snapkv:pooling=min", "snapkv: pooling is 'min'; accepted: mean, max"),
        ("int4+int8", "kv is 'int4+int8', with two of dense, paged, int8, int4, int2"),
        ("h2o+snapkv", "kv is 'h2o+snapkv', with two of streaming, snapkv, h2o, look-m; accepted: one of them"),
        ("quest+dense", "quest reads pages, which dense has not; accepted: paged, or packed keys per channel"),
        ("quest+int4:hadamard=true", "quest reads pages, which int4:keys=4,"),
        ("quest+vidkv", "quest reads pages, which vidkv:"),
        ("duo", "duo: heads is missing; accepted: a text"),
        ("duo:heads=", "duo: heads is ''; accepted: a text"),
        ("duo:heads=nowhere.json", "duo: heads is 'nowhere.json'; accepted: a file that foveate duo has written"),
    ],
)
def test_what_is_no_cache_says_what_is_accepted(text: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_kv(text)
    assert said in str(error.value)


@pytest.mark.parametrize(("field", "part"), [("policy", SnapKV()), ("selector", Quest())])
def test_duo_stands_alone_with_a_store(field: str, part: Any, tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"gates": [[0.9, 0.1]], "threshold": 0.5, "sink": 8, "window": 32}))
    duo = parse_kv(f"duo:heads={path}").duo
    with pytest.raises(ValueError, match=f"{field} is .*, next to duo; accepted: duo and a store"):
        KVSpec(PagedConfig(), duo=duo, **{field: part})
    assert DenseConfig() == parse_kv(f"duo:heads={path}").store
