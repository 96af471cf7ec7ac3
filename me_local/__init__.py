"""me-local: one better answer from several local language models.

    import me_local
    with me_local.load("models.toml") as ensemble:
        print(ensemble.generate("What is the capital of France?").text)

`ensemble.stream(...)` yields a `Step` for each piece, `Chat(ensemble)` holds a conversation, and `ensemble.score(...)`
says how probable a text is.
"""

import os

# libgomp's threads spin while they wait for each other: beside another busy process that takes the cores from those
# that work. The number of turns is read when llama_cpp is imported; what the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from me_local.chat import Chat, Turn
from me_local.config import Config, MemberConfig, Overrides, Sampling, load_config
from me_local.decoding.likelihoods import Score
from me_local.decoding.reply import MemberUsage, Reply, ReplyStream, Step
from me_local.ensemble import Ensemble, load
from me_local.errors import ConfigError, InputError, LoadError, MeLocalError, RunError
from me_local.text.messages import Message

__all__ = [
    "Chat",
    "Config",
    "ConfigError",
    "Ensemble",
    "InputError",
    "LoadError",
    "MeLocalError",
    "MemberConfig",
    "MemberUsage",
    "Message",
    "Overrides",
    "Reply",
    "ReplyStream",
    "RunError",
    "Sampling",
    "Score",
    "Step",
    "Turn",
    "load",
    "load_config",
]
