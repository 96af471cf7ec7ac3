"""From a configuration to members that are loaded, here or elsewhere, and what is made of their vocabularies."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from me_local.config import Config, MemberConfig
from me_local.engines.remote import RemoteModel
from me_local.errors import ConfigError
from me_local.llama.foresight import GUESS
from me_local.llama.member import Member
from me_local.llama.options import require_options
from me_local.llama.trial import is_wanted, try_members
from me_local.llama.weights import Shelf, VocabularyFile, Weights, supports_gpu
from me_local.model import LoadedModel
from me_local.system.inflight import uninterrupted
from me_local.text.prompts import PromptWriter
from me_local.text.templates import PLAIN_STOPS, Template, choose_template
from me_local.text.thoughts import KINDS
from me_local.text.unified import UnifiedVocabulary

Doing = Literal["checking", "loading"]
OnLoad = Callable[[MemberConfig, Doing], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The members, the writers of their prompts and their unified vocabulary.

    `plain` says which of them see a plain transcript; `notices` are one-line remarks for the user, `template_notices`
    those on how members see a conversation.
    """

    members: tuple[LoadedModel, ...]
    writers: tuple[PromptWriter, ...]
    unified: UnifiedVocabulary
    plain: tuple[bool, ...]
    notices: list[str]
    template_notices: list[str]


def load_members(
    config: Config, shelf: Shelf, stack: ExitStack, on_load: OnLoad, batch: int, *, check: bool | None
) -> Loaded:
    """Load all members for `batch` replies at once; `stack` closes them. Raises ConfigError and LoadError.

    Files that are used for the first time are tried before (`trial`), as `check` has it. Contexts are made in a thread
    beside this one, which reads the next file and the vocabularies meanwhile.
    """

    def make(member: MemberConfig, file: VocabularyFile) -> LoadedModel:
        made = (
            Member(member, file, outputs=GUESS + 1, sequences=batch)
            if isinstance(file, Weights)
            else RemoteModel(member, file, places=batch)
        )
        stack.callback(made.close)
        return made

    def opened(member: MemberConfig) -> VocabularyFile:
        if member.url is None:
            return shelf.weights(member)
        file = VocabularyFile(member)
        stack.callback(file.close)
        return file

    for member in config.members:
        require_options(member, config.place)
    found = try_members(config.members, shelf, lambda m: on_load(m, "checking")) if is_wanted(check) else []
    making: list[Future[LoadedModel]] = []
    files: list[VocabularyFile] = []
    try:
        with ThreadPoolExecutor(1) as beside:
            for member in config.members:
                on_load(member, "loading")
                files.append(opened(member))
                making.append(beside.submit(make, member, files[-1]))
            writers = [prompt_writer(config, *pair) for pair in zip(config.members, files, strict=True)]
            unified = UnifiedVocabulary([file.vocabulary for file in files])
    finally:
        uninterrupted(lambda: wait(making))  # also where Ctrl-C ended the wait above: `stack` is about to be unwound
    return put_together([future.result() for future in making], files, writers, unified, found)


def put_together(
    members: Sequence[LoadedModel],
    files: Sequence[VocabularyFile],
    writers: Sequence[tuple[PromptWriter, Template]],
    unified: UnifiedVocabulary,
    found: list[str],
) -> Loaded:
    """What is loaded, with what there is to say of it besides what was `found` before."""
    templates = [template for _, template in writers]
    plain = tuple(template.plain for template in templates)
    notices = found + [notice for pair in zip(members, files, strict=True) for notice in _notices(*pair)]
    of_templates = [notice for pair in zip(members, templates, strict=True) for notice in _template_notices(*pair)]
    return Loaded(tuple(members), tuple(writer for writer, _ in writers), unified, plain, notices, of_templates)


def prompt_writer(config: Config, member: MemberConfig, weights: VocabularyFile) -> tuple[PromptWriter, Template]:
    """What writes the member's prompts, and the template it does so by."""
    try:
        template = choose_template(member.chat_template, weights.chat_template, weights.token_texts)
    except ConfigError as error:
        raise ConfigError(f'{config.place}member "{member.name}": {error}') from None
    kinds = [kind for kind in KINDS if kind.stands_in(template.source, weights.vocabulary.control)]
    return PromptWriter(weights.vocabulary, template.render, kinds), template


def _notices(member: LoadedModel, file: VocabularyFile) -> Iterator[str]:
    config = member.config
    if file.warnings:
        yield f"{member.name}: llama.cpp warns of its vocabulary: {'; '.join(file.warnings)}"
    if not member.local:
        return
    if member.n_ctx < config.n_ctx:
        yield f"{member.name}: its context ends at {member.n_ctx} tokens, as it was trained"
    if config.n_gpu_layers > 0 and not supports_gpu():
        yield f"{member.name}: this build of llama.cpp has no GPU support, so it runs on the CPU"


def _template_notices(member: LoadedModel, template: Template) -> Iterator[str]:
    yield from (f"{member.name}: {remark}" for remark in template.remarks)
    if template.plain and member.config.chat_template is None:
        yield (
            f"{member.name}: it has no chat template, so it sees a plain transcript; "
            f'"{PLAIN_STOPS[0].strip()}" at the start of a line ends a reply'
        )
