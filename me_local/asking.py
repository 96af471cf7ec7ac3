"""What is asked of an ensemble, and each member's prompt for it.

A conversation becomes each member's own by its chat template; a text that is to be completed stands behind what its
vocabulary begins with. Knows nothing of replies.
"""

import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from me_local.arrays import IntArray
from me_local.checks import shown
from me_local.config import Config, Overrides
from me_local.decoding.engine import Engine, Request, needed_logits
from me_local.decoding.guessing import CHEAP, DEAR, Repeats, Source
from me_local.errors import ConfigError, InputError, PromptTooLongError
from me_local.mixture.alignment import sufficient, top_k
from me_local.model import EvaluationInterruptedError, LoadedModel
from me_local.sampling import Sampling
from me_local.text.messages import Message
from me_local.text.prompts import PromptWriter
from me_local.text.templates import PLAIN_STOPS
from me_local.text.thoughts import Kind, Thoughts
from me_local.text.vocabulary import Watch


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text to complete as ids of the vocabulary of all members that may write; they are taken as they are."""

    ids: tuple[int, ...]


Prompt: TypeAlias = str | Tokens | Sequence[Message]

_COUNTED = 1 << 16
"""The tokens of a prompt are counted up to so many more than the context holds."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt, or a conversation, with settings of its own; `top` as in `Ensemble.stream`.

    `echo` says what is told of a text in front of its completion; see `echoes`.
    """

    prompt: Prompt
    overrides: Overrides = field(default_factory=Overrides)
    top: int = 0
    echo: Literal["text", "scores"] | None = None


class Prompts(NamedTuple):
    """Each member's `ids` in front of a reply, int32 (tokens,), and the `head` that the reply begins with.

    `given` bytes of the text that the reply goes on with are among the ids.
    """

    head: bytes
    ids: tuple[IntArray, ...]
    given: int = 0


class Prompter:
    """Makes members' prompts, by their `writers`.

    `plain` says which of them see a plain transcript; `kinds` are the ways in which some of them write thoughts.
    """

    def __init__(self, members: Sequence[LoadedModel], writers: Sequence[PromptWriter], plain: Sequence[bool]) -> None:
        self._members = members
        self._writers = writers
        self.plain = plain
        self.kinds = tuple(dict.fromkeys(kind for writer in writers for kind in writer.kinds))

    def asked(
        self, prompt: Prompt, config: Config, *, raw: bool, interrupted: Callable[[], bool] = lambda: False
    ) -> Prompts:
        """The bytes to go on behind, and each member's ids in front of them. Raises InputError.

        Without `raw` there are such bytes where the assistant has the last word, or a member's template opens a
        thought: the beginning of the reply.
        """
        if raw:
            return self.raw_prompts(prompt, config, interrupted)
        prompts, lengths = self.conversation(prompt, config, interrupted)
        self.check_lengths(lengths, config)
        return prompts

    def conversation(
        self, prompt: Prompt, config: Config, interrupted: Callable[[], bool] = lambda: False
    ) -> tuple[Prompts, list[int]]:
        """The same for a conversation, and how many ids that makes for each member, whether they fit or not."""
        if isinstance(prompt, Tokens):
            raise InputError("ids are completed as they are: they are no conversation")
        messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
        messages, given = parted(messages)
        check_conversation(messages)
        prompts = self.prompts(messages, config, interrupted)
        prompts = prompts._replace(head=given or prompts.head)
        head = prompts.head
        watched = zip(self._members, self._watches(config, interrupted), strict=True)
        heads = [member.vocabulary.encode(head, watch=watch) if head else [] for member, watch in watched]
        return prompts, [len(prompt) + len(ids) for prompt, ids in zip(prompts.ids, heads, strict=True)]

    def prompts(
        self, messages: Sequence[Message], config: Config, interrupted: Callable[[], bool] = lambda: False
    ) -> Prompts:
        """Each member's ids for a conversation, and the thought that all go on with.

        One without a system message opens with the member's own, or else with the ensemble's. Where the template of a
        member opens a thought, the text of all members begins with it: the first such one, of members that write.
        Raises PromptTooLongError only where a prompt is so long that its tokens are not counted; see `check_lengths`.
        """
        opened = [messages] * len(self._members)
        if not any(m.role == "system" for m in messages):
            systems = [member.system or config.system for member in config.members]
            opened = [[Message("system", system), *messages] if system else messages for system in systems]
        arguments = [{**config.template_args, **member.template_args} for member in config.members]
        wanted = zip(self._writers, opened, arguments, self._watches(config, interrupted), strict=True)
        parts = [writer.parted_prompt(turns, given, watch) for writer, turns, given, watch in wanted]
        heads = (head for (_, head), writes in zip(parts, self.writing(config), strict=True) if head and writes)
        return Prompts(next(heads, b""), tuple(ids for ids, _ in parts))

    def raw_prompts(self, prompt: Prompt, config: Config, interrupted: Callable[[], bool] = lambda: False) -> Prompts:
        """The bytes to complete, and each member's ids in front of them."""
        if isinstance(prompt, Tokens):
            return self._prompts_of(prompt, config)
        if not isinstance(prompt, str):
            raise InputError("a raw completion takes a text, not a conversation")
        if not prompt:
            raise InputError("the prompt is empty: there is nothing to complete")
        head = Message("user", prompt).content.encode()
        prompts = tuple(writer.raw_prompt() for writer in self._writers)
        watched = zip(self._members, self._watches(config, interrupted), strict=True)
        heads = [member.vocabulary.encode(head, at_start=True, watch=watch) for member, watch in watched]
        self.check_lengths([len(prompt) + len(ids) for prompt, ids in zip(prompts, heads, strict=True)], config)
        return Prompts(head, prompts)

    def _prompts_of(self, prompt: Tokens, config: Config) -> Prompts:
        """The ids behind what a member's prompt begins with, unless they begin so themselves."""
        writing = self.writing(config)
        vocabularies = [member.vocabulary for member, writes in zip(self._members, writing, strict=True) if writes]
        if any(other.identity != vocabularies[0].identity for other in vocabularies):
            raise InputError("prompt: ids are those of one vocabulary, and the members have several: name one of them")
        if not all(0 <= id_ < vocabularies[0].size for id_ in prompt.ids):
            raise InputError(f"prompt: there are ids from 0 to {vocabularies[0].size - 1}")
        prompts: list[IntArray] = []
        for writer, writes in zip(self._writers, writing, strict=True):
            begins = writer.raw_prompt()
            ids = np.array(prompt.ids if writes else (), dtype=np.int32)
            given = len(begins) > 0 and np.array_equal(ids[: len(begins)], begins)
            prompts.append(ids if given else np.concatenate([begins, ids]))
        self.check_lengths([len(ids) for ids in prompts], config)
        return Prompts(b"", tuple(prompts), len(vocabularies[0].spelled(prompt.ids)))

    def check_lengths(self, lengths: Sequence[int], config: Config) -> None:
        """Raise InputError when a prompt, in tokens, is empty or longer than the context of a member that writes."""
        for member, length, writes in zip(self._members, lengths, self.writing(config), strict=True):
            if writes and length == 0:
                raise InputError(f'the chat template of member "{member.name}" makes an empty prompt of this')
            if writes and length > member.n_ctx:
                raise self._too_long(str(length), member, config)

    def writing(self, config: Config) -> tuple[bool, ...]:
        """Which members may write at all: not those without weight, unless a router may give them some."""
        return tuple(member.weight > 0 or config.router != "constant" for member in config.members)

    def stops(self, config: Config) -> tuple[str, ...]:
        """The stop strings that members with a plain transcript need."""
        plain = any(p and writes for p, writes in zip(self.plain, self.writing(config), strict=True))
        return PLAIN_STOPS if plain else ()

    def _watches(self, config: Config, interrupted: Callable[[], bool]) -> list[Watch]:
        """What ends the tokenising of a prompt: that it is `interrupted`, or far too long for a member that writes."""

        def watch(member: LoadedModel, writes: bool, count: int) -> None:
            if interrupted():
                raise EvaluationInterruptedError("stopped while the prompt was tokenised")
            if writes and count > member.n_ctx + _COUNTED:
                raise self._too_long(f"more than {member.n_ctx + _COUNTED}", member, config)

        pairs = zip(self._members, self.writing(config), strict=True)
        return [partial(watch, member, writes) for member, writes in pairs]

    def _too_long(self, length: str, member: LoadedModel, config: Config) -> PromptTooLongError:
        remedy = (
            f"raise n_ctx in {config.path.name}"
            if config.path
            else "give it a larger n_ctx, in a models.toml or as its Llama is made"
        )
        return PromptTooLongError(
            f'the prompt has {length} tokens for member "{member.name}", which exceeds the available context size of '
            f"{member.n_ctx}: shorten it, or {remedy}"
        )


