"""What members would write and cannot, against figures worked out by hand, and how it is told."""

import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from make_tiny_models import CHATML, write_model
from processes import running
from tiny_architectures import CONSTANT, llama_model
from tiny_vocabularies import chatml_vocab, control

from me_local import Message, Overrides, load
from me_local.cli.program import main
from me_local.decoding.losses import Loss, first_loss, measure


class Words:
    """A vocabulary of six tokens: the last three are control tokens, of which one ends a reply, one is removed."""

    control = {"[CALL]": 3, "</s>": 4, "<never>": 5}  # noqa: RUF012
    end_ids = (4,)
    written = {}  # noqa: RUF012
    removed = (5,)

    def text_of(self, token: int) -> str:
        return {token: name for name, token in self.control.items()}[token]


def test_the_share_of_control_tokens() -> None:
    logits = np.log(np.array([1, 2, 3, 10, 3, 1], dtype=np.float32))
    loss = measure(logits, Words())  # type: ignore[arg-type]
    assert loss.share == pytest.approx(0.5)
    assert loss.token == "[CALL]"
    assert loss.matters
    assert "50% of what it predicts" in loss.notice("m")
    assert not Loss(0.049, "[CALL]").matters


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_left_to_others(bad: float) -> None:
    logits = np.zeros(6, dtype=np.float32)
    logits[1] = bad
    assert measure(logits, Words()) == Loss()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models.toml of one member that all but always begins with [CALL]."""
    folder = tmp_path_factory.mktemp("calling")
    vocab = chatml_vocab()
    vocab.tokens.extend(control("[CALL]", "[/CALL]"))
    model = llama_model(vocab, 1)
    output = model.tensors["output.weight"]
    output[[token.text for token in vocab.tokens].index("[CALL]"), CONSTANT] = output[:, CONSTANT].max() + 4.0
    write_model(folder / "calling.gguf", vocab=vocab, model=model, chat_template=CHATML)
    models = folder / "models.toml"
    models.write_text('[[members]]\nname = "m"\npath = "calling.gguf"\nn_ctx = 512\nn_threads = 1\n')
    return models


@pytest.mark.parametrize("batch", [1, 2])
def test_the_first_reply_says_it(batch: int, calling: Path) -> None:
    with load(calling, batch=batch) as ensemble:
        assert ensemble.notices == []
        member = ensemble.members[0]
        assert first_loss(member, ensemble.writers[0]).share > 0.99
        list(ensemble.generate_many(["Hi", "Hello"], Overrides(seed=1, max_tokens=2)))
        assert len(ensemble.notices) == 1
        assert ensemble.notices[0].startswith("m: 100% of what it predicts are control tokens, first of all [CALL]")
        member.sync(ensemble.writers[0].prompt([Message("user", "Hi")]))
        logits = np.array(member.logits(), dtype=np.float64)
        share = np.exp(logits - logits.max())
        best = int(share.argmax())
        assert member.vocabulary.text_of(best) == "[CALL]"
        lost = sum(share[token] for name, token in member.vocabulary.control.items() if "CALL" in name)
        assert ensemble.engine.losses[0].share == pytest.approx(lost / share.sum())


@pytest.mark.parametrize(
    ("command", "times"),
    [(["generate", "--max-tokens", "2", "-n", "3", "Hi"], 1), (["chat", "--max-tokens", "2"], 1), (["inspect"], 0)],
)
def test_the_commands_say_it_once(command: list[str], times: int, calling: Path) -> None:
    done = CliRunner().invoke(main, [command[0], "--models", str(calling), *command[1:]], input="Hi\nAgain\n")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("control tokens, first of all [CALL]") == times
    if not times:
        assert "100.0% of its first prediction: control tokens, first of all [CALL]" in done.stdout


@pytest.mark.slow
def test_the_server_says_it_after_the_first_reply(calling: Path) -> None:
    command = (sys.executable, "-m", "me_local", "serve", "--models", str(calling), "--port", "0")
    with running(command) as server:
        url = server.expect(r"at (http://\S+) ", 60)[1]
        body = {"model": "me-local", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        server.expect(r"m: 100% of what it predicts are control tokens, first of all \[CALL\]", 60)


def test_on_a_gpu_it_is_known_before_the_first_reply(calling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies see the largest logits alone there, whatever came before: to measure must not change what they see."""
    monkeypatch.setattr("me_local.llama.member.supports_gpu", lambda: True)
    with load(calling) as ensemble:
        assert ensemble.members[0].on_gpu
        assert any(notice.startswith("m: 100% of what it predicts") for notice in ensemble.notices)
        assert ensemble.members[0].caches[0].length == 0
