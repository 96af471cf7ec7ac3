"""A reply that fills the context of an engine ends there, as it does here."""

from pathlib import Path

import pytest
import remote

from me_local import load
from me_local.config import Overrides, Strategy
from me_local.llama.header import read_header

ROOM = 6  # tokens


def toml(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["[sampling]", "top_k = 10", "[[members]]", 'name = "m"', *lines]) + "\n")
    return path


@pytest.mark.llama_server
@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_a_full_context_ends_a_reply(tiny: dict[str, Path], tmp_path: Path, strategy: Strategy) -> None:
    vocabulary = tmp_path / "vocabulary.gguf"
    vocabulary.write_bytes(read_header(tiny["bpe_b"]).data)
    here = toml(tmp_path / "here.toml", f'path = "{tiny["bpe_b"]}"', "n_ctx = 256", "n_threads = 1")
    with remote.llama_server(tiny["bpe_b"], "-c", "256") as url:
        there = toml(tmp_path / "there.toml", f'path = "{vocabulary}"', f'url = "{url}"')
        replies = []
        for models, size in ((here, 256), (there, 255)):
            with load(models) as ensemble:
                member = ensemble.members[0]
                assert member.n_ctx == size
                ids = member.vocabulary.encode(b"the harbour was quiet when " * 100)
                prompt = member.vocabulary.joined(ids[: 255 - ROOM]).decode()
                assert len(member.vocabulary.encode(prompt.encode())) == 255 - ROOM
                reply = ensemble.generate(prompt, Overrides(seed=1, max_tokens=100, strategy=strategy), raw=True)
                assert reply.finish_reason == "length"
                assert len(reply.steps) == size - (255 - ROOM) + 1  # one after each context, the full one included
                replies.append([step.piece for step in reply.steps])
    assert replies[0][:-1] == replies[1]