def parted(messages: Sequence[Message]) -> tuple[list[Message], bytes]:
    """What is to be answered, and the beginning of the answer, where the assistant has the last word.

    Raises InputError for one with a thought, as members have marks of their own for it.
    """
    if messages and isinstance(messages[-1], Message) and messages[-1].role == "assistant":
        if messages[-1].thought:
            raise InputError("a reply that is to be gone on with cannot have a thought; leave it out")
        return list(messages[:-1]), messages[-1].content.encode()
    return list(messages), b""


def visible(prompt: Prompt, *, raw: bool) -> bytes:
    """What all members see of a prompt in front of the reply, without what their templates put around it.

    A text that is to be completed stands in the reply itself.
    """
    if raw or isinstance(prompt, Tokens):
        return b""
    messages = parted([Message("user", prompt)] if isinstance(prompt, str) else list(prompt))[0]
    return "\n".join(message.content for message in messages).encode()


def make_request(
    config: Config,
    prompts: Prompts,
    kinds: Sequence[Kind] = (),
    *,
    alone: bool = False,
    top: int = 0,
    prefill: bool = False,
) -> Request:
    """What the engine makes a reply from, as the configuration has it; a seed is drawn where it has none.

    `kinds` are those of the thoughts that a reply may begin with.
    """
    return Request(
        prompts=prompts.ids,
        weights=np.array([member.weight for member in config.members]),
        sampling=tuple(member.sampling for member in config.members),
        strategy=config.strategy,
        argmax=config.decode == "argmax",
        seed=secrets.randbits(32) if config.seed is None else config.seed,
        head=prompts.head,
        given=prompts.given,
        closing=Thoughts(kinds, prompts.head.decode()).closing.encode(),
        alone=alone,
        parallel=config.parallel,
        unit=config.unit,
        top=top,
        constraint=config.constraint,
        prefill=prefill,
        min_tokens=least_pieces(config),
    )


