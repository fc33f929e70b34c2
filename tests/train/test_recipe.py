import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from foveate.train.recipe import Recipe, RecipeError, load_recipe, shipped_recipes


def test_quickstart_is_shipped() -> None:
    assert "quickstart" in shipped_recipes()


def test_numbers_of_a_file_arrive(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    assert [stage.name for stage in recipe.stages] == ["warmup", "align", "video", "last"]
    assert recipe.stages[1].learning_rates == {"projector": 2e-3, "llm": 1e-3}
    assert recipe.stages[2].rope_theta == 5e4
    assert recipe.stages[1].data[1].turns == (1, 4)
    assert (recipe.seed, recipe.stages[1].batch.rows, recipe.stages[1].batch.micro_batches) == (0, 2, 2)


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("stages.align.steps=17", lambda r: r.stages[1].steps, 17),
        ("stages.1.steps=17", lambda r: r.stages[1].steps, 17),
        ("stages.video.learning_rates.llm=1e-5", lambda r: r.stages[2].learning_rates["llm"], 1e-5),
        ("stages.align.data.1.turns=[2, 3]", lambda r: r.stages[1].data[1].turns, (2, 3)),
        ("stages.align.data.0.weight=2", lambda r: r.stages[1].data[0].weight, 2.0),
        ("model.processor.num_frames=4", lambda r: r.model.processor.get("num_frames"), 4),
        ("model.text.hidden_act=gelu", lambda r: r.model.text.get("hidden_act"), "gelu"),
        ("threads=null", lambda r: r.threads, None),
        ("name=a=b", lambda r: r.name, "a=b"),
        ("checkpoint={every_steps: 7}", lambda r: r.checkpoint.every_steps, 7),
        ("stages.align.max_grad_norm=null", lambda r: r.stages[1].max_grad_norm, None),
        ("stages.align.weight_decays={llm: 0.5}", lambda r: r.stages[1].weight_decays, {"llm": 0.5}),
        ("stages.last={name: end, steps: 1, learning_rates: {llm: 1}, data: [{kind: captions}]}",
         lambda r: r.stages[3].name, "end"),
    ],
)  # fmt: skip
def test_override_changes_one_field(
    tiny_recipe: Callable[..., Recipe], override: str, get: Callable, value: object
) -> None:
    assert get(tiny_recipe()) != value
    assert get(tiny_recipe(override)) == value


def test_data_may_be_short_names(tiny_recipe: Callable[..., Recipe]) -> None:
    data = "stages.align.data=[coyo, mmc4 * 2.5, {source: coyo}]"
    recipe = tiny_recipe("sources={coyo: {path: here}, mmc4: {}}", data)
    assert [(data.source, data.weight) for data in recipe.stages[1].data] == [("coyo", 1), ("mmc4", 2.5), ("coyo", 1)]


