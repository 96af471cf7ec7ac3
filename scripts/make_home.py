"""Write a home in which Ollama, LM Studio, Hugging Face and llama.cpp have tiny models: for tests, and to try.

Contract: ``make_home(folder)`` writes what lies in ``MODELS`` into the places and the layouts of these programs, and
beside it what is no member: broken files, a projector, an embedding model, a manifest whose blob is missing.
``environment(folder)`` has the variables under which that is one's home.

    python scripts/make_home.py /tmp/home    # prints a line to set the variables
"""

import argparse
import hashlib
import json
import os
import shlex
from pathlib import Path

import gguf
import make_tiny_models
from make_tiny_models import write_model

MODELS = {
    "ollama:tiny:latest": "bpe_a",
    "ollama:tiny:1b": "spm",
    "ollama:somebody/tiny:3": "bpe_b",
    "ollama:hf.co/me/tiny-GGUF:Q4_K_M": "bpe_c",
    "ollama:newer:3b": "swa",
    "lmstudio:me/tiny-GGUF/tiny-Q4_K_M": "bpe_a",
    "lmstudio:me/tiny-GGUF/tiny-Q8_0": "bpe_b",
    "lmstudio:me/split-GGUF/split": "spm",
    "lmstudio:old/tiny/tiny": "bpe_c",
    "hf:me/hub-GGUF:hub-Q4_K_M.gguf": "bpe_a",
    "hf:me/hub-GGUF:Q8_0/hub-Q8_0-00001-of-00002.gguf": "spm",
    "hf:me/flat-GGUF:flat-Q4_0.gguf": "bpe_b",
}
"""What can be a member, by the names that --member takes, and which of the tiny models it is."""
FOLDER = "gguf"
"""The user's own folder, with "own.gguf" (bpe_a) and broken files."""
_COMMIT, _EARLIER = "c" * 40, "0" * 40


def environment(folder: Path) -> dict[str, str]:
    """The variables under which the folder is a home, and nothing of the real one is seen."""
    return {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / ".cache"), "ME_LOCAL_MODEL_DIRS": str(folder / FOLDER)}


def make_home(folder: Path) -> None:
    """Write all of it into the folder."""
    tiny = {name: path.read_bytes() for name, path in make_tiny_models.make_all(folder / ".tiny").items()}
    _ollama(folder / ".ollama" / "models", tiny)
    _lm_studio(folder, tiny)
    _hub(folder / ".cache" / "huggingface" / "hub", tiny)
    flat = folder / ".cache" / "llama.cpp"
    _write(flat / "me_flat-GGUF_flat-Q4_0.gguf", tiny["bpe_b"])
    _write(flat / "manifest=me=flat-GGUF=Q4_0.json", json.dumps({"ggufFile": {"rfilename": "flat-Q4_0.gguf"}}).encode())
    own = folder / FOLDER
    _write(own / "own.gguf", tiny["bpe_a"])
    _write(own / "deep" / "cut off.gguf", tiny["bpe_a"][:-1000])
    _write(own / "page.gguf", b"<!DOCTYPE html>")
    _write(own / "parts-00001-of-00002.gguf", tiny["bpe_b"])
    _other(own / "embedding.gguf", "bert", {"bert.pooling_type": 1}, tokens=True)


def _ollama(models: Path, tiny: dict[str, bytes]) -> None:
    """Manifests as they were until 2026, and one in the list of manifests that came then."""
    host = "registry.ollama.ai"
    for name, model in [(f"{host}/library/tiny/latest", "bpe_a"), (f"{host}/library/tiny/1b", "spm")]:
        _write(models / "manifests" / name, _manifest(models, tiny[model]))
    _write(models / "manifests" / host / "somebody/tiny/3", _manifest(models, tiny["bpe_b"]))
    _write(models / "manifests" / "hf.co/me/tiny-GGUF/Q4_K_M", _manifest(models, tiny["bpe_c"]))
    lost = json.loads(_manifest(models, b"GGUF"))
    lost["layers"][0]["digest"] = "sha256:" + "0" * 64
    _write(models / "manifests" / host / "library/lost/latest", json.dumps(lost).encode())
    _write(models / "manifests" / host / "library/damaged/latest", b'{"layers": ')
    cloud = {"schemaVersion": 2, "layers": [], "config": {}}
    _write(models / "manifests" / host / "library/far/cloud", json.dumps(cloud).encode())
    child = {"mediaType": _MANIFEST, "digest": _blob(models, _manifest(models, tiny["swa"])), "runner": "llamacpp"}
    other = {"mediaType": _MANIFEST, "digest": "sha256:" + "1" * 64, "runner": "mlx"}
    listed = {"schemaVersion": 2, "mediaType": _LIST, "manifests": [other, child]}
    link = models / "manifests-v2" / "ollama.com/library/newer/3b"
    target = models / "blobs" / _blob(models, json.dumps(listed).encode()).replace(":", "-")
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(target, link.parent))


