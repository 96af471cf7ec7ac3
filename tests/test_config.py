import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from me_local.config import (
    Config,
    MemberConfig,
    Overrides,
    load_config,
    override,
)
from me_local.errors import ConfigError
from me_local.sampling import Bias, Sampling
from me_local.settings import parse_setting, parse_weights

ONE = '[[members]]\nname = "smol"\npath = "smol.gguf"\n'
TWO = ONE + '[[members]]\nname = "gemma"\nhf = "ggml-org/gemma-3-270m-GGUF:gemma-3-270m-Q8_0.gguf"\n'


def load(folder: Path, text: str | bytes) -> Config:
    path = folder / "models.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path)


def message(call, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value)


def load_message(folder: Path, text: str | bytes) -> str:
    """What `load_config` says of the text, with the file named as if it lay in the current folder."""
    return message(load, folder, text).replace(f"{folder}/", "")


def test_the_smallest_file_gets_every_default(tmp_path):
    config = load(tmp_path, ONE)
    assert config == Config(
        path=tmp_path / "models.toml",
        members=(MemberConfig(name="smol", path=tmp_path / "smol.gguf", hf=None, weight=1.0),),
        strategy="me",
        unit="token",
        decode="sample",
        seed=None,
        router="constant",
        alignment="top_k",
        system=None,
        max_tokens=512,
        stop=(),
    )
    member = config.members[0]
    assert member.sampling == Sampling(temperature=1.0, top_k=10, top_p=1.0, min_p=0.0)
    assert (member.n_ctx, member.n_gpu_layers, member.n_threads, member.n_batch) == (4096, -1, None, 512)
    assert (member.flash_attn, member.type_k, member.type_v) == (False, None, None)
    assert (member.main_gpu, member.tensor_split, member.lora, member.tokenizer) == (0, None, None, None)
    assert (member.system, member.chat_template) == (None, None)


def test_every_key_is_read(tmp_path):
    config = load(
        tmp_path,
        """
        [ensemble]
        strategy = "ce"
        decode = "argmax"
        seed = 9223372036854775807
        router = "cosine"
        alignment = "union"
        system = "Be brief."
        [sampling]
        temperature = 0.5
        top_k = 0
        top_p = 0.9
        min_p = 0.1
        max_tokens = 0
        stop = ["\\n\\n", "END"]
        [[members]]
        name = "big one"
        path = "/models/big.gguf"
        weight = 3
        temperature = 0
        top_k = 5
        n_ctx = 0
        n_gpu_layers = 12
        n_threads = 2
        n_batch = 64
        flash_attn = true
        type_k = "q8_0"
        type_v = "q4_0"
        main_gpu = 1
        tensor_split = [3, 1.5]
        lora = "lora/tuned.gguf"
        system = "You are big."
        chat_template = "chatml"
        tokenizer = "tok/tokenizer.json"
        [[members]]
        name = "small"
        hf = "owner/repo.x:q4/small-Q4_K_M.gguf"
        weight = 1.0
        """,
    )
    big, small = config.members
    assert config == Config(
        path=tmp_path / "models.toml",
        members=config.members,
        strategy="ce",
        decode="argmax",
        seed=2**63 - 1,
        router="cosine",
        alignment="union",
        system="Be brief.",
        max_tokens=0,
        stop=("\n\n", "END"),
    )
    assert big == MemberConfig(
        name="big one",
        path=Path("/models/big.gguf"),
        hf=None,
        weight=0.75,
        sampling=Sampling(temperature=0.0, top_k=5, top_p=0.9, min_p=0.1),
        n_ctx=0,
        n_gpu_layers=12,
        n_threads=2,
        n_batch=64,
        flash_attn=True,
        type_k="q8_0",
        type_v="q4_0",
        main_gpu=1,
        tensor_split=(3.0, 1.5),
        lora=tmp_path / "lora/tuned.gguf",
        system="You are big.",
        chat_template="chatml",
        tokenizer=tmp_path / "tok/tokenizer.json",
    )
    assert (small.hf, small.path, small.weight) == ("owner/repo.x:q4/small-Q4_K_M.gguf", None, 0.25)
    assert small.sampling == Sampling(temperature=0.5, top_k=0, top_p=0.9, min_p=0.1)


