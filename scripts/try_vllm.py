"""Try a real vLLM on the processor of this machine, with a tiny model that is there in both formats.

Contract: installs vLLM where it is missing (6 GB, kept in the cache), writes a tiny Llama with random weights as a GGUF
file and in Hugging Face's format, serves the second, and compares by plain HTTP what it says with what llama.cpp makes
of the first: ids of a text, the likeliest tokens and their log-probabilities, and the time of a step. Prints a line for
each, and exits with 1 where they disagree. With --keep the server stays until Ctrl-C.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import make_tiny_models
import numpy as np
import tiny_architectures
import vllm_environment
from pip_downloads import FetchError, exit_status
from processes import running
from tiny_vocabularies import Vocab, chatml_vocab
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from me_local.config import MemberConfig
from me_local.llama.header import read_header
from me_local.llama.member import Member
from me_local.llama.weights import VocabularyFile, Weights

# vLLM's attention on processors knows no heads smaller than 32.
SIZES = {"N_EMBD": 128, "N_HEAD": 4, "N_HEAD_KV": 2, "N_FF": 256}
MODEL = "tiny"
TEXT = "Anna stood on the wall, doesn't she? Größe 1,234 ... café 😀\n\n  def f(x):\n\treturn x**2"
SECONDS = 600.0  # until it is up
K = 14


def write_models(folder: Path) -> tuple[Path, Path]:
    """Write one model twice; give the GGUF file, and the folder in Hugging Face's format."""
    vars(tiny_architectures).update(SIZES)
    vocab = chatml_vocab()
    model = tiny_architectures.llama_model(vocab, seed=1)
    head = SIZES["N_EMBD"] // SIZES["N_HEAD"]
    sizes = {"embedding_length": SIZES["N_EMBD"], "feed_forward_length": SIZES["N_FF"], "rope.dimension_count": head}
    model = replace(model, hyper=model.hyper | sizes)
    gguf, hf = folder / f"{MODEL}.gguf", folder / MODEL
    make_tiny_models.write_model(gguf, vocab=vocab, model=model, chat_template=make_tiny_models.CHATML)
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(hf_config(vocab)))
    (hf / "model.safetensors").write_bytes(safetensors(hf_tensors(model.tensors)))
    write_tokenizer(hf, vocab)
    return gguf, hf


def hf_config(vocab: Vocab) -> dict[str, Any]:
    """Give what transformers wants to know of a Llama."""
    texts = [token.text for token in vocab.tokens]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": SIZES["N_EMBD"],
        "intermediate_size": SIZES["N_FF"],
        "num_hidden_layers": tiny_architectures.N_LAYER,
        "num_attention_heads": SIZES["N_HEAD"],
        "num_key_value_heads": SIZES["N_HEAD_KV"],
        "max_position_embeddings": tiny_architectures.N_CTX,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": len(texts),
        "bos_token_id": texts.index(vocab.bos),
        "eos_token_id": texts.index(vocab.eos),
    }


