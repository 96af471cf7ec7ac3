"""How much of its prediction a member loses here: control tokens, which have no bytes and so are never sampled.

Models that think, or write in channels, begin a reply with such a token. The rest of their distribution then says what
they would otherwise hardly ever say. Knows nothing of llama.cpp or of replies.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from me_local.errors import InputError
from me_local.model import LoadedModel, Shortlist
from me_local.text.messages import Message
from me_local.text.prompts import PromptWriter
from me_local.text.vocabulary import Vocabulary

WORTH_TELLING = 0.05


@dataclass(frozen=True, slots=True)
class Loss:
    """The probability of all control tokens in one prediction, at temperature 1, and the likeliest one's name."""

    share: float = 0.0
    token: str = ""

    @property
    def matters(self) -> bool:
        """Whether a user should know."""
        return self.share >= WORTH_TELLING

    def notice(self, name: str) -> str:
        """A remark on the member of this name, in a line."""
        return (
            f"{name}: {self.share:.0%} of what it predicts are control tokens, first of all {self.token}, which it "
            "cannot write here: it goes on with what is left, and may answer worse than by itself"
        )


def measure(logits: npt.NDArray[np.float32], vocabulary: Vocabulary) -> Loss:
    """What is lost of a prediction, from all its logits, float32 (vocabulary,)."""
    written = vocabulary.written.values()
    lost = sorted(set(vocabulary.control.values()) - {*vocabulary.end_ids, *vocabulary.removed, *written})
    highest = float(logits.max())
    if not lost or not np.isfinite(highest):
        return Loss()
    weights = np.exp(logits.astype(np.float64) - highest)
    of_lost = weights[lost]
    return Loss(float(of_lost.sum() / weights.sum()), vocabulary.text_of(lost[int(of_lost.argmax())]))


def first_loss(member: LoadedModel, writer: PromptWriter) -> Loss:
    """What is lost of a member's first prediction in the reply to a short message, which is evaluated and forgotten.

    Nothing is known where its template refuses the message. Raises RunError when llama.cpp fails.
    """
    try:
        prompt = writer.prompt([Message("user", "Hello")])[-member.n_ctx :]
    except InputError:
        return Loss()
    member.sync(prompt)
    row = member.logits()
    loss = Loss() if isinstance(row, Shortlist) else measure(row, member.vocabulary)
    member.forget()
    return loss