def test_later_override_wins_and_makes_missing_mappings(tmp_path: Path, tiny_recipe_path: Path) -> None:
    content = yaml.safe_load(tiny_recipe_path.read_text())
    del content["tracking"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(tmp_path / "other.yaml", ["tracking.every_steps=3", "tracking.every_steps=4"])
    assert recipe.tracking.every_steps == 4


def test_override_of_an_aliased_mapping_changes_one_place(tmp_path: Path, tiny_recipe_path: Path) -> None:
    text = tiny_recipe_path.read_text()
    batch = "{rows: 2, tokens: 200, window: 8}"
    assert text.count(batch) == 1
    text = text.replace(batch, "&small " + batch).replace("{rows: 1, tokens: 200, window: 8}", "*small")
    (tmp_path / "alias.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "alias.yaml", ["stages.video.batch.rows=5"])
    assert (recipe.stages[2].batch.rows, recipe.stages[3].batch.rows) == (5, 2)


QLORA = "stages.last={name: last, steps: 1, learning_rates: {lora: 1}, data: [{kind: captions}], lora: {quantize: yes}}"
WRONG = [
    # a value that can't be
    ("stages.align.steps=0", "stages.1.steps is 0"),
    ("stages.align.steps=many", "stages.1.steps is 'many'"),
    ("stages.align.steps=2.5", "stages.1.steps is 2.5"),
    ("seed=-1", "seed is -1"),
    ("threads=0", "threads is 0"),
    ("precision=fp16", "precision is 'fp16'.*bf16"),
    ("stages.align.learning_rates.llm=-1", "stages.1.learning_rates.llm is -1"),
    ("stages.align.learning_rates.llm=.inf", "stages.1.learning_rates.llm is inf"),
    ("stages.align.learning_rates.head=1", "stages.1.learning_rates.head.*tower.*projector.*llm"),
    ("stages.align.learning_rates={}", "stages.1: learning_rates is empty"),
    ("stages.align.warmup_steps=4", "stages.1: warmup_steps is 4 of 4 steps"),
    ("stages.align.warmup_steps=-1", "stages.1.warmup_steps is -1"),
    ("stages.align.final_fraction=1.5", "stages.1.final_fraction is 1.5"),
    ("stages.align.weight_decay=-1", "stages.1.weight_decay is -1"),
    ("stages.align.betas=[0.9, 1.0]", "stages.1.betas.1 is 1.0"),
    ("stages.align.max_grad_norm=0", "stages.1.max_grad_norm is 0"),
    ("stages.align.name=Align it", "stages.1.name is 'Align it'"),
    ("stages.align.name=video", "stages are named .*'video', 'video'.*differ"),
    ("stages.align.data=[]", r"stages.1.data is \[\]"),
    ("stages.align.data.0.kind=poems", "stages.1.data.0.glyphs.kind is 'poems'.*captions"),
    ("stages.align.data.0.split=all", "stages.1.data.0.glyphs.split is 'all'.*train"),
    ("stages.align.data.0.weight=0", "stages.1.data.0.glyphs.weight is 0"),
    ("stages.align.data.0.objects=[5, 4]", r"stages.1.data.0.glyphs: objects is \(5, 4\)"),
    ("stages.align.data.0.objects=[1, 17]", r"stages.1.data.0.glyphs: objects is \(1, 17\).*16"),
    ("stages.align.data.0.turns=[0, 1]", r"stages.1.data.0.glyphs: turns is \(0, 1\)"),
    ("stages.align.data.0.frames=[9, 8]", r"stages.1.data.0.glyphs: frames is \(9, 8\)"),
    ("stages.align.data.0.images=[1]", "stages.1.data.0.glyphs.images"),
    ("stages.align.batch.rows=0", "stages.1.batch.rows is 0"),
    ("stages.align.batch.micro_batches=0", "stages.1.batch.micro_batches is 0"),
    ("stages=[]", r"stages is \[\]"),
    ("tracking.wandb=maybe", "tracking.wandb is 'maybe'.*offline"),
    ("checkpoint.keep=0", "checkpoint.keep is 0"),
    ("model.projector=magic", "model.projector is 'magic'.*accepted: linear, mlp2x, downsample-RxR"),
    # fields that exclude each other or would have no effect
    ("model.path=somewhere", "model: path excludes vision and text"),
    ("model.text=null", "model: accepted: path alone, or vision and text"),
    ("model.text=some/llm", "model: vision and text must both be names, or both be configurations"),
    ("stages.warmup.learning_rates={llm: 1}", "stages.0: .*tower"),
    ("stages.warmup.data.0.kind=captions", "stages.0: .*regions"),
    ("stages.align.epochs=2", "stages.1: steps is 4 and epochs 2"),
    ("stages.align.steps=null", "stages.1: steps is None and epochs None"),
    ("stages.align.warmup_fraction=0.1", "warmup_steps excludes warmup_fraction"),
    ("stages.last.learning_rates.llm_norms=1", r"names llm and \['llm_norms'\]"),
    ("stages.last.learning_rates={lora: 1}", "learning_rates.lora and lora go together"),
    ("stages.last.lora={rank: 4}", "learning_rates.lora and lora go together"),
    ("stages.last.weight_decays={tower: 1}", r"weight_decays names \['tower'\], which have no learning rate"),
    ("stages.last.momentum=0.9", "momentum has no effect on adamw"),
    ("stages.align.data=[coyo]", "stages.align.data names source 'coyo'; accepted: none yet"),
    ("stages.align.data=[coyo*many]", r"'coyo\*many'; accepted: a source's name, or name\*times"),
    ("stages.align.data.0={source: coyo, wight: 2}", "stages.1.data.0.source.wight is 2: Extra"),
    ("sources={coyo: {pth: here}}", "sources.coyo.pth is 'here': Extra"),
    ("sources={glyphs: {path: here}}", "sources.glyphs: the name is that of the embedded data"),
    ("checkpoint.keep_best=true", "checkpoint.keep_best has no effect without validation"),
    ("loader.max_bad_fraction=2", "loader.max_bad_fraction is 2"),
    ("engine=zero2;" + QLORA, "engine is 'zero2'; with stages.last.lora.quantize accepted: torch"),
    ("fp8=true;" + QLORA, "fp8 and stages.last.lora.quantize exclude each other"),
    ("validation={fraction: 1.0}", "validation.fraction is 1.0"),
    ("stages.warmup.batch.tokens=99", "stages.0: batch.tokens has no effect"),
    ("stages.align.data.0.kind=regions", "stages.1: .*regions.*region_text"),
    # keys that there are not
    ("stages.align.lr=1", "stages.1.lr is 1: Extra inputs are not permitted"),
    ("stages.align.batch.token=1", "stages.1.batch.token is 1: Extra"),
    ("sedd=1", "sedd is 1: Extra"),
    ("stages.aline.steps=1", "no entry 'aline'; accepted: warmup, align, video, last"),
    ("stages.4.steps=1", "no entry '4'"),
    ("threads.value=1", "threads is a value, not a mapping"),
    ("steps", "override 'steps'; accepted: key=value"),
    ("=1", "override '=1'; accepted: key=value"),
    ("seed=[1", "override 'seed=\\[1': the value is not YAML"),
]


@pytest.mark.parametrize(("override", "message"), WRONG, ids=[override for override, _ in WRONG])
def test_wrong_field_is_named(tiny_recipe: Callable[..., Recipe], override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        tiny_recipe(*override.split(";"))
    assert "\n" not in str(caught.value)


def test_all_wrong_fields_are_named_at_once(tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"tiny.yaml: seed is -1.*; checkpoint.keep is 0"):
        tiny_recipe("seed=-1", "checkpoint.keep=0")


@pytest.mark.parametrize("field", ["name", "model", "stages"])
def test_missing_field_is_named(tmp_path: Path, tiny_recipe_path: Path, field: str) -> None:
    content = yaml.safe_load(tiny_recipe_path.read_text())
    del content[field]
    (tmp_path / "less.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=f"{field}: Field required"):
        load_recipe(tmp_path / "less.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML"),
        ("- 1", "holds a list"),
        ("", "holds a NoneType"),
    ],
)
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError, match=f"bad.yaml: {message}"):
        load_recipe(tmp_path / "bad.yaml")


@pytest.mark.parametrize("name", ["quikstart", "../quickstart", "missing.yaml", ""])
def test_unknown_recipe_names_those_there_are(name: str) -> None:
    with pytest.raises(RecipeError, match=r"accepted: .*quickstart"):
        load_recipe(name)


def test_recipe_cannot_be_changed_afterwards(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
    assert copy.deepcopy(recipe) == recipe
