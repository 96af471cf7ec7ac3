"""me-local: one better answer from several local language models.

    import me_local
    with me_local.load("models.toml") as ensemble:
        print(ensemble.generate("What is the capital of France?").text)

`ensemble.stream(...)` yields a `Step` for each piece, `Chat(ensemble)` holds a conversation, and `ensemble.score(...)`
says how probable a text is.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from me_local.chat import Chat, Turn
    from me_local.config import Config, Constraint, MemberConfig, Overrides, load_config
    from me_local.decoding.likelihoods import Score
    from me_local.decoding.reply import MemberUsage, Reply, ReplyStream, Step
    from me_local.ensemble import Ensemble, load
    from me_local.errors import ConfigError, InputError, LoadError, MeLocalError, RunError
    from me_local.sampling import Bias, Sampling
    from me_local.text.messages import Message

# libgomp's threads spin while they wait for each other: beside another busy process that takes the cores from those
# that work. The number of turns is read when llama_cpp is imported; what the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = [
    "Bias",
    "Chat",
    "Config",
    "ConfigError",
    "Constraint",
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

_HOMES = {
    "me_local.chat": ("Chat", "Turn"),
    "me_local.config": ("Config", "Constraint", "MemberConfig", "Overrides", "load_config"),
    "me_local.decoding.likelihoods": ("Score",),
    "me_local.decoding.reply": ("MemberUsage", "Reply", "ReplyStream", "Step"),
    "me_local.ensemble": ("Ensemble", "load"),
    "me_local.errors": ("ConfigError", "InputError", "LoadError", "MeLocalError", "RunError"),
    "me_local.sampling": ("Bias", "Sampling"),
    "me_local.text.messages": ("Message",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:  # which would take any name for one of these

    def __getattr__(name: str) -> Any:
        """Import a name when it is first used: all of them take a third of a second, and a program may need none."""
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