def test_paths_are_absolute_and_start_at_the_folder_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/models.toml").write_text(
        '[[members]]\nname = "a"\npath = "../gguf/a.gguf"\nlora = "~/lora.gguf"\nchat_template = "a.jinja"\n'
        '[[members]]\nname = "b"\npath = "b.gguf"\nchat_template = "~/t/b"\n'
    )
    monkeypatch.chdir(tmp_path)
    a, b = load_config(Path("conf/models.toml")).members
    assert a.path == tmp_path / "gguf/a.gguf"
    assert a.lora == Path("/home/ada/lora.gguf")
    assert a.chat_template == f"{tmp_path}/conf/a.jinja"
    assert b.path == tmp_path / "conf/b.gguf"
    assert b.chat_template == "/home/ada/t/b"


def test_a_link_keeps_its_name(tmp_path):
    (tmp_path / "blob").touch()
    (tmp_path / "smol.gguf").symlink_to("blob")
    assert load(tmp_path, ONE).members[0].path == tmp_path / "smol.gguf"


@pytest.mark.parametrize("template", ["plain", "chatml", "llama3"])
def test_a_template_name_stays_a_name(tmp_path, template):
    assert load(tmp_path, ONE + f'chat_template = "{template}"').members[0].chat_template == template


def test_one_stop_string_needs_no_list(tmp_path):
    assert load(tmp_path, '[sampling]\nstop = "END"\n' + ONE).stop == ("END",)


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    config = load(tmp_path, b"\xef\xbb\xbf" + ONE.replace("\n", "\r\n").encode())
    assert config.members[0].name == "smol"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("1", "1"), (0.5, 0.5)),
        (("0", "7"), (0.0, 1.0)),
        (("1e308", "1e308"), (0.5, 0.5)),
        (("5e-324", "15e-324"), (0.25, 0.75)),
        (("0.1", "0.3"), (0.25, 0.75)),
    ],
)
def test_weights_are_normalised(tmp_path, given, expected):
    text = "".join(
        f'[[members]]\nname = "m{i}"\npath = "m.gguf"\nweight = {weight}\n' for i, weight in enumerate(given)
    )
    assert [member.weight for member in load(tmp_path, text).members] == pytest.approx(expected, abs=1e-15)


def test_biases_have_several_spellings_and_ids_belong_to_their_member(tmp_path):
    config = load(
        tmp_path,
        """
        [sampling]
        logit_bias = { " the" = -1.5, "a b" = false, c = -100 }
        [[members]]
        name = "shared"
        path = "a.gguf"
        [[members]]
        name = "own"
        path = "b.gguf"
        logit_bias = [[7, 2], ["x", -1]]
        """,
    )
    assert config.members[0].sampling.logit_bias == (
        Bias(" the", -1.5),
        Bias("a b", -math.inf),
        Bias("c", -math.inf),
    )
    assert config.members[1].sampling.logit_bias == (Bias(7, 2.0, "own"), Bias("x", -1.0, "own"))


def test_configs_are_frozen(tmp_path):
    with pytest.raises(FrozenInstanceError):
        load(tmp_path, ONE).seed = 1