def hf_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give the tensors their names there; the halves of a head are turned by positions, not its pairs."""
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": SIZES["N_HEAD"], "attn_k": SIZES["N_HEAD_KV"]}
    result = {}
    for name, tensor in tensors.items():
        *layer, kind, _ = name.split(".")
        if kind in heads:
            tensor = tensor.reshape(heads[kind], -1, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        result[f"{prefix}{names[kind]}.weight"] = tensor
    return result


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    """Give the file: the length of a JSON object, the object, and the tensors."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        start, data = len(data), data + np.ascontiguousarray(tensor, np.float32).tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def write_tokenizer(folder: Path, vocab: Vocab) -> None:
    """Write GPT-2's kind of tokenizer."""
    ids = {token.text: number for number, token in enumerate(vocab.tokens)}
    merges = [tuple(pair.split(" ")) for pair in vocab.merges]
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [token.text for token in vocab.tokens if not token.piece]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": vocab.bos, "eos_token": vocab.eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": make_tiny_models.CHATML}))


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """Serve a model; the address, once it is up. All its processes end with the block."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    command = [vllm_environment.program(), "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", MODEL, "--max-model-len", "512", "--dtype", "float32", "--enforce-eager"]
    command += ["--enable-prompt-tokens-details"]  # it says what was in its cache
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ours |= settings | {"PATH": f"{vllm_environment.program().parent}{os.pathsep}{os.environ['PATH']}"}
    with running([*command, *options], env=ours, start_new_session=True) as server:
        try:
            server.expect("Application startup complete", SECONDS)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.process.pid, signal.SIGKILL)  # the engine is a process of its own


def compare(url: str, gguf: Path, vocabulary: Path) -> bool:
    """Print what vLLM and llama.cpp say; whether they agree."""
    with httpx.Client(base_url=url, timeout=120) as http:
        served = [model["id"] for model in http.get("/v1/models").json()["data"]]
        print(f"vLLM {http.get('/version').json()['version']} serves {served}")
        with closing(VocabularyFile(MemberConfig(name=MODEL, path=vocabulary))) as file:
            here = file.vocabulary.encode(TEXT.encode())
        asked = {"model": MODEL, "prompt": TEXT, "add_special_tokens": False}
        there = http.post("/tokenize", json=asked).json()["tokens"]
        print(f"ids of a text of {len(TEXT)} characters: {len(here)} here, {len(there)} there, equal: {here == there}")
        far = [difference(http, gguf, here[:length]) for length in range(1, len(here), 5)]
        print(f"log-probabilities of the {K} likeliest after {len(far)} texts: {max(far):.2g} apart at most")
        print(f"a step takes {1000 * step_seconds(http, here):.1f} ms (median of 20)")
        usage = http.post("/v1/completions", json=request(here, K)).json()["usage"]
        print(f"of {len(here)} ids its cache had {usage['prompt_tokens_details']}")
        for k in (20, 21):
            answer = http.post("/v1/completions", json=request(here, k))
            print(f"logprobs = {k}: {answer.status_code} {answer.text[:300] if answer.is_error else ''}")
        return here == there and max(far) < 1e-4


def request(ids: list[int], k: int) -> dict[str, Any]:
    """Give the body that asks for what follows these ids."""
    sampling = {"max_tokens": 1, "logprobs": k, "temperature": 1, "return_tokens_as_token_ids": True}
    return {"model": MODEL, "prompt": ids} | sampling


def difference(http: httpx.Client, gguf: Path, ids: list[int]) -> float:
    """How far the log-probabilities after these ids are apart; infinite where other tokens are the likeliest."""
    answer = http.post("/v1/completions", json=request(ids, K)).raise_for_status().json()
    top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    found = {int(name.removeprefix("token_id:")): value for name, value in top.items()}
    full = {"type_k": "f32", "type_v": "f32"}  # as vLLM keeps them; in 16 bits they are 2e-3 apart
    config = MemberConfig(name=MODEL, path=gguf, n_ctx=512, n_threads=1, **full)
    with closing(Weights(config)) as weights, Member(config, weights) as member:
        member.sync(np.array(ids, np.int32))
        logits = np.asarray(member.logits(), np.float64)
    expected = logits - np.logaddexp.reduce(logits)
    if not {int(number) for number in np.argsort(-expected)[:K]} <= found.keys():
        return float("inf")
    return max(abs(expected[number] - value) for number, value in found.items())


def step_seconds(http: httpx.Client, ids: list[int]) -> float:
    """The median time of a request for the token behind a text that grows by one."""
    seconds = []
    for length in range(len(ids) - 21, len(ids)):
        start = time.perf_counter()
        http.post("/v1/completions", json=request(ids[:length], K)).raise_for_status()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def try_it(python: str | None, *, keep: bool) -> None:
    """Do all of it; raise ``FetchError`` where something is missing, or does not agree."""
    vllm_environment.install(python)
    with tempfile.TemporaryDirectory() as name:
        gguf, hf = write_models(Path(name))
        vocabulary = Path(name) / "vocabulary.gguf"
        vocabulary.write_bytes(read_header(gguf).data)
        start = time.monotonic()
        with serving(hf) as url:
            print(f"up after {time.monotonic() - start:.0f} s")
            agree = compare(url, gguf, vocabulary)
            if keep:
                print(f"{url} model = {gguf}, vocabulary = {vocabulary}; Ctrl-C ends", flush=True)
                signal.pause()
    if not agree:
        raise FetchError("vLLM and llama.cpp do not agree")


def main(arguments: list[str] | None = None) -> int:
    """Try vLLM; give the exit status."""
    parser = argparse.ArgumentParser(description="Try a real vLLM on the processor, with a tiny model.")
    parser.add_argument("--python", help=f"a Python {vllm_environment.PYTHON} to install it for")
    parser.add_argument("--keep", action="store_true", help="leave the server up until Ctrl-C")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell has its background processes ignore the first
        signal.signal(number, signal.default_int_handler)
    return exit_status(lambda: try_it(options.python, keep=options.keep))


if __name__ == "__main__":
    sys.exit(main())
