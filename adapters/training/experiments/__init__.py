"""The papers' claims, measured again in small: see README.md."""