SMOL = 'models.toml: members[0] "smol"'
NAME_RULE = 'must be a name without "=", ",", control characters and outer spaces'
MEMBER_KEYS = (
    "name, path, hf, url, engine, api_key_env, model, "
    "weight, n_ctx, n_gpu_layers, n_threads, n_batch, flash_attn, swa_full, type_k, type_v, main_gpu, "
    "tensor_split, lora, system, chat_template, template_args, tokenizer, llama, temperature, top_k, top_p, min_p, "
    "typical_p, top_n_sigma, xtc_probability, xtc_threshold, repeat_penalty, presence_penalty, "
    "frequency_penalty, repeat_last_n, dry_multiplier, dry_base, dry_allowed_length, dry_penalty_last_n, "
    "dry_sequence_breakers, logit_bias"
)
NUMBERS = ".logit_bias: must give each a number, at most 1000000, or false"
PAIRS = ".logit_bias: must be a table of texts and numbers, or a list of pairs"
HF_RULE = 'must look like "owner/repo:file.gguf"'
URL_RULE = 'must look like "http://host:port", without a key in it'
WORDS = 'unit "word" needs strategy "me"; "ce" averages members piece by piece, and cannot do so for whole words'
ARGMAX = 'decode "argmax" needs strategy "ce"; "me" runs one member per step and never sees the mixture'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("weigth = 1", '.weigth: unknown key; did you mean "weight"?'),
        ("sampling = {}", f".sampling: unknown key; allowed: {MEMBER_KEYS}"),
        ('"a\\nb" = 1', f'."a\\nb": unknown key; allowed: {MEMBER_KEYS}'),
        ('top_k = "ten"', '.top_k: must be an integer, got "ten"'),
        ("top_k = 2.0", ".top_k: must be an integer, got 2.0"),
        ("top_k = true", ".top_k: must be an integer, got true"),
        ("top_k = -2", ".top_k: must be at least 0, got -2"),
        ("temperature = -0.5", ".temperature: must be at least 0, got -0.5"),
        ("temperature = inf", ".temperature: must be a finite number, got inf"),
        ("top_p = 0", ".top_p: must be above 0, got 0"),
        ("top_p = 1.01", ".top_p: must be at most 1, got 1.01"),
        ("top_p = nan", ".top_p: must be a finite number, got nan"),
        ("min_p = 2", ".min_p: must be at most 1, got 2"),
        ("typical_p = 0", ".typical_p: must be above 0, got 0"),
        ("repeat_penalty = 0", ".repeat_penalty: must be at least 0.01, got 0"),
        ("repeat_last_n = -2", ".repeat_last_n: must be at least -1, got -2"),
        ("dry_allowed_length = 0", ".dry_allowed_length: must be at least 1, got 0"),
        ("logit_bias = 3", f"{PAIRS}, got 3"),
        ("logit_bias = [[1, 2, 3]]", f"{PAIRS}, got [[1, 2, 3]]"),
        (
            "logit_bias = { a = true }",
            '.logit_bias: must give each a number, at most 1000000, or false, got {"a": true}',
        ),
        ("logit_bias = [[-1, 2]]", ".logit_bias: must name tokens by a text or by an id, got [[-1, 2]]"),
        ("weight = -1", ".weight: must be at least 0, got -1"),
        ("weight = nan", ".weight: must be a finite number, got nan"),
        ("weight = true", ".weight: must be a number, got true"),
        ('weight = "1"', '.weight: must be a number, got "1"'),
        ("n_ctx = -1", ".n_ctx: must be at least 0, got -1"),
        ("n_ctx = 2147483648", ".n_ctx: must be at most 2147483647, got 2147483648"),
        ("n_gpu_layers = -2", ".n_gpu_layers: must be at least -1, got -2"),
        ("n_threads = 0", ".n_threads: must be at least 1, got 0"),
        ("n_batch = 0", ".n_batch: must be at least 1, got 0"),
        ("main_gpu = -1", ".main_gpu: must be at least 0, got -1"),
        ("flash_attn = 1", ".flash_attn: must be true or false, got 1"),
        ('type_v = "q8_0"', '.type_v: "q8_0" needs flash_attn = true'),
        ('type_v = "iq4_nl"\nflash_attn = false', '.type_v: "iq4_nl" needs flash_attn = true'),
        (
            'type_k = "q8"',
            '.type_k: must be "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0" or "iq4_nl", got "q8"',
        ),
        ("tensor_split = 1", ".tensor_split: must be a list, got 1"),
        ("tensor_split = [1, -1]", ".tensor_split[1]: must be at least 0, got -1"),
        ("tensor_split = [0, 0.0]", ".tensor_split: must have a number above 0, got [0, 0.0]"),
        ("tensor_split = []", ".tensor_split: must have a number above 0, got []"),
        ("lora = 2020-01-02", '.lora: must be a string, got "2020-01-02"'),
        ('tokenizer = ""', '.tokenizer: must be the path of a file, got ""'),
        ('chat_template = ""', '.chat_template: must not be empty, got ""'),
        ("system = 1", ".system: must be a string, got 1"),
        ('hf = "a/b:c.gguf"', ": needs exactly one of path and hf"),
        ('hf = "https://huggingface.co/a/b"', f'.hf: {HF_RULE}, got "https://huggingface.co/a/b"'),
        ('hf = "a/b:../c.gguf"', f'.hf: {HF_RULE}, got "a/b:../c.gguf"'),
        ('url = "box:8080"', f'.url: {URL_RULE}, got "box:8080"'),
        ('url = "http://key@box"', f'.url: {URL_RULE}, got "http://key@box"'),
        ('url = "http://box/?key=1"', f'.url: {URL_RULE}, got "http://box/?key=1"'),
        ('url = "http://box"\nn_ctx = 512', ".n_ctx: the engine at the url decides this; leave it out"),
        ('engine = "vllm"', ".engine: goes with url, the address of an engine"),
        ('url = "http://box"\nengine = "ollama"', '.engine: must be "llama-server" or "vllm", got "ollama"'),
        (
            'url = "http://box"\napi_key_env = "a key"',
            '.api_key_env: must be the name of an environment variable, got "a key"',
        ),
        ('hf = "a/b:c.bin"', f'.hf: {HF_RULE}, got "a/b:c.bin"'),
    ],
)
def test_a_bad_key_of_a_member(tmp_path, line, expected):
    assert load_message(tmp_path, ONE + line) == f"{SMOL}{expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no members; add a [[members]] table with name and path"),
        ("members = []", "no members; add a [[members]] table with name and path"),
        ('[members]\nname = "a"', "members: must be a list of tables, each headed [[members]]"),
        ("members = [1]", "members[0]: must be a table, got 1"),
        ('[[members]]\npath = "a"', "members[0].name: is missing"),
        ('[[members]]\nname = "a"', 'members[0] "a": needs exactly one of path and hf'),
        (
            ONE + '[[members]]\npath = "b"\nweigth = 1',
            'members[1].weigth: unknown key; did you mean "weight"?',
        ),
        (ONE + "weight = 0", "members: every weight is 0; one must be above 0"),
        (ONE + ONE, 'members[1] "smol".name: already used by members[0]'),
        ("[[members]]\nname = 1", "members[0].name: must be a string, got 1"),
        ('[[members]]\nname = ""', f'members[0].name: {NAME_RULE}, got ""'),
        ('[[members]]\nname = "a=b"', f'members[0] "a=b".name: {NAME_RULE}, got "a=b"'),
        ('[[members]]\nname = "a,b"', f'members[0] "a,b".name: {NAME_RULE}, got "a,b"'),
        ('[[members]]\nname = " a"', f'members[0] " a".name: {NAME_RULE}, got " a"'),
        ('[[members]]\nname = "a\\n"', f'members[0] "a\\n".name: {NAME_RULE}, got "a\\n"'),
        ('[[members]]\nname = "a\\u0085b"', f'members[0] "a\\u0085b".name: {NAME_RULE}, got "a\\u0085b"'),
        ("[sampler]\n" + ONE, 'sampler: unknown table; did you mean "sampling"?'),
        ("[[member]]", 'member: unknown table; did you mean "members"?'),
        ('strategy = "ce"', "strategy: unknown key; allowed: ensemble, sampling, members, presets"),
        ("ensemble = 1", "[ensemble]: must be a table, got 1"),
        ('[ensemble]\nstrategy = "mee"', '[ensemble].strategy: must be "me", "ce" or "union", got "mee"'),
        ('[ensemble]\ndecode = "greedy"', '[ensemble].decode: must be "sample" or "argmax", got "greedy"'),
        ('[ensemble]\ndecode = "argmax"\n' + ONE, f"[ensemble].decode: {ARGMAX}"),
        ('[ensemble]\nunit = "words"', '[ensemble].unit: must be "token" or "word", got "words"'),
        ('[ensemble]\nunit = "word"\nstrategy = "ce"\n' + ONE, f"[ensemble].unit: {WORDS}"),
        ("[ensemble]\nseed = -1", "[ensemble].seed: must be at least 0, got -1"),
        (
            "[ensemble]\nseed = 9223372036854775808",
            "[ensemble].seed: must be at most 9223372036854775807, got 9223372036854775808",
        ),
        ('[ensemble]\nrouter = ""', '[ensemble].router: must not be empty, got ""'),
        (
            "[ensemble]\nzzz = 1",
            "[ensemble].zzz: unknown key; allowed: strategy, unit, decode, seed, router, alignment, route, parallel, "
            "draft, system, template_args",
        ),
        ("[sampling]\ntemperature = -1", "[sampling].temperature: must be at least 0, got -1"),
        ("[sampling]\nmax_tokens = -1", "[sampling].max_tokens: must be at least 0, got -1"),
        ('[sampling]\nstop = ["a", ""]', '[sampling].stop[1]: must not be empty, got ""'),
        ("[sampling]\nstop = 1", "[sampling].stop: must be a list, got 1"),
        ("[sampling]\nmax_token = 1", '[sampling].max_token: unknown key; did you mean "max_tokens"?'),
        (
            "[sampling]\ntop_k = 1\ntop_k = 2\n",
            "not valid TOML: Cannot overwrite a value (at line 3, column 10)",
        ),
        (
            "[ensemble\n",
            "not valid TOML: Expected ']' at the end of a table declaration (at line 1, column 10)",
        ),
        (b'[ensemble]\nsystem = "\xff"', "not UTF-8 (byte 0xff in line 2)"),
        (
            "[sampling]\ntop_k = [" + "1, " * 40 + "]",
            "[sampling].top_k: must be an integer, got [" + "1, " * 25 + "1...",
        ),
    ],
)
def test_a_bad_file(tmp_path, text, expected):
    assert load_message(tmp_path, text) == f"models.toml: {expected}"


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message(load_config, Path("no.toml")) == "no.toml: cannot be read: no such file or directory"
    Path("folder").mkdir()
    assert message(load_config, Path("folder")) == "folder: cannot be read: is a directory"


