"""One resident model, a million tiny adapters.

The four sub-packages live in the repository's top-level folders of the same names:

- ``shoal.server``: HTTP -> engine -> model.
- ``shoal.adapters``: formats, registry, device bank and the offline trainer.
- ``shoal.kernels``: one folder per batched low-rank operation.
- ``shoal.loadtests``: open-loop load generation and reports.
"""

__version__ = "0.1.0"
