"""``Tokenizer``: text <-> token ids, chat templates, and text that grows as tokens arrive.

A thin layer over transformers' tokenizers. It knows nothing of requests; stop strings are found by
the HTTP side in the text that ``DetokenizeStream`` gives out.
"""

import codecs
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import transformers
from platformdirs import user_cache_dir
from tokenizers.decoders import ByteLevel
from tokenizers.pre_tokenizers import Digits
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shoal.server.errors import InvalidRequest
from shoal.server.model.config import ModelError
from shoal.server.model.gguf import GGUFFile

logger = logging.getLogger(__name__)

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's fallback for unknown characters
_CONVERSION = 1  # part of the cache key of converted tokenizers; raise it when `_convert` changes


class Tokenizer:
    """The tokenizer of one base model. Nothing here keeps state between calls.

    Attributes:
        vocab_size: ids it knows; a model's logits may be wider (padding).
        bos_token_id: what it writes before a text, when it does.
        eos_token_ids: its own end of sequence; the model's config may name more.
        special_ids: ids that ``skip_special_tokens`` leaves out of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self.vocab_size: int = len(tokenizer)
        self.bos_token_id: int | None = tokenizer.bos_token_id
        eos = tokenizer.eos_token_id
        self.eos_token_ids: frozenset[int] = frozenset() if eos is None else frozenset([eos])
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added: dict[int, str] = {i: token.content for i, token in added.items()}
        self._byte_level = isinstance(self._backend.decoder, ByteLevel)
        # Of the tokens met before; made again by whoever comes first from several threads.
        self._bytes_of: dict[int, bytes] = {}

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Load the tokenizer of a model directory or ``.gguf`` file.

        Raises:
            ModelError: there is none, or it has no fast implementation.
        """
        try:
            loaded = _load_gguf(path) if path.suffix == ".gguf" else _from_pretrained(path)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            raise ModelError(f"{path} has no usable tokenizer: {error}") from error
        if not isinstance(loaded, PreTrainedTokenizerFast):
            raise ModelError(f"{path}: {type(loaded).__name__} is not a fast tokenizer")
        return cls(loaded)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written out in it are recognised."""
        # Not `encode`, which holds the interpreter's lock: a long text would stop every thread.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_options: Any,
    ) -> list[int]:
        """Token ids of a conversation, written by the model's chat template.

        Raises:
            InvalidRequest: the model has no template, or its template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **template_options,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            # A template is the model author's program: whatever it trips over, it is the messages.
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return self.encode(text, add_special_tokens=False)  # the template writes them itself

    def stream(self, skip_special_tokens: bool = True) -> "DetokenizeStream":
        """A decoder for one request's output."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return _ByteStream(self, skipped) if self._byte_level else _TextStream(self, skipped)

    def id_to_bytes(self, token_id: int) -> bytes:
        """The exact bytes one token adds to a text; empty for an id outside the vocabulary."""
        known = self._bytes_of.get(token_id)
        if known is None:
            known = self._read_bytes(token_id)
            if known:  # so that there are at most as many as tokens
                self._bytes_of[token_id] = known
        return known

    def _read_bytes(self, token_id: int) -> bytes:
        piece: str | None = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        if self._byte_level:
            if all(char in _BYTE_OF for char in piece):
                return bytes(_BYTE_OF[char] for char in piece)
            return piece.encode()  # as the decoder does with pieces not spelled in bytes
        byte = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()

    def id_to_text(self, token_id: int) -> str:
        """``id_to_bytes`` as text, for logprobs; a part of a character becomes U+FFFD."""
        return self.id_to_bytes(token_id).decode("utf-8", "replace")

    def has_token(self, token_id: int) -> bool:
        """Whether the vocabulary has a token of this id."""
        return self._backend.id_to_token(token_id) is not None

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one raw byte of a character that others complete."""
        return _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or "") is not None


class DetokenizeStream(Protocol):
    """Turns a growing list of tokens into a growing text.

    What ``push`` and finally ``flush`` return, concatenated, equals ``Tokenizer.decode`` of all
    tokens; no part of it is ever taken back, so a character is held until its last byte is there.
    """

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; return the text that they make final (often all of it, at times none)."""
        ...

    def flush(self) -> str:
        """Return what is still held, at the end of the output."""
        ...


class _ByteStream:
    """For byte-level BPE, where every token is a run of bytes (Llama 3, Qwen, SmolLM2)."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        kept = (self._tokenizer.id_to_bytes(i) for i in ids if i not in self._skipped)
        return self._decoder.decode(b"".join(kept))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _TextStream:
    """For every other decoder, such as SentencePiece's with its ``▁`` and byte fallback.

    A run of byte tokens is final only when it ends, because an invalid byte turns the whole run
    into U+FFFD. Text is decoded behind some tokens that are out already, so that a decoder that
    trims the front of a text trims it once.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        # A decoder leaves out ids that no token has: the bytes on both sides are then one run.
        known = self._tokenizer.has_token
        self._pending.extend(i for i in ids if i not in self._skipped and known(i))
        final = len(self._pending)
        while final and self._tokenizer.is_byte(self._pending[final - 1]):
            final -= 1
        return self._release(final)

    def flush(self) -> str:
        return self._release(len(self._pending))

    def _release(self, count: int) -> str:
        if not count:
            return ""
        released, self._pending = self._pending[:count], self._pending[count:]
        decode = self._tokenizer.decode
        text = decode([*self._context, *released], skip_special_tokens=False)
        fresh = text[len(self._context_text) :]
        alone = decode(released, skip_special_tokens=False)
        if alone:  # tokens without text of their own cannot stand for the front of a text
            self._context, self._context_text = released, alone
        else:
            self._context, self._context_text = [*self._context, *released], text
        return fresh


def _byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE spells bytes with (from GPT-2): char -> byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _from_pretrained(path: Path, **options: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(path, local_files_only=True, **options)


def _load_gguf(path: Path) -> PreTrainedTokenizerFast:
    """A GGUF's tokenizer. Converting one takes seconds, so the result is kept in the cache."""
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {transformers.__version__}"
    name = hashlib.sha256(f"{key} {_CONVERSION}".encode()).hexdigest()[:32]
    cached = Path(user_cache_dir("shoal")) / "tokenizers" / name
    if cached.is_dir():
        return _from_pretrained(cached)
    tokenizer = _convert(path)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=cached.parent, prefix="new-")
        try:
            tokenizer.save_pretrained(scratch)
            if not cached.is_dir():  # else another process was first, which is as good
                os.rename(scratch, cached)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        logger.warning("the converted tokenizer was not cached: %s", error)
    return tokenizer


def _convert(path: Path) -> PreTrainedTokenizerFast:
    tokenizer = _from_pretrained(path.parent, gguf_file=path.name)
    if GGUFFile(path).metadata.get("tokenizer.ggml.pre") == "smollm":
        # transformers' conversion drops SmolLM's first rule, that every digit stands alone:
        # "\n\n1" would become other tokens than those the model was trained on.
        backend = tokenizer.backend_tokenizer
        rules = [Digits(individual_digits=True), backend.pre_tokenizer]
        backend.pre_tokenizer = PreTokenizers(rules)
    return tokenizer