def test_a_file_without_permission(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert message(load_config, Path("models.toml")) == "models.toml: cannot be read: permission denied"


@pytest.fixture
def config(tmp_path) -> Config:
    text = '[ensemble]\nsystem = "file"\n[sampling]\ntop_p = 0.5\n' + TWO + 'top_k = 3\nsystem = "own"\n'
    return load(tmp_path, text)


def test_no_overrides_change_nothing(config):
    assert override(config, Overrides()) == config


def test_options_beat_the_file_and_the_members(config):
    given = Overrides(
        strategy="ce", decode="argmax", seed=7, system="", max_tokens=9, stop=("x",), temperature=0, top_k=4
    )
    changed = override(config, given)
    assert [member.sampling for member in changed.members] == [Sampling(0.0, 4, 0.5, 0.0)] * 2
    assert [member.system for member in changed.members] == [None, None]
    own = tuple(replace(member, sampling=Sampling(0.0, 4, 0.5, 0.0), system=None) for member in config.members)
    assert changed == Config(
        path=config.path,
        members=own,
        strategy="ce",
        decode="argmax",
        seed=7,
        system="",
        max_tokens=9,
        stop=("x",),
    )


def test_an_option_leaves_the_other_values_of_a_member(config):
    assert override(config, Overrides(min_p=0.1)).members[1].sampling == Sampling(1.0, 3, 0.5, 0.1)
    assert override(config, Overrides(min_p=0.1)).members[1].system == "own"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"smol": 3, "gemma": 1}, [0.75, 0.25]),
        ({"smol": 1.5}, [0.75, 0.25]),  # gemma keeps its 0.5
        ({"gemma": 0}, [1.0, 0.0]),
        ({}, [0.5, 0.5]),
    ],
)
def test_weights_override(config, weights, expected):
    assert [member.weight for member in override(config, Overrides(weights=weights)).members] == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Overrides(temperature=-1), "--temperature: must be at least 0, got -1"),
        (Overrides(top_k=-2), "--top-k: must be at least 0, got -2"),
        (Overrides(top_p=0.0), "--top-p: must be above 0, got 0.0"),
        (Overrides(min_p=float("nan")), "--min-p: must be a finite number, got nan"),
        (Overrides(max_tokens=-5), "--max-tokens: must be at least 0, got -5"),
        (Overrides(seed=-1), "--seed: must be at least 0, got -1"),
        (Overrides(stop=("",)), '--stop[0]: must not be empty, got ""'),
        (Overrides(strategy="both"), '--strategy: must be "me", "ce" or "union", got "both"'),
        (Overrides(decode="argmax"), f"--decode: {ARGMAX}"),
        (Overrides(decode="argmax", strategy="me"), f"--decode: {ARGMAX}"),
        (Overrides(unit="word", strategy="ce"), f"--unit: {WORDS}"),
        (Overrides(weights={"smoll": 1}), '--weights: unknown member "smoll"; did you mean "smol"?'),
        (Overrides(weights={"x": 1}), '--weights: unknown member "x"; allowed: smol, gemma'),
        (Overrides(weights={"smol": -1}), '--weights: "smol": must be at least 0, got -1'),
        (Overrides(weights={"smol": 0, "gemma": 0}), "--weights: every weight is 0; one must be above 0"),
    ],
)
def test_bad_options(config, given, expected):
    assert message(override, config, given) == expected