_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_LIST = "application/vnd.ollama.manifest.list.v2+json"


def _manifest(models: Path, data: bytes) -> bytes:
    kinds = {"model": data, "template": b"{{ .Prompt }}", "params": b'{"stop":["<|im_end|>"]}'}
    layers = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": _blob(models, part), "size": len(part)}
        for kind, part in kinds.items()
    ]
    config = b'{"model_format":"gguf","model_family":"llama"}'
    config_layer = {
        "mediaType": "application/vnd.docker.container.image.v1+json",
        "digest": _blob(models, config),
        "size": len(config),
    }
    return json.dumps({"schemaVersion": 2, "mediaType": _MANIFEST, "config": config_layer, "layers": layers}).encode()


def _blob(models: Path, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    _write(models / "blobs" / f"sha256-{digest}", data)
    return f"sha256:{digest}"


def _lm_studio(folder: Path, tiny: dict[str, bytes]) -> None:
    models = folder / ".lmstudio" / "models"
    _write(folder / ".lmstudio-home-pointer", str(folder / ".lmstudio").encode())
    _write(models / "me/tiny-GGUF/tiny-Q4_K_M.gguf", tiny["bpe_a"])
    _write(models / "me/tiny-GGUF/tiny-Q8_0.gguf", tiny["bpe_b"])
    _other(models / "me/tiny-GGUF/mmproj-tiny-f16.gguf", "clip", {}, tokens=False)
    _split(models / "me/split-GGUF/split.gguf", "spm")
    _write(folder / ".cache" / "lm-studio" / "models" / "old/tiny/tiny.gguf", tiny["bpe_c"])


def _hub(hub: Path, tiny: dict[str, bytes]) -> None:
    """Links to blobs; an earlier snapshot has the same file, and one whose blob is gone."""
    repository = hub / "models--me--hub-GGUF"
    _write(repository / "refs" / "main", _COMMIT.encode())
    _split(repository / "split" / "hub-Q8_0.gguf", "spm")
    files = {"hub-Q4_K_M.gguf": tiny["bpe_a"]}
    for part in sorted((repository / "split").iterdir()):
        files[f"Q8_0/{part.name}"] = part.read_bytes()
        part.unlink()
    (repository / "split").rmdir()
    for commit in (_COMMIT, _EARLIER):
        for name, data in files.items():
            _link(repository, repository / "snapshots" / commit / name, hashlib.sha256(data).hexdigest(), data)
    _link(repository, repository / "snapshots" / _EARLIER / "gone.gguf", "0" * 64, None)
    _write(hub / "models--me--other" / "snapshots" / _COMMIT / "config.json", b"{}")


def _link(repository: Path, link: Path, digest: str, data: bytes | None) -> None:
    blob = repository / "blobs" / digest
    if data is not None:
        _write(blob, data)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))


def _split(path: Path, name: str) -> None:
    """A tiny model in two parts, as llama.cpp splits."""
    recipe = make_tiny_models.MODELS[name]
    vocab = recipe.vocab()
    path.parent.mkdir(parents=True, exist_ok=True)
    model = recipe.weights(vocab, recipe.seed)
    write_model(path, vocab=vocab, model=model, split_max_tensors=-(-len(model.tensors) // 2))


def _other(path: Path, architecture: str, values: dict[str, int], *, tokens: bool) -> None:
    """A file that is no language model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        writer.add_uint32(key, value)
    if tokens:
        writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def main() -> None:
    """Write a home into the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Write a home with tiny models in the stores of four programs.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write it")
    folder = parser.parse_args().folder.absolute()
    make_home(folder)
    print("export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in environment(folder).items()))


if __name__ == "__main__":
    main()
