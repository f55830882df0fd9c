"""Streaming detokenisation equals decoding at once; templates; what logprobs are shown as."""

import random
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from shoal.server.errors import InvalidRequest
from shoal.server.model.config import ModelError
from shoal.server.model.pull import smollm2_path
from shoal.server.model.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>"]
TEXTS = [
    "the quick brown fox jumps over the lazy dog, and then the fox sleeps",
    "hello 👋🏽 world 👨‍👩‍👧‍👦!",
    "你好，世界。今天天气很好",
    "naïve café\n\n  indented\ttext",
    "한국어 ไทย العربية",
    "",
    " leading and trailing ",
]


def wrap(backend: Backend, **options: Any) -> Tokenizer:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options
    )
    return Tokenizer(fast)


@cache
def byte_level() -> Tokenizer:
    """As Llama 3, Qwen and SmolLM2 have it: every token is some bytes."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return wrap(backend)


@cache
def sentence_piece() -> Tokenizer:
    """As Llama 2, Mistral and Gemma have it: ``▁`` for spaces, unknown characters as bytes."""
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "你", "👋"]
    pieces += [chr(c) for c in range(33, 127)] + ["th", "the", "▁the", "▁▁", "lo", "hel", "hello"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁"), ("l", "o"), ("hel", "lo")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrap(backend)


TOKENIZERS = {"byte-level": byte_level, "sentence-piece": sentence_piece}
by_kind = pytest.mark.parametrize("kind", TOKENIZERS)


def streamed(tokenizer: Tokenizer, chunks: Iterable[list[int]], skip: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return [*(stream.push(chunk) for chunk in chunks), stream.flush()]


def chunked(ids: list[int], rng: random.Random) -> list[list[int]]:
    cuts = sorted(rng.choices(range(len(ids) + 1), k=4))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@by_kind
@pytest.mark.parametrize("text", TEXTS)
def test_texts_survive_token_by_token(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = streamed(tokenizer, ([i] for i in ids))
    assert "".join(parts) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in part for part in parts)


@by_kind
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), skip=st.booleans(), length=st.integers(0, 40))
def test_any_tokens_in_any_chunks_stream_to_their_decoded_text(
    kind: str, seed: int, skip: bool, length: int
) -> None:
    """Also broken bytes, specials in the middle of a character, and ids nobody knows."""
    tokenizer = TOKENIZERS[kind]()
    rng = random.Random(seed)
    emoji = tokenizer.encode("👩‍🚀你", add_special_tokens=False)
    ids: list[int] = []
    while len(ids) < length:
        kind_of = rng.randrange(5)
        ids += [rng.randrange(tokenizer.vocab_size + 3)] if kind_of < 3 else emoji
        ids += [rng.randrange(len(SPECIAL))] if kind_of == 4 else []
    parts = streamed(tokenizer, chunked(ids, rng), skip)
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(tokenizer, ([i] for i in ids), skip)) == "".join(parts)


def test_bytes_on_both_sides_of_an_unknown_id_are_one_run() -> None:
    """The decoder leaves the id out, so that an invalid byte behind it spoils those before it."""
    tokenizer = sentence_piece()
    brace, broken = (
        next(i for i in range(tokenizer.vocab_size) if tokenizer.id_to_bytes(i) == byte)
        for byte in (b"}", b"\xe4")
    )
    assert tokenizer.is_byte(brace)
    ids = [brace, tokenizer.vocab_size + 2, broken]
    assert "".join(streamed(tokenizer, ([i] for i in ids))) == tokenizer.decode(ids)


@by_kind
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_text_is_given_out_only_in_whole_characters(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    out = ""
    for part in streamed(tokenizer, ([i] for i in ids), skip=False):
        out += part
        assert whole.startswith(out)
    assert out == whole


def test_a_word_is_given_out_with_its_own_token() -> None:
    tokenizer = sentence_piece()
    ids = tokenizer.encode("the the你the", add_special_tokens=False)
    parts = streamed(tokenizer, ([i] for i in ids))
    assert parts == ["the", " the", "你", "the", ""]


def test_tokens_are_shown_with_their_exact_bytes() -> None:
    bpe, pieces = byte_level(), sentence_piece()
    wave = "👋".encode()
    assert b"".join(map(bpe.id_to_bytes, bpe.encode("é👋 x"))) == "é👋 x".encode()
    ids = pieces.encode("the 👩", add_special_tokens=False)
    assert b"".join(map(pieces.id_to_bytes, ids)) == " the 👩".encode()
    assert pieces.id_to_text(ids[0]) == " the"
    assert pieces.id_to_text(ids[-1]) == "\ufffd"
    assert bpe.id_to_text(2) == "<|im_start|>"
    assert bpe.id_to_bytes(10**6) == b""
    assert wave in [pieces.id_to_bytes(i) for i in range(pieces.vocab_size)]


def test_special_tokens_are_known() -> None:
    tokenizer = byte_level()
    assert tokenizer.eos_token_ids == {1}
    assert tokenizer.bos_token_id == 0
    assert tokenizer.special_ids >= {0, 1, 2}
    assert tokenizer.decode([0, 2, 1]) == ""
    assert tokenizer.decode([0, 2], skip_special_tokens=False) == "<s><|im_start|>"
    assert tokenizer.encode("<|im_start|>")[-1] == 2


def test_templates_render_and_their_refusals_are_the_clients() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'clown' %}{{ raise_exception('no clowns') }}"
        "{% endif %}<|im_start|>{{ m.role + ':' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}{{ extra }}"
    )
    tokenizer = wrap(byte_level()._backend, chat_template=template)
    messages = [{"role": "user", "content": "hi"}]
    ids = tokenizer.chat(messages)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user:hi<|im_start|>"
    closed = tokenizer.chat(messages, add_generation_prompt=False, extra="!")
    assert tokenizer.decode(closed) == "user:hi!"
    for bad in ({"role": "clown", "content": ""}, {"role": "user", "content": 5}, {"role": None}):
        with pytest.raises(InvalidRequest) as refusal:
            tokenizer.chat([bad])
        assert refusal.value.param == "messages"
    with pytest.raises(InvalidRequest, match="no clowns"):
        tokenizer.chat([{"role": "clown", "content": ""}])
    with pytest.raises(InvalidRequest, match="no chat template"):
        byte_level().chat(messages)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no usable tokenizer"):
        Tokenizer.load(tmp_path)
    byte_level()._tokenizer.save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("hello 👋") == byte_level().encode("hello 👋")


@pytest.mark.model
def test_smollm2s_tokenizer_and_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = smollm2_path()
    assert path.is_file(), "run `shoal pull smollm2` first"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    converted = Tokenizer.load(path)
    cached = Tokenizer.load(path)
    assert len(list((tmp_path / "shoal/tokenizers").iterdir())) == 1
    for tokenizer in (converted, cached):
        assert tokenizer.vocab_size == 49152
        assert tokenizer.eos_token_ids == {2}
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert "".join(streamed(tokenizer, ([i] for i in ids))) == text
        # Each digit stands alone, and so the blank lines before it stay together.
        assert [tokenizer.id_to_text(i) for i in tokenizer.encode("a\n\n12")] == [
            "a",
            "\n\n",
            "1",
            "2",
        ]
        chat = tokenizer.decode(
            tokenizer.chat([{"role": "user", "content": "hi"}]), skip_special_tokens=False
        )
        assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
        assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