OFF = """
top_k = -1
top_p = 1
min_p = 0.0
typical_p = 1.0
top_n_sigma = -1
xtc_probability = 0
repeat_penalty = 1
presence_penalty = 0
frequency_penalty = -0.0
repeat_last_n = -1
dry_multiplier = 0
dry_penalty_last_n = -1
dry_sequence_breakers = []
logit_bias = {}
min_tokens = 0
ignore_eos = false
"""


def test_what_means_off_is_taken(tmp_path):
    config = load(tmp_path, "[sampling]\n" + OFF + TWO)
    off = Sampling(top_k=0, repeat_last_n=-1, dry_sequence_breakers=())
    assert [member.sampling for member in config.members] == [off, off]
    assert (config.min_tokens, config.ignore_eos) == (0, False)
    for setting in OFF.strip().splitlines():
        key, _, value = setting.partition(" = ")
        parse_setting(key, value)


def test_the_option_that_makes_argmax_impossible_is_named(config):
    ce = override(config, Overrides(strategy="ce", decode="argmax"))
    assert message(override, ce, Overrides(strategy="me")) == f"--strategy: {ARGMAX}"


def test_the_option_that_makes_words_impossible_is_named(config):
    words = override(config, Overrides(unit="word"))
    assert (words.unit, words.strategy) == ("word", "me")
    assert message(override, words, Overrides(strategy="ce")) == f"--strategy: {WORDS}"
    ce = override(config, Overrides(strategy="ce"))
    assert message(override, ce, Overrides(unit="word")) == f"--unit: {WORDS}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=0.7,b=0.3", {"a": 0.7, "b": 0.3}),
        (" b = 3 , a=1", {"b": 3.0, "a": 1.0}),
        ("b=2", {"b": 2.0}),
        ("0.7,0.3", {"a": 0.7, "b": 0.3}),
        ("1, 0", {"a": 1.0, "b": 0.0}),
    ],
)
def test_parse_weights(text, expected):
    assert parse_weights(text, ["a", "b"]) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.7", '--weights: needs a weight for each of alpha, beta, got "0.7"'),
        ("1,2,3", '--weights: needs a weight for each of alpha, beta, got "1,2,3"'),
        ("", '--weights: needs a weight for each of alpha, beta, got ""'),
        ("alpah=1", '--weights: unknown member "alpah"; did you mean "alpha"?'),
        ("alpha=1,0.3", '--weights: unknown member "0.3"; allowed: alpha, beta'),
        ("alpha=1,alpha=2", '--weights: "alpha" is named twice'),
        ("alpha=x", '--weights: "alpha": must be a number, got "x"'),
        ("alpha=", '--weights: "alpha": must be a number, got ""'),
        ("1,-2", '--weights: "beta": must be at least 0, got -2'),
        ("1,nan", '--weights: "beta": must be a finite number, got nan'),
    ],
)
def test_bad_weights(text, expected):
    assert message(parse_weights, text, ["alpha", "beta"]) == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("temperature", "0.5", Overrides(temperature=0.5)),
        ("temperature", "1", Overrides(temperature=1.0)),
        ("top_k", "40", Overrides(top_k=40)),
        ("top_k", "-1", Overrides(top_k=0)),
        ("top_p", "1", Overrides(top_p=1.0)),
        ("min_p", "0.05", Overrides(min_p=0.05)),
        ("max_tokens", "64", Overrides(max_tokens=64)),
        ("repeat_penalty", "1.1", Overrides(repeat_penalty=1.1)),
        ("ignore_eos", "true", Overrides(ignore_eos=True)),
        ("dry_sequence_breakers", '["\\n", "."]', Overrides(dry_sequence_breakers=("\n", "."))),
        ("logit_bias", '{" the": -2, "a": false}', Overrides(logit_bias=(Bias(" the", -2.0), Bias("a", -math.inf)))),
        ("seed", "9007199254740993", Overrides(seed=9007199254740993)),  # 2**53 + 1: no float on the way
        ("stop", "7", Overrides(stop=("7",))),
        ("decode", "argmax", Overrides(decode="argmax")),
        ("unit", "word", Overrides(unit="word")),
    ],
)
def test_parse_setting(key, value, expected):
    assert parse_setting(key, value) == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("temprature", "1", '/set: unknown key "temprature"; did you mean "temperature"?'),
        (
            "zzz",
            "1",
            '/set: unknown key "zzz"; allowed: temperature, top_k, top_p, min_p, typical_p, top_n_sigma, '
            "xtc_probability, xtc_threshold, repeat_penalty, presence_penalty, frequency_penalty, repeat_last_n, "
            "dry_multiplier, dry_base, dry_allowed_length, dry_penalty_last_n, min_tokens, max_tokens, seed, "
            "logit_bias, dry_sequence_breakers, ignore_eos, stop, decode, strategy, unit, template_args",
        ),
        ("temperature", "-1", "/set temperature: must be at least 0, got -1"),
        ("temperature", "hot", '/set temperature: must be a number, got "hot"'),
        ("top_k", "2.5", "/set top_k: must be an integer, got 2.5"),
        ("ignore_eos", "yes", '/set ignore_eos: must be true or false, got "yes"'),
        ("logit_bias", "the", '/set logit_bias: must look like {" the": -1.5, " a": false}, got "the"'),
        ("logit_bias", "5", "/set logit_bias: must be a table of texts and numbers, or a list of pairs, got 5"),
        ("decode", "greedy", '/set decode: must be "sample" or "argmax", got "greedy"'),
    ],
)
def test_bad_settings(key, value, expected):
    assert message(parse_setting, key, value) == expected
