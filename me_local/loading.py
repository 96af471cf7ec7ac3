"""From a configuration to members that are loaded, and what is made of their vocabularies."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass

from me_local.config import Config, MemberConfig
from me_local.errors import ConfigError
from me_local.inflight import uninterrupted
from me_local.member import Member
from me_local.templates import PLAIN_STOPS, PromptWriter, choose_render
from me_local.vocabulary import UnifiedVocabulary
from me_local.weights import Shelf, Weights, supports_gpu

OnLoad = Callable[[MemberConfig], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The members, the writers of their prompts and their unified vocabulary.

    `plain` says which of them see a plain transcript; `notices` are one-line remarks for the user.
    """

    members: tuple[Member, ...]
    writers: tuple[PromptWriter, ...]
    unified: UnifiedVocabulary
    plain: tuple[bool, ...]
    notices: list[str]


def load_members(config: Config, shelf: Shelf, stack: ExitStack, on_load: OnLoad, batch: int) -> Loaded:
    """Load all members for `batch` replies at once; `stack` closes them. Raises ConfigError and LoadError.

    Contexts are made in a thread beside this one, which reads the next file and the vocabularies meanwhile.
    """

    def make(member: MemberConfig, weights: Weights) -> Member:
        return stack.enter_context(Member(member, weights, sequences=batch))

    making: list[Future[Member]] = []
    try:
        with ThreadPoolExecutor(1) as beside:
            for member in config.members:
                on_load(member)
                making.append(beside.submit(make, member, shelf.weights(member)))
            weights = [shelf.weights(member) for member in config.members]
            writers = [_writer(config, *pair) for pair in zip(config.members, weights, strict=True)]
            unified = UnifiedVocabulary([each.vocabulary for each in weights])
    finally:
        uninterrupted(lambda: wait(making))  # also where Ctrl-C ended the wait above: `stack` is about to be unwound
    members = tuple(future.result() for future in making)
    plain = tuple(is_plain for _, is_plain in writers)
    notices = [notice for pair in zip(members, plain, strict=True) for notice in _notices(*pair)]
    return Loaded(members, tuple(writer for writer, _ in writers), unified, plain, notices)


def _writer(config: Config, member: MemberConfig, weights: Weights) -> tuple[PromptWriter, bool]:
    """What writes the member's prompts, and whether they are plain transcripts."""
    try:
        render, plain = choose_render(member.chat_template, weights.chat_template, weights.token_texts)
    except ConfigError as error:
        raise ConfigError(f'{config.path}: member "{member.name}": {error}') from None
    return PromptWriter(weights.vocabulary, render), plain


def _notices(member: Member, plain: bool) -> Iterator[str]:
    config = member.config
    if member.n_ctx < config.n_ctx:
        yield f"{member.name}: its context ends at {member.n_ctx} tokens, as it was trained"
    if config.n_gpu_layers > 0 and not supports_gpu():
        yield f"{member.name}: this build of llama.cpp has no GPU support, so it runs on the CPU"
    if plain and config.chat_template is None:
        yield (
            f"{member.name}: it has no chat template, so it sees a plain transcript; "
            f'"{PLAIN_STOPS[0].strip()}" at the start of a line ends a reply'
        )