def least_pieces(config: Config) -> int:
    """Before so many pieces the end of generation does not come."""
    return sys.maxsize if config.ignore_eos else config.min_tokens


def check_conversation(messages: Sequence[Message]) -> None:
    """Raise InputError for a conversation that cannot be answered."""
    if not all(isinstance(m, Message) for m in messages):
        raise InputError("a conversation is a text or a sequence of me_local.Message")
    if not any(m.role == "user" for m in messages):
        raise InputError("the conversation has no user message")
    if messages[-1].role != "user":
        raise InputError(f"the conversation ends with the {messages[-1].role}, not with a user message to answer")
    if not messages[-1].content.strip():
        raise InputError("the prompt is empty")


def require_able(engine: Engine, members: Sequence[LoadedModel], config: Config) -> None:
    """Raise ConfigError for what is asked and the engine of a member, or a vocabulary, cannot do."""
    _require_biases(engine, config)
    _require_drafter(members, config)
    for i, (member, settings) in enumerate(zip(members, config.members, strict=True)):
        sampling, most = settings.sampling, member.abilities.most_logits
        lowered = engine.shaper(i, sampling, least_pieces(config)).lowered
        needed = needed_logits(engine.alignment, config.strategy, config.unit, sampling, config.constraint, lowered)
        if not member.abilities.raw_logits and sampling.repeat_penalty != 1 and sampling.repeat_last_n != 0:
            raise ConfigError(
                f'member "{member.name}": repeat_penalty = {sampling.repeat_penalty:g} needs logits, and its engine '
                f"({member.abilities.engine}) gives probabilities: presence_penalty and dry_multiplier work with these"
            )
        if most is not None and not 0 < needed <= most:
            raise ConfigError(
                f'member "{member.name}": {_needing(engine, config, sampling, lowered)} needs {needed or "all"} '
                f"logits, and its engine ({member.abilities.engine}) gives the {most} largest"
            )


