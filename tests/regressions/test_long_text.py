"""Tokenizing a long text held the interpreter's lock: every stream stood still meanwhile."""

import threading
import time

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shoal.server.model.tokenizer import Tokenizer


def test_other_threads_run_while_a_long_text_is_tokenized() -> None:
    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab | {"xx": 256}, merges=[("x", "x")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    text = "x" * 500_000
    beats = 0
    done = threading.Event()

    def beat() -> None:
        nonlocal beats
        while not done.is_set():
            beats += 1
            time.sleep(0.001)

    heart = threading.Thread(target=beat)
    heart.start()
    while not beats:
        time.sleep(0.001)
    before, started = beats, time.perf_counter()
    ids = tokenizer.encode(text)
    took_s, during = time.perf_counter() - started, beats - before
    done.set()
    heart.join()
    assert len(ids) == 250_000
    assert during > min(took_s / 0.001 / 20, 10), (during, took_s)
