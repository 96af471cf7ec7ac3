"""Replies that are written in turn, a few pieces of each, so that the ups and downs of a machine cancel out."""

from collections.abc import Sequence
from itertools import islice

from me_local.decoding.reply import Reply, ReplyStream

TURN = 8
"""Pieces of one reply before the next goes on."""


def write_in_turn(streams: Sequence[ReplyStream]) -> list[Reply]:
    """The whole replies. Raises what the streams raise."""
    going = list(streams)
    while going:
        going = [stream for stream in going if len(list(islice(stream, TURN))) == TURN]
    return [stream.reply for stream in streams]


def generation_seconds(replies: Sequence[Reply]) -> float:
    """What they took, their prompts left out."""
    return sum(reply.seconds - reply.prompt_seconds for reply in replies)