def guesses(members: Sequence[LoadedModel], config: Config, seen: bytes) -> Source | int | None:
    """What guesses how a reply to prompts that show these bytes goes on: a source, or the member that writes ahead.

    With no `draft`, texts may repeat, unless logits would have to leave a GPU for it or nobody can evaluate guesses.
    """
    if (drafter := _drafter(members, config)) is not None:
        return drafter
    able = [member.foreseeing for member in members if member.foreseeing]
    picking = [each.picks for each in able]
    if config.draft == "none" or (config.draft is None and (not able or any(picking))):
        return None
    return Repeats(seen, CHEAP if all(picking) else DEAR)


def _drafter(members: Sequence[LoadedModel], config: Config) -> int | None:
    """The member that writes ahead, if one does."""
    names = [member.name for member in members]
    return names.index(config.draft) if config.draft not in (None, "none", "ngram") else None


def _require_drafter(members: Sequence[LoadedModel], config: Config) -> None:
    drafter = _drafter(members, config)
    if drafter is not None and members[drafter].foreseeing is None:
        raise ConfigError(
            f'draft: member "{config.draft}" cannot write ahead: it runs elsewhere, or its memory cannot be cut back'
        )


def _require_biases(engine: Engine, config: Config) -> None:
    """Raise ConfigError for a bias that says nothing to any member, or by an id of nobody knows whom."""
    biases = dict.fromkeys(bias for member in config.members for bias in member.sampling.logit_bias)
    alone = config.router == "constant" and sum(member.weight > 0 for member in config.members) == 1
    for bias in biases:
        if isinstance(bias.of, int) and bias.member is None and not (engine.unified.same or alone):
            raise ConfigError(
                f"logit_bias: the members have different vocabularies, so nobody knows whose token {bias.of} is: "
                "write its text, or ask one member alone"
            )
        for model, settings in zip(engine.models, config.members, strict=True):
            meant = bias.member == model.name or (bias.member is None and (settings.weight > 0 or not alone))
            if isinstance(bias.of, int) and meant and bias.of >= (size := model.vocabulary.size):
                raise ConfigError(f'logit_bias: member "{model.name}" has no token {bias.of}: it has {size} of them')
    for bias in biases:
        if isinstance(bias.of, str) and not any(bias.of.encode() in m.vocabulary.ids_of for m in engine.models):
            raise ConfigError(f"logit_bias: {shown(bias.of)} is a token of no member; try it with a space in front")


def _needing(engine: Engine, config: Config, sampling: Sampling, lowered: int | None) -> str:
    """By what so many logits are needed."""
    if config.constraint:
        return config.constraint.kind
    if engine.alignment is not top_k:
        return f'alignment = "{config.alignment}"'
    if config.strategy == "union":
        return f'strategy = "{config.strategy}"'
    if config.unit == "word":
        return f'unit = "{config.unit}"'
    if not sufficient(sampling) and sampling.top_n_sigma > 0:
        return f"top_n_sigma = {sampling.top_n_sigma:g}"
    if lowered is None:
        return "what makes tokens likelier (a negative penalty, a bias above 0)"
    return f"top_k = {sampling.top_k}" + (f" with penalties, biases or DRY on {lowered} tokens" if lowered else "")
