"""The catalog: names, hub ids, paths, and what is said about a name that nobody knows."""

import json
import shutil
from pathlib import Path

import pytest

from simllm.errors import InputError
from simllm.models import catalog
from simllm.models.catalog import catalog_entries, catalog_names, load_model

CONFIGS = Path(catalog.__file__).parent / "configs"


def test_every_config_is_listed_and_every_listed_config_is_there():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(catalog_names())
    assert all(entry.config.is_file() for entry in catalog_entries())


def test_entries_say_the_family_that_a_model_type_cannot():
    families = {entry.name: entry.family for entry in catalog_entries()}
    assert families["gpt3-175b"] == "GPT-3"
    assert families["galactica-120b"] == "Galactica"
    assert load_model("gpt3-175b").model_type == "gpt2"


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("llama-3.1-405b", "llama-3.1-405b"),
        ("LLaMA-3.1-405B", "llama-3.1-405b"),
        ("meta-llama/Llama-3.1-405B", "llama-3.1-405b"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("Llama-2-7b-hf", "llama-2-7b"),
        ("EleutherAI/gpt-j-6B", "gpt-j-6b"),
        ("bigscience/bloom", "bloom-176b"),
        ("some-organisation/mistral-7b", "mistral-7b"),
    ],
)
def test_hub_ids_stand_for_catalog_names(spelling, name):
    assert load_model(spelling).name == name


def test_a_model_is_loaded_once():
    assert load_model("gpt2") is load_model("openai-community/gpt2")


def test_no_hub_id_stands_for_two_models():
    ids = [hub_id.casefold() for entry in catalog_entries() for hub_id in entry.hub_ids]
    assert len(ids) == len(set(ids))
    assert not set(ids) & set(catalog_names())


def test_context_length_of_a_config_without_such_a_field():
    assert load_model("bloom-7b1").context_length == 2048
    assert load_model("llama-3.1-405b").context_length == 131072


def test_u_palm_is_palm_as_a_prefix_decoder():
    palm, u_palm = load_model("palm-540b"), load_model("u-palm-540b")
    assert (palm.architecture, u_palm.architecture) == ("causal-decoder", "prefix-decoder")
    assert {block.mixer.mask for block in u_palm.decoder.layers} == {"prefix"}
    assert {block.mixer.mask for block in palm.decoder.layers} == {"causal"}


def test_a_config_file_and_its_folder_are_the_same_model(tmp_path):
    folder = tmp_path / "my-llama"
    folder.mkdir()
    shutil.copy(CONFIGS / "llama-2-7b.json", folder / "config.json")
    by_file, by_folder = load_model(folder / "config.json"), load_model(str(folder))
    assert by_file == by_folder
    assert by_file.name == "my-llama"
    assert by_file.decoder == load_model("llama-2-7b").decoder


def test_a_config_under_another_name_is_called_after_its_file(tmp_path):
    file = tmp_path / "wide.json"
    file.write_text(json.dumps({**json.loads((CONFIGS / "llama-7b.json").read_text()), "hidden_size": 8192}))
    spec = load_model(file)
    assert (spec.name, spec.hidden_size) == ("wide", 8192)


def test_a_name_of_the_catalog_wins_over_a_folder(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_model("gpt2").hidden_size == 768
    with pytest.raises(InputError, match=r"folder './gpt2' holds no config.json"):
        load_model("./gpt2")


@pytest.mark.parametrize("given", ["lama-3-8b", "meta-llama/lama-3-8b"])
def test_an_unknown_name_gets_the_nearest_one_and_the_hint_about_files(given):
    with pytest.raises(InputError, match=r"unknown model .*config\.json") as caught:
        load_model(given)
    assert "llama-3-8b" in str(caught.value)


@pytest.mark.parametrize("given", ["", "   ", "\0", "nothing like it", "x" * 5000, "a/b/c"])
def test_names_that_are_no_names_are_one_clear_message(given):
    with pytest.raises(InputError):
        load_model(given)


@pytest.mark.parametrize("given", ["nowhere/config.json", "/nowhere/at/all", "./llama-7b", "../x"])
def test_paths_that_lead_nowhere_are_named(given, tmp_path, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    with pytest.raises(InputError, match="there is no file"):
        load_model(given)


def test_all_specs_are_read():
    catalog._load.cache_clear()
    assert len([load_model(name) for name in catalog_names()]) == 111
