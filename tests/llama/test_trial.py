"""A file that is used for the first time: a child process tries it, and what kills the child does not kill this one.

What llama.cpp does with a file is played by a `sitecustomize` module, which the child imports when it starts.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest
from conftest import ROOT

from me_local import LoadError, load
from me_local.config import MemberConfig
from me_local.errors import CrashError, InputError, MeLocalError
from me_local.llama import trial
from me_local.llama.header import read_header
from me_local.llama.trial import VARIABLE, cache_folder

FAULT = """
import os, signal, sys
import llama_cpp
real = llama_cpp.llama_model_load_from_file
def load(path, settings):
    {fault}
    return real(path, settings)
llama_cpp.llama_model_load_from_file = load
"""
DIES = "os.kill(os.getpid(), signal.{})"
DIES_WITH_BUFFERS = f"settings.use_extra_bufts and {DIES}"
ASSERTS = (
    "sys.stderr.write('/home/me/ggml/src/ggml.c:1910: GGML_ASSERT(ne > 0) failed\\n'); sys.stderr.flush(); os.abort()"
)


@pytest.fixture(autouse=True)
def _own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered of before, and files are tried."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> Path:
    """Let children do this before they load a model; a file that gets a character for each load that was begun."""
    runs = folder / "runs"
    count = f"open({str(runs)!r}, 'a').write('x'); "
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(FAULT.format(fault=count + fault))
    monkeypatch.syspath_prepend(str(folder / "site"))
    runs.touch()
    return runs


def extra_buffers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What is told to llama.cpp in this process, for each model from now on."""
    told: list[bool] = []
    real = llama_cpp.llama_model_load_from_file

    def loading(path: bytes, settings: llama_cpp.llama_model_params) -> object:
        told.append(bool(settings.use_extra_bufts))
        return real(path, settings)

    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", loading)
    return told


