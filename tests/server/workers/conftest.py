"""The fake engine, library and tokenizer of the HTTP tests."""

from tests.server.http.conftest import build, tokenizer, where

__all__ = ["build", "tokenizer", "where"]
