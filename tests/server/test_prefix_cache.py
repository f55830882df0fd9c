"""The prefix cache: what is found, what is never found, and what a key stands for."""

import pytest

from shoal.server.engine.blocks import BlockPool
from shoal.server.engine.prefix_cache import KeyChain, PrefixCache

TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9]


def cached(adapter: str = "", blocks: int = 2) -> tuple[BlockPool, PrefixCache, tuple[int, ...]]:
    """A cache that holds the first full blocks of TOKENS, four tokens each, nobody using them."""
    pool = BlockPool(4, 4)
    cache = PrefixCache(pool)
    held = pool.allocate(blocks)
    chain = KeyChain(adapter, TOKENS, 4)
    for index, block_id in enumerate(held):
        cache.commit(chain.key(index), block_id)
    pool.release(held)
    return pool, cache, held


def test_the_longest_known_prefix_is_found() -> None:
    _, cache, held = cached()
    assert cache.match(KeyChain("", TOKENS, 4), 2) == held
    assert cache.match(KeyChain("", TOKENS[:6], 4), 1) == held[:1]
    assert cache.match(KeyChain("", [*TOKENS[:4], 0, 0, 0, 0], 4), 2) == held[:1]


def test_matching_takes_nothing() -> None:
    pool, cache, _ = cached()
    cache.match(KeyChain("", TOKENS, 4), 2)
    assert pool.num_available == 4
    pool.check()
    cache.check()


def test_a_match_is_no_longer_than_allowed() -> None:
    _, cache, held = cached()
    assert cache.match(KeyChain("", TOKENS, 4), 1) == held[:1]


@pytest.mark.parametrize("adapter", ["", "b" * 64, "a" * 63])
def test_another_adapter_finds_nothing(adapter: str) -> None:
    _, cache, _ = cached(adapter="a" * 64)
    assert cache.match(KeyChain(adapter, TOKENS, 4), 2) == ()


def test_the_same_tokens_at_another_place_are_another_block() -> None:
    chain = KeyChain("", [1, 2, 1, 2], 2)
    assert chain.key(0) != chain.key(1)


def test_keys_do_not_depend_on_when_they_are_asked_for() -> None:
    tokens = TOKENS[:4]
    growing = KeyChain("a", tokens, 4)
    growing.key(0)
    tokens += TOKENS[4:]
    assert growing.key(1) == KeyChain("a", TOKENS, 4).key(1)


def test_token_boundaries_are_part_of_the_key() -> None:
    assert KeyChain("", [1, 256], 2).key(0) != KeyChain("", [257, 0], 2).key(0)


def test_a_block_that_is_not_full_has_no_key() -> None:
    with pytest.raises(AssertionError):
        KeyChain("", TOKENS, 4).key(2)


def test_a_block_given_away_is_forgotten() -> None:
    pool, cache, held = cached()
    pool.allocate(3)  # two free ones and the end of the idle prefix
    assert cache.match(KeyChain("", TOKENS, 4), 2) == held[:1]
    cache.check()


def test_a_second_block_of_the_same_content_stays_private() -> None:
    pool, cache, held = cached()
    (twin,) = pool.allocate(1)
    chain = KeyChain("", TOKENS, 4)
    cache.commit(chain.key(0), twin)
    assert cache.match(chain, 2) == held
    pool.release((twin,))
    cache.check()
    pool.check()
