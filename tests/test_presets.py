"""Presets of a models.toml: what goes before what, and what is said of one that is wrong."""

from pathlib import Path

import pytest
from conftest import WriteModels

from me_local import ConfigError, Overrides, load
from me_local.asking import Ask
from me_local.chat import Chat
from me_local.config import Config, load_config, override

FILE = """
[ensemble]
system = "of the file"

[sampling]
temperature = 0.7
top_k = 5

[presets.code]
temperature = 0.2
min_p = 0.1
system = "of the preset"
template_args = { think = true, depth = 1 }
weights = { a = 3 }

[presets."all of them"]
strategy = "ce"
decode = "argmax"

[[members]]
name = "a"
path = "a.gguf"
temperature = 0.9
system = "of a"

[[members]]
name = "b"
path = "b.gguf"
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return written(tmp_path, FILE)


def written(folder: Path, text: str) -> Config:
    path = folder / "models.toml"
    path.write_text(text)
    return load_config(path)


def weights(config: Config) -> list[float]:
    return [member.weight for member in config.members]


def test_the_order_is_file_preset_options(config: Config) -> None:
    made = override(config, Overrides(preset="code", temperature=0.4, template_args={"depth": 2}))
    assert [member.sampling.temperature for member in made.members] == [0.4, 0.4]  # the option
    assert [member.sampling.min_p for member in made.members] == [0.1, 0.1]  # the preset
    assert [member.sampling.top_k for member in made.members] == [5, 5]  # the file
    assert (made.system, made.members[0].system) == ("of the preset", None)
    assert made.template_args == {"think": True, "depth": 2}
    assert weights(made) == pytest.approx([6 / 7, 1 / 7])
    assert made.preset == "code"


def test_options_of_before_go_before_a_preset_that_comes_later(config: Config) -> None:
    """As of a server's command line, in front of which a request names a preset."""
    before = override(config, Overrides(temperature=0.4, weights={"a": 1, "b": 3}))
    later = override(before, Overrides(preset="code"))
    assert later.members[0].sampling.temperature == 0.4
    assert later.members[0].sampling.min_p == 0.1
    assert weights(later) == [0.25, 0.75]
    assert later == override(config, Overrides(preset="code", temperature=0.4, weights={"a": 1, "b": 3}))


def test_one_preset_takes_the_place_of_the_other(config: Config) -> None:
    code = override(config, Overrides(preset="code"))
    both = override(override(code, Overrides(top_p=0.5)), Overrides(preset="all of them"))
    assert both == override(config, Overrides(preset="all of them", top_p=0.5))
    assert (both.system, both.strategy, both.preset) == ("of the file", "ce", "all of them")
    none = override(both, Overrides(preset=""))
    assert none == override(config, Overrides(top_p=0.5))
    assert (none.members[0].system, none.preset) == ("of a", None)


def test_a_name_that_there_is_not(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'^--preset: unknown preset "cod"; did you mean "code"\?$'):
        override(config, Overrides(preset="cod"))
    bare = written(tmp_path, '[[members]]\nname = "a"\npath = "a.gguf"\n')
    with pytest.raises(ConfigError, match=r'^--preset: unknown preset "x"; models.toml has no \[presets.NAME\]$'):
        override(bare, Overrides(preset="x"))


@pytest.mark.parametrize(
    ("before", "asked", "named"),
    [
        (Overrides(), Overrides(preset="all of them", unit="word"), "--unit"),
        (Overrides(), Overrides(preset="all of them", strategy="me"), "--strategy"),
        (Overrides(preset="all of them"), Overrides(strategy="me"), "--strategy"),
        (Overrides(unit="word"), Overrides(preset="all of them"), "--preset"),
    ],
)
def test_what_does_not_go_with_a_preset_is_called_by_what_was_asked(
    config: Config, before: Overrides, asked: Overrides, named: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: "):
        override(override(config, before), asked)


ARGMAX = 'decode "argmax" needs strategy "ce"; "me" runs one member per step and never sees the mixture'


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("[presets.x]\ntemprature = 1", '[presets.x].temprature: unknown key; did you mean "temperature"?'),
        ("[presets.x]\ntemperature = -1", "[presets.x].temperature: must be at least 0, got -1"),
        ("[presets.x]\nseed = 1", "[presets.x].seed: unknown key"),
        ('[presets.x]\ndecode = "argmax"', f"[presets.x].decode: {ARGMAX}"),
        ('[presets."a b"]\nstop = [""]', '[presets."a b"].stop[0]: must not be empty, got ""'),
        ("[presets.x]\nweights = [1, 2]", "[presets.x].weights: must be a table, such as { a = 0.7 }"),
        ("[presets.x]\nweights = { c = 1 }", '[presets.x].weights: unknown member "c"; allowed: a'),
        ("[presets.x]\nweights = { a = -1 }", '[presets.x].weights: "a": must be at least 0, got -1'),
        ("[presets.x]\nweights = { a = 0 }", "[presets.x].weights: every weight is 0; one must be above 0"),
        ("[presets]\nx = 1", "[presets.x]: must be a table, got 1"),
        ('[presets."a,b"]\n', '[presets."a,b"]: must be a name without'),
        ("presets = 1", "presets: must be tables, each headed [presets.NAME], got 1"),
    ],
)
def test_a_bad_preset_is_one_line_when_the_file_is_read(tmp_path: Path, preset: str, expected: str) -> None:
    members = '\n[[members]]\nname = "a"\npath = "a.gguf"\n'
    with pytest.raises(ConfigError) as caught:
        written(tmp_path, preset + members)
    assert str(caught.value).startswith(f"{tmp_path / 'models.toml'}: {expected}")
    assert "\n" not in str(caught.value)


def test_an_ensemble_takes_them_with_each_request(write_models: WriteModels) -> None:
    top = "[presets.long]\nmax_tokens = 7\nweights = { spm = 0 }"
    with load(write_models("bpe_a", "spm", top=top)) as ensemble:
        reply = ensemble.generate("the cat", Overrides(preset="long", seed=1, ignore_eos=True))
        assert [step.member for step in reply.steps] == ["bpe_a"] * 7
        alone = Overrides(weights={"spm": 0}, max_tokens=7, seed=1, ignore_eos=True)
        assert ensemble.generate("the cat", alone).text == reply.text


@pytest.mark.parametrize("batch", [1, 2])
def test_many_prompts_with_presets_have_seeds_of_their_own(write_models: WriteModels, batch: int) -> None:
    asks = [Ask("the cat", Overrides(preset="long"))] * 3
    models = write_models("bpe_a", top="[sampling]\nignore_eos = true\n[presets.long]\nmax_tokens = 7")
    with load(models, batch=batch) as ensemble:
        replies = [one.reply for one in ensemble.generate_many(asks, Overrides(seed=5), raw=True)]
    found = {reply.seed: len(reply.steps) for reply in replies if reply}
    assert found == {5: 7, 6: 7, 7: 7}


def test_a_chat_changes_them_and_keeps_what_was_set(write_models: WriteModels) -> None:
    top = '[presets.long]\nmax_tokens = 7\ntemperature = 0.5\n[presets.short]\nmax_tokens = 3\nsystem = "Be brief."'
    with load(write_models("bpe_a", top=top)) as ensemble:
        chat = Chat(ensemble)
        chat.set(Overrides(temperature=0.25))
        for preset, length, system in (("long", 7, None), ("short", 3, "Be brief."), ("", 512, None)):
            chat.set(Overrides(preset=preset))
            assert (chat.config.max_tokens, chat.config.system) == (length, system)
            assert chat.config.members[0].sampling.temperature == 0.25
