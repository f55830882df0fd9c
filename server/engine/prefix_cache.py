"""Finding KV blocks that already hold the beginning of a prompt.

Pure. Only full blocks are shared. A block's key is a cryptographic hash over its parent's key
and its tokens, beginning with the tenant and the adapter's digest: equal keys mean the same
tenant, equal adapter *content* and equal tokens from position 0 on. A tenant does not find
another's blocks: how long a prompt takes, and ``cached_tokens``, would tell it what others have
sent. And a collision that somebody could construct would show it another's text; hence a 256-bit
BLAKE2b and not ``hash()``.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from shoal.server.engine.blocks import BlockPool

_KEY_BYTES = 32


class KeyChain:
    """The keys of one sequence's full blocks, computed when asked for.

    ``token_ids`` is the sequence's own list and may grow at its end.
    """

    def __init__(
        self,
        adapter_digest: str,
        token_ids: Sequence[int],
        block_tokens: int,
        tenant: str = "",
    ) -> None:
        self._token_ids = token_ids
        self._block_tokens = block_tokens
        # A NUL is in no digest, so that no two pairs are written alike.
        whose = f"{adapter_digest}\0{tenant}".encode()
        root = blake2b(whose, digest_size=_KEY_BYTES, person=b"shoal-adapter")
        self._keys = [root.digest()]

    def key(self, index: int) -> bytes:
        """Key of the ``index``-th block, which must be full."""
        size = self._block_tokens
        assert (index + 1) * size <= len(self._token_ids), "only full blocks have keys"
        while len(self._keys) <= index + 1:
            start = (len(self._keys) - 1) * size
            tokens = array("q", self._token_ids[start : start + size]).tobytes()
            self._keys.append(
                blake2b(
                    self._keys[-1] + tokens, digest_size=_KEY_BYTES, person=b"shoal-block"
                ).digest()
            )
        return self._keys[index + 1]


class PrefixCache:
    """Key -> block. A block stays findable until ``pool`` gives it away."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._block_ids: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        pool.on_evict = self._forget

    def match(self, chain: KeyChain, blocks_max: int) -> tuple[int, ...]:
        """Blocks that hold the longest known prefix, at most ``blocks_max``. Takes none."""
        found: list[int] = []
        while len(found) < blocks_max:
            block_id = self._block_ids.get(chain.key(len(found)))
            if block_id is None:
                break
            found.append(block_id)
        return tuple(found)

    def commit(self, key: bytes, block_id: int) -> None:
        """Offer a held block whose content has been computed.

        When another block has this key already, that one stays and this one remains private.
        """
        if key not in self._block_ids and block_id not in self._keys:
            self._block_ids[key] = block_id
            self._keys[block_id] = key
            self._pool.keep(block_id)

    def check(self) -> None:
        """Assert that both directions agree."""
        assert {key: block_id for block_id, key in self._keys.items()} == self._block_ids

    def _forget(self, block_id: int) -> None:
        del self._block_ids[self._keys.pop(block_id)]