def test_a_file_is_tried_once(two_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, told = plant(tmp_path, monkeypatch, "pass"), extra_buffers(monkeypatch)
    for _ in range(2):
        with load(two_models) as ensemble:
            assert not any("llama.cpp" in notice for notice in ensemble.notices)
    assert runs.read_text() == "xx"  # one for each member
    assert told == [True] * 4


@pytest.mark.slow
@pytest.mark.parametrize("change", ["date", "setting", "build", "processor"])
def test_it_is_tried_again_where_something_is_different(
    change: str, two_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plant(tmp_path, monkeypatch, "pass")
    models = tmp_path / "models.toml"
    models.write_text(two_models.read_text())
    load(models).close()
    if change == "date":
        path = load(models, check=False).members[0].weights.path
        os.utime(path, ns=(1, 1 + path.stat().st_mtime_ns))
    elif change == "setting":
        models.write_text(models.read_text().replace("n_ctx = 512", "n_ctx = 256", 1))
    else:
        monkeypatch.setattr(trial, f"{change}_identity", lambda: "another")
    load(models).close()
    assert len(runs.read_text()) == (3 if change in ("date", "setting") else 4)


def test_what_extra_buffers_kill_runs_without_them(
    two_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, told = plant(tmp_path, monkeypatch, DIES_WITH_BUFFERS.format("SIGSEGV")), extra_buffers(monkeypatch)
    monkeypatch.setattr(trial, "processor_features", lambda: {"amx_tile"})
    for _ in range(2):  # the second time, it is known
        with load(two_models) as ensemble:
            assert len(ensemble.notices) >= 2
            assert "bpe_a: llama.cpp ends the process (SIGSEGV) where it packs these weights" in ensemble.notices[0]
            assert 'CFLAGS="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"' in ensemble.notices[0]
    assert runs.read_text() == "xxx" * 2  # twice with them, once without
    assert told == [False] * 4


def test_no_advice_on_a_unit_that_the_processor_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "processor_features", lambda: {"avx2"})
    assert "amx" not in trial._without_extra_buffers("SIGSEGV")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (DIES.format("SIGSEGV"), "SIGSEGV"),
        (DIES.format("SIGILL"), "SIGILL, an instruction that this processor does not have; build it here: pip install"),
        (ASSERTS, r"SIGABRT: ggml.c:1910: GGML_ASSERT\(ne > 0\) failed"),
    ],
)
def test_what_dies_either_way_is_one_line(
    fault: str, reason: str, two_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plant(tmp_path, monkeypatch, fault)
    with pytest.raises(
        CrashError, match=rf'member "bpe_a": .*bpe_a.gguf: llama.cpp ends the process with it: {reason}'
    ):
        load(two_models)
    assert runs.read_text() == "xxx"
    assert not (cache_folder() / "tried.json").exists()


def elsewhere(tiny: dict[str, Path], tmp_path: Path, port: int) -> Path:
    """A models.toml of one member, at a port of this machine where nobody listens."""
    models, vocabulary = tmp_path / "elsewhere.toml", tmp_path / "vocabulary.gguf"
    if not vocabulary.exists():
        vocabulary.write_bytes(read_header(tiny["bpe_a"]).data)
    lines = ["[[members]]", 'name = "m"', f'path = "{vocabulary.name}"', f'url = "http://127.0.0.1:{port}"']
    models.write_text("\n".join(lines))
    return models


def test_the_vocabulary_of_a_member_elsewhere_is_tried_too(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch, ASSERTS)
    with pytest.raises(CrashError, match=r'member "m": .*vocabulary.gguf: llama.cpp ends the process with it: SIGABRT'):
        load(elsewhere(tiny, tmp_path, 1))


def test_a_vocabulary_is_tried_once_wherever_the_member_is(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plant(tmp_path, monkeypatch, "assert settings.vocab_only")
    for port in (1, 2):
        with pytest.raises(LoadError, match=f"http://127.0.0.1:{port}"):
            load(elsewhere(tiny, tmp_path, port))
    assert runs.read_text() == "x"


@pytest.mark.slow
def test_a_child_that_hangs_is_given_up(two_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(trial, "_LEAST_SECONDS", 1.0)
    with pytest.raises(
        CrashError, match=r"bpe_a.gguf: its first prompt and evaluation did not end within 1 s; --no-check"
    ):
        load(two_models)


@pytest.mark.slow
def test_a_template_without_end_is_refused_where_it_is_asked(two_models: Path, tmp_path: Path) -> None:
    (tmp_path / "endless.jinja").write_text(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ messages }}"
    )
    models = tmp_path / "models.toml"
    models.write_text(two_models.read_text().replace("n_ctx", 'chat_template = "./endless.jinja"\nn_ctx', 1))
    with load(models) as ensemble, pytest.raises(InputError, match=r"it does not come to an end$"):
        ensemble.generate("Hi")


@pytest.mark.slow
def test_what_is_wrong_with_a_file_is_said_as_without_a_trial(
    two_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    models = tmp_path / "models.toml"
    models.write_text(f'[[members]]\nname = "broken"\npath = "{broken}"\n')
    with pytest.raises(LoadError, match="cannot be loaded") as without:
        load(models, check=False)
    with pytest.raises(LoadError) as tried:
        load(models, check=True)
    assert str(tried.value) == str(without.value)


@pytest.mark.slow
def test_a_memory_that_cannot_be_read_or_written(
    two_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plant(tmp_path, monkeypatch, "pass")
    (tmp_path / "cache" / "me-local").mkdir(parents=True)
    for content in (b"\xff", b"[1]", b"{"):
        (cache_folder() / "tried.json").write_bytes(content)
        load(two_models).close()
    assert len(runs.read_text()) == 6
    assert len(json.loads((cache_folder() / "tried.json").read_text())) == 2
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    load(two_models).close()
    assert len(runs.read_text()) == 8


def test_without_another_process_it_goes_on(two_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "run", refuse)
    with load(two_models, check=True) as ensemble:
        assert ensemble.names == ("bpe_a", "spm")


@pytest.mark.slow
@pytest.mark.parametrize(("options", "variable"), [(["--no-check"], None), ([], "1")])
def test_the_command_line_leaves_it_out(
    options: list[str], variable: str | None, two_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plant(tmp_path, monkeypatch, DIES.format("SIGSEGV"))
    if variable:
        monkeypatch.setenv(VARIABLE, variable)
    folders = os.pathsep.join(folder for folder in sys.path if folder and not folder.startswith(str(tmp_path)))
    command = [sys.executable, "-c", "from me_local.cli import main; main()", "generate", "--models", str(two_models)]
    command += ["--max-tokens", "2", "--seed", "1", *options, "Hi"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONPATH": folders}, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert runs.read_text() == ""


def test_the_command_line_says_it_in_one_line(
    two_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch, DIES.format("SIGBUS"))
    # Only the child has the fault: this command's own process must not need it to die.
    program = (
        "import me_local.llama.trial, sys; sys.path.insert(0, sys.argv.pop(1)); from me_local.cli import main; main()"
    )
    folders = os.pathsep.join(folder for folder in sys.path if folder and not folder.startswith(str(tmp_path)))
    command = [sys.executable, "-c", program, str(tmp_path / "site"), "chat", "--models", str(two_models)]
    done = subprocess.run(
        command, cwd=ROOT, input=b"Hi\n", capture_output=True, env=os.environ | {"PYTHONPATH": folders}, timeout=60
    )
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.decode().count("\n") == 1
    assert "bpe_a.gguf: llama.cpp ends the process with it: SIGBUS" in done.stderr.decode()


def test_signals_have_names() -> None:
    assert trial._ending(-signal.SIGSEGV, "") == "SIGSEGV"
    said = "terminate called after throwing an instance of 'std::out_of_range'\n  what():  vector::_M_range_check\n"
    assert trial._ending(-signal.SIGABRT, said) == "SIGABRT: what():  vector::_M_range_check"


@pytest.mark.slow
@pytest.mark.parametrize("fault", [DIES.format("SIGKILL"), DIES.format("SIGTERM"), "os._exit(7)", "1 / 0"])
def test_what_says_nothing_of_the_file_is_not_believed(
    fault: str, two_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch, fault)
    told = extra_buffers(monkeypatch)
    with load(two_models) as ensemble:
        assert not any("llama.cpp" in notice for notice in ensemble.notices)
    assert told == [True] * 2
    assert not (cache_folder() / "tried.json").exists()


@pytest.mark.slow
def test_what_happens_once_is_not_believed(two_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = f"os.path.getsize({str(tmp_path / 'runs')!r}) == 1 and {DIES.format('SIGSEGV')}"
    runs, told = plant(tmp_path, monkeypatch, once), extra_buffers(monkeypatch)
    load(two_models).close()
    assert runs.read_text() == "xxx"
    assert told == [True] * 2


@pytest.mark.parametrize("executable", ["/bin/false", "/bin/cat", "/nowhere", "", None])
def test_a_python_that_cannot_be_started(
    executable: str | None, two_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nowhere"), ""])
    load(two_models, check=True).close()


@pytest.mark.slow
def test_a_memory_that_somebody_else_wrote(two_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(two_models).close()
    path = cache_folder() / "tried.json"
    keys = list(json.loads(path.read_text()))
    for poison in ("do this: \x1b[2J", "SIGSEGV\nrun this", "SIGSEGV \u202e", 5, None):
        path.write_text(json.dumps(dict.fromkeys(keys, poison)))
        with load(two_models) as ensemble:
            assert not any("packs these weights" in notice for notice in ensemble.notices)
    path.write_text("[" * 200_000)
    load(two_models).close()


def test_it_is_tried_again_where_another_file_of_it_is_different(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    config = MemberConfig(name="m", path=tiny["bpe_a"], chat_template=str(template))
    before = trial._key(config)
    assert trial._key(replace(config, name="other", weight=0.5)) == before
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    assert trial._key(config) != before
    split = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in split:
        part.write_bytes(b"GGUF")
    before = trial._key(MemberConfig(name="m", path=split[0]))
    split[1].write_bytes(b"GGUF!")
    assert trial._key(MemberConfig(name="m", path=split[0])) != before


@pytest.mark.parametrize(
    ("value", "wanted"), [("", True), ("0", True), ("false", True), ("no", True), ("1", False), ("yes", False)]
)
def test_the_variable(value: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert trial.is_wanted(None) is wanted
    assert trial.is_wanted(True)
    assert not trial.is_wanted(False)


@pytest.mark.slow
def test_a_child_ends_also_where_nobody_waits_for_it(tiny: dict[str, Path]) -> None:
    member = trial._CONFIG.dump_python(MemberConfig(name="m", path=tiny["bpe_a"]), mode="json")
    entry = json.dumps({"extra_buffers": True, "member": member, "seconds": 1})
    program = "import time; from me_local.llama import trial as t; t._use = lambda *a, **k: time.sleep(60); t._main()"
    folders = os.pathsep.join(folder for folder in sys.path if folder)
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=entry.encode(),
        env=os.environ | {"PYTHONPATH": folders},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGALRM
    assert done.stdout == b"begun\n"


@pytest.mark.parametrize("key", ["chat_template", "tokenizer"])
def test_a_device_is_not_read(key: str, two_models: Path, tmp_path: Path) -> None:
    models = tmp_path / "models.toml"
    models.write_text(two_models.read_text().replace("n_ctx", f'{key} = "/dev/zero"\nn_ctx', 1))
    with pytest.raises(MeLocalError, match="/dev/zero: not a regular file"):
        load(models, check=False)
