"""Training data: a source's records, checked -> token ids, supervised ones marked -> batches.

What other packages need of it is importable from here.
"""

from shoal.adapters.training.data.batches import Batch, collate
from shoal.adapters.training.data.encoding import encode
from shoal.adapters.training.data.example import Example
from shoal.adapters.training.data.examples import TOO_LONG, load_examples
from shoal.adapters.training.data.order import order_of, row_order
from shoal.adapters.training.data.packing import fill_of, join
from shoal.adapters.training.data.records import Record
from shoal.adapters.training.data.sources import read_records

__all__ = [
    "TOO_LONG",
    "Batch",
    "Example",
    "Record",
    "collate",
    "encode",
    "fill_of",
    "join",
    "load_examples",
    "order_of",
    "read_records",
    "row_order",
]
