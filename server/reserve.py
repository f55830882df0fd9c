"""What serving takes of a device beside weights, adapters and KV cache: an estimate, in bytes.

Pure: integers in, integers out. It errs on the large side, since what is left over goes unused
while what is missing ends a step.
"""

from dataclasses import dataclass

# CUDA graphs, the libraries' workspaces, and what the allocator cannot give back.
GRAPH_BYTES = 3 << 29
# Bases that uploads may bring and that corrections may need, and their largest rank
# (``adapters/library.py``, ``adapters/corrections.py`` and ``adapters/families/core.py`` see to
# that).
UPLOADED_BASES = 4
CORRECTION_BASES = 3
FURTHER_RANK = 128
# Columns of the joint basis, and bytes of tables for one token of a step (``adapters/tables.py``).
JOINT_COLUMNS = 64
TABLE_BYTES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """A model's widths, and the largest step.

    Attributes:
        tokens, rows, positions: of a step, and of the longest request.
        outputs: of all adapted linears of one layer together.
        item: bytes of an element of the model.
    """

    tokens: int
    rows: int
    positions: int
    item: int
    hidden: int
    intermediate: int
    q_size: int
    head_dim: int
    vocab: int
    layers: int
    outputs: int
    basis_rank: int
    block_tokens: int


def reserve_parts(sizes: StepSizes) -> dict[str, int]:
    """Bytes by purpose; their sum is ``MemoryFacts.reserve_bytes``."""
    widths = 4 * sizes.intermediate + 8 * sizes.hidden + 2 * sizes.q_size
    blocks = -(-sizes.positions // sizes.block_tokens)
    per_column = sizes.layers * sizes.outputs * sizes.item
    further = (UPLOADED_BASES + CORRECTION_BASES) * FURTHER_RANK
    return {
        "activations": sizes.tokens * widths * sizes.item,
        "logits": sizes.rows * sizes.vocab * (sizes.item + 4),
        "bases": per_column * (JOINT_COLUMNS + sizes.basis_rank + further),
        # Two sets of tables (decode steps, prompt steps), and a rotation in float32 per position.
        "tables": 2 * (sizes.rows * blocks * 4 + sizes.tokens * TABLE_BYTES)
        + sizes.positions * sizes.head_dim * 4,
        "graphs": GRAPH_BYTES,
    }
