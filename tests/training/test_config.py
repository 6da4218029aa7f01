import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from clipret.errors import ClipretError
from clipret_training.config import FitConfig, parse_value
from clipret_training.models.load import anchored
from clipret_training.recipe import read_recipe, recipe_names
from clipret_training.settings import HELP


def make(**given: Any) -> FitConfig:
    return FitConfig.for_model("list.csv", "clipret-small", **given)


def test_defaults_of_the_family_below_the_recipe_below_what_is_given(tmp_path: Path) -> None:
    assert (make().epochs, make().captions, make().weight_decay) == (30, 5, 0.1)
    assert FitConfig.for_model("list.csv", "ViT-B-32").lr == 5e-4
    assert FitConfig.for_model("list.csv", "ViT-B-32:openai").lr == 1e-5
    (tmp_path / "mine.toml").write_text('model = "clipret-small"\nepochs = 7\nlr = 1\n')
    mixed = FitConfig.for_model("list.csv", None, recipe=str(tmp_path / "mine.toml"), epochs=9, seed=None)
    assert (mixed.epochs, mixed.lr, mixed.captions, mixed.seed) == (9, 1, 5, 0)


def test_paths_hold_whatever_folder_they_are_used_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "oc").mkdir()
    (tmp_path / "w.pt").write_bytes(b"weights")
    (tmp_path / "mine.toml").write_text(
        'data = "shards/{000..005}.tar"\nmodel = "ViT-B-32:w.pt"\nval = "val.csv"\nattributes = "at.json"\n'
    )
    config = FitConfig.for_model(None, None, recipe="mine.toml", image_root="images")
    assert (config.data, config.val) == (f"{tmp_path}/shards/{{000..005}}.tar", f"{tmp_path}/val.csv")
    assert (config.attributes, config.image_root) == (f"{tmp_path}/at.json", f"{tmp_path}/images")
    assert config.model == f"ViT-B-32:{tmp_path}/w.pt"
    for model, kept in (
        ("local-dir:oc", f"local-dir:{tmp_path}/oc"),
        ("oc", f"{tmp_path}/oc"),
        ("ViT-B-32:openai", "ViT-B-32:openai"),
        ("hf-hub:org/w.pt", "hf-hub:org/w.pt"),
        ("clipret-small", "clipret-small"),
    ):
        assert anchored(model) == kept
    assert FitConfig.for_model("s3://b/{0..1}.tar", "ViT-B-32").data == "s3://b/{0..1}.tar"


@pytest.mark.parametrize("name", list(recipe_names()))
def test_every_recipe_is_a_configuration(name: str) -> None:
    values = read_recipe(name)
    config = FitConfig.for_model("list.csv", values.get("model", "ViT-B-32"), recipe=name, device="cpu")
    assert {key: list(v) if isinstance(v := getattr(config, key), tuple) else v for key in values} == {
        **values,
        **({"device": "cpu"} if "device" in values else {}),
    }


def test_recipes_say_what_was_published() -> None:
    lora = read_recipe("chinese-clip-vit-h-14-lora")
    assert (lora["adapter_rank"], lora["adapter_alpha"], lora["lr"], lora["context_length"]) == (64, 96, 4e-5, 52)
    assert lora["adapter_targets"] == ["q", "k", "v"]
    full = read_recipe("chinese-clip")
    assert (full["lr"], full["epochs"], full["batch_size"]) == (5e-5, 3, 1024)
    traffic = read_recipe("vit-bigg-14-traffic")
    assert (traffic["lr"], traffic["epochs"], traffic["resize"], traffic["fill"]) == (4e-7, 5, "longest", 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "no option 'epoch': did you mean epochs"),
        ({"xyz": 3}, "no option 'xyz': see  clipret-train fit --help"),
        ({"epochs": 3.0}, "epochs is 3.0: it must be a whole number"),
        ({"epochs": True}, "epochs is True: it must be a whole number"),
        ({"epochs": 0}, r"epochs is 0: it must be a whole number from 1 to 1e\+09"),
        ({"seed": -1}, "seed is -1: it must be a whole number from 0 to"),
        ({"seed": 99999999999999999999}, "seed is 99999999999999999999: it must be a whole number from 0 to"),
        ({"cache_limit": float("inf")}, "cache_limit is inf: it must be a finite number"),
        ({"lr": float("nan")}, "lr is nan: it must be a finite number"),
        ({"epochs": 10**400}, r"it must be a whole number from 1 to 1e\+09"),
        ({"lr": 10**400}, "it must be a finite number"),
        ({"layer_decay": float("inf")}, "layer_decay is inf"),
        ({"learning_rate": 2}, r"no option 'learning_rate': did you mean lr\?"),
        ({"device": "meta"}, r"device 'meta' cannot be used .*: use cpu, cuda or cuda:N"),
        ({"lr": "fast"}, "lr is 'fast': it must be a finite number from 0"),
        ({"compile": "yes"}, "compile is 'yes': it must be true or false"),
        ({"precision": "bf61"}, r"precision is 'bf61' \(did you mean bf16\?\): it must be one of fp32, bf16, fp16"),
        ({"crop_size": "large"}, "it must be a whole number from 8 to 1e"),
        ({"adapter_targets": "q"}, "it must be a list of strings"),
        ({"batch_size": 10, "accumulate": 4}, "10 does not split into 4 equal parts"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"adapter": "lora", "lock_image": True}, "an adapter freezes both towers"),
        ({"fsdp": True, "adapter": "dora"}, "leave one of them out"),
        ({"recipe": "smal"}, "no recipe 'smal': did you mean small"),
        ({"recipe": "/nowhere/x.toml"}, "x.toml cannot be read: No such file"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_near(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ClipretError, match=message) as caught:
        make(**given)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_in_a_recipe_names_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("learning_rate = 1e-3\n")
    with pytest.raises(ClipretError, match=r"no option 'learning_rate' in .*mine\.toml"):
        make(recipe=str(file))
    file.write_text("epochs = = 3\n")
    with pytest.raises(ClipretError, match=r"mine\.toml is not TOML"):
        make(recipe=str(file))
    file.write_text("model = 5\n")
    with pytest.raises(ClipretError, match="model is 5: it must be a string"):
        FitConfig.for_model("list.csv", None, recipe=str(file))
    with pytest.raises(ClipretError, match="there is no model: pass --model"):
        FitConfig.for_model("list.csv", None)


def test_toml_and_back(tmp_path: Path) -> None:
    config = make(adapter="lora", adapter_targets=("q", "image:v"), crop_size=48, where="lang = 'en'")
    text = tomli_w.dumps(config.to_dict())
    assert "val_where" not in tomllib.loads(text)  # TOML knows no null
    (tmp_path / "params.toml").write_text(text)
    assert FitConfig.read(tmp_path / "params.toml") == config


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("epochs", "3", 3),
        ("lr", "1e-4", 1e-4),
        ("compile", "true", True),
        ("where", "lang = 'en'", "lang = 'en'"),
        ("caption_column", "2024", "2024"),
        ("resize", "longest", "longest"),
        ("adapter_targets", '["q", "v"]', ["q", "v"]),
        ("lr", "fast", "fast"),  # which FitConfig refuses
    ],
)
def test_assignments_on_the_command_line(name: str, text: str, value: object) -> None:
    assert parse_value(name, text) == value


def test_help_describes_every_setting_in_their_order() -> None:
    described = [name for section in HELP.values() for name in section]
    assert described == list(FitConfig.__dataclass_fields__)
